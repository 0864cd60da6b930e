"""Runs tests of an op again in a process where another backend serves it.

The backend is decided once at import, and Triton decides at import whether its kernels are interpreted, so each needs
a process of its own. The tests are the same ones: `run_with_backend("triton", __file__, "forward or gradients")` runs
this file's tests whose names match, with every op on Triton's interpreter. Coverage follows into the child
(`patch = ["subprocess"]` of coverage's configuration), and the interpreter executes kernel bodies as Python lines, so
lines of kernels/ that the first case of a test reaches count (conftest.py).

A test file that uses this says where it is meant to run in children:

    def test_triton_interpreter() -> None:
        run_with_backend("triton", __file__, "forward or gradients")
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
# Set in the children, so that a test which starts children does not start them again.
CHILD = "COLLM_FAST_TEST_CHILD"


def in_child() -> bool:
    return CHILD in os.environ


def run_with_backend(
    backend: Literal["native", "triton", "reference", "auto"], test_file: str, keyword: str, **variables: str
) -> int:
    """pytest on one file with `-k keyword`; returns how many tests passed, fails if one did not or none ran."""
    environment = {**os.environ, "COLLM_FAST_BACKEND": backend, CHILD: backend, **variables}
    environment.pop("PYTEST_XDIST_WORKER", None)
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", keyword, test_file]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"with backend {backend}:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    return int(passed.group(1))

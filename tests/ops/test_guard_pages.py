"""No CPU kernel touches a byte outside its operands, results and working memory: each ends at a forbidden page.

Vector instructions under a mask and those of AMX tiles are invisible to AddressSanitizer (`make sanitize`); a page that
nobody may touch stops them all. The cases are in guarded.py, which runs in a process of its own: a fault is a failed
test here that names the case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import ROOT
from conftest import requires

sys.path.append(str(Path(__file__).resolve().parent))
from guarded import FAMILIES, FAULTS, SIMD

pytestmark = requires("native", "compiler")
HERE = Path(__file__).resolve().parent
Found = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What guarded.py found, and under "stderr" what it and the system had to say."""
    library = tmp_path_factory.mktemp("guard") / "guard_malloc.so"
    compiler = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fno-builtin"]
    subprocess.run([*compiler, str(HERE / "guard_malloc.cpp"), "-o", str(library)], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "COLLM_FAST_BACKEND": "native", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "guarded.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    result: Found = json.loads(done.stdout)
    result["stderr"] = {"text": done.stderr}
    return result


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_byte_outside_is_touched(family: str, simd: str, found: Found) -> None:
    run = found[f"{family} {simd}"]
    assert run["fault"] is None, f"{run['fault']}\n{found['stderr']['text']}"
    if family == "path_attention":
        assert run["cases"] == 72
    else:
        assert isinstance(run["cases"], int) and run["cases"] >= 90


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_outside_is_forbidden(fault: str, found: Found) -> None:
    """The pages and marks catch what they are there for."""
    place = {"read behind an operand": "memory that ends at the page"}.get(fault, "ordinary memory")
    place = {"read before an operand": "memory that begins at the page"}.get(fault, place)
    signal = "SIGABRT" if fault.startswith("write") else "SIGSEGV"
    assert found[fault] == {"cases": 0, "fault": f"{signal} in {fault}, {place}"}

"""`collm-fast bench`: the benchmarks of a checkout, run as the scripts they are. They live in benchmarks/. Floor F4."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from collm_fast import bench_compare
from collm_fast.config import nearest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def run_bench(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    """`compare OLD.json NEW.json` (anywhere), or a family and its script's options; returns the exit code.

    Raises: ValueError outside a checkout, or for a benchmark that does not exist.
    """
    if arguments and arguments[0] == "compare":
        return bench_compare.main(arguments[1:])
    if not folder.is_dir():
        raise ValueError(f"bench: expected a checkout of collm_fast with benchmarks/, got none at {folder}")
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not arguments or arguments[0] not in scripts:
        names = [*scripts, "compare"]
        got = repr(arguments[0]) + nearest(arguments[0], names) if arguments else "none"
        raise ValueError(f"bench: expected one of {', '.join(names)}, got {got}")
    return subprocess.call([sys.executable, str(scripts[arguments[0]]), *arguments[1:]])

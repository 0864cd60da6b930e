"""`collm-fast bench`: the benchmarks of a checkout, run as the scripts they are, and `compare`. Floor F4.

The benchmarks live in benchmarks/, which a wheel does not carry; comparing two files is `bench_compare.py`'s matter.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from collm_fast.bench_compare import compare
from collm_fast.config import nearest
from collm_fast.options import Parser

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def _compare(arguments: Sequence[str]) -> int:
    parser = Parser(prog="collm-fast bench compare", description="The ratios of two result files.")
    parser.add_argument("old", type=Path, help="the result file before")
    parser.add_argument("new", type=Path, help="the result file after")
    parser.add_argument("--max-loss", type=float, default=0.05, help="how much slower ours may be (0.05: 5 %%)")
    given = parser.parse_args(arguments)
    text, worse = compare(given.old, given.new, given.max_loss)
    print(text)
    return int(worse)


def run_bench(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    """`compare OLD.json NEW.json` (anywhere), or a family and its script's options; returns the exit code.

    Raises: ValueError outside a checkout, for a benchmark that does not exist, or for bad arguments of `compare`.
    """
    if arguments and arguments[0] == "compare":
        return _compare(arguments[1:])
    if not folder.is_dir():
        raise ValueError(f"bench: expected a checkout of collm_fast with benchmarks/, got none at {folder}")
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    known = ["compare", *scripts]
    if not arguments or arguments[0] not in scripts:
        got = repr(arguments[0]) + nearest(arguments[0], known) if arguments else "none"
        raise ValueError(f"bench: expected one of {', '.join(known)}, got {got}")
    return subprocess.call([sys.executable, str(scripts[arguments[0]]), *arguments[1:]])

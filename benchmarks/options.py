"""The command line that all benchmarks on the harness share.

Not here: what the options do (`harness.py`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    """The command line of every benchmark."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    rounds: int = 30
    seconds: float = math.inf
    min_sample_s: float = 2e-3
    flush_l2: bool = False
    processes: int = 1
    only: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    json: Path | None = None
    resume: bool = False
    peak: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)  # what a benchmark added of its own


def parse(
    doc: str | None,
    argv: Sequence[str] | None = None,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Options:
    """The options of a command line; exits with 2 for a bad one. `add` gives the parser a benchmark's own."""
    parser = argparse.ArgumentParser(description=(doc or "").strip().split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the result file here")
    goes_on = "keep the rows of the file, if they are of this machine and commit, and run the cases it lacks"
    parser.add_argument("--continue", dest="resume", action="store_true", help=goes_on)
    parser.add_argument("--quick", action="store_true", help="few rounds, small ceilings: to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="processor threads, pinned to as many cores")
    parser.add_argument("--rounds", type=int, help="samples of each implementation (30; 5 with --quick)")
    more = "time for the samples of one implementation; at least three, one where a call takes over twice as long"
    parser.add_argument("--seconds", type=float, default=math.inf, help=more)
    parser.add_argument("--processes", type=int, default=1, help="run that many times afresh; medians over them")
    parser.add_argument("--flush-l2", action="store_true", help="overwrite 256 MiB before every sample")
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="spare the further call that reads memory")
    only = "cases whose 'name pass dtype' contains this text; may be given several times"
    parser.add_argument("--only", action="append", default=[], help=only)
    beside = "time ours beside this one, and no other but those named so: a pair's calls are neighbours"
    parser.add_argument("--beside", action="append", default=[], metavar="IMPL", help=beside)
    if add is not None:
        add(parser)
    given = parser.parse_args(argv)
    for name in ("threads", "rounds", "processes"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if given.resume and (given.json is None or given.processes > 1):
        parser.error("--continue: expected --json and one process")
    if not given.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {given.seconds}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device: expected a device of this machine, got {given.device!r}")
    return Options(
        device=given.device,
        threads=given.threads,
        quick=given.quick,
        rounds=given.rounds or (5 if given.quick else 30),
        seconds=given.seconds,
        min_sample_s=5e-4 if given.quick else 2e-3,
        flush_l2=given.flush_l2,
        processes=given.processes,
        only=tuple(given.only),
        beside=tuple(given.beside),
        json=given.json,
        resume=given.resume,
        peak=given.peak,
        more={
            name: value for name, value in vars(given).items() if name not in {item.name for item in fields(Options)}
        },
    )

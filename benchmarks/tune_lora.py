"""Measures launch configurations of lora_linear's Triton kernels on this GPU and prints the rows of the table.

    python benchmarks/tune_lora.py [--rows M] [--dtypes NAME...] [--ranks R...] [--columns C...] [--quick]
                                   [--json FILE] [--write]

For each kernel, dtype, rank and width the search starts from the configuration that serves now and varies one number at
a time, in the order of AXES, until nothing is faster by GAIN: the order is fixed, times are medians of CUDA graphs, so
a second run on a quiet GPU ends where the first did. What spills registers, does not fit or gives other numbers counts
as infinitely slow. --write puts the rows into kernels/lora_table.py, whose test compiles every one of them.

Here: the search, the clock, the text of the rows. The kernels are kernels/lora.py; bench_lora.py compares them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from collm_fast.kernels import lora_table
from collm_fast.kernels.lora_table import Key, Launch

AXES: dict[str, tuple[int, ...]] = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_C": (32, 64, 128, 256),
    "RANK": (16, 32, 64),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
QUICK = {"BLOCK_M": (16, 32), "BLOCK_C": (32, 64), "num_warps": (4, 8)}
GAIN = 0.03  # less is noise, and not worth a row that differs
TABLE = Path(lora_table.__file__).resolve()
BEGIN, END = "    # begin: written by benchmarks/tune_lora.py\n", "    # end\n"
DROPOUT = 3277  # of 65536: the paper's 0.05


# --- the search --------------------------------------------------------------------------------------------------
def search(
    start: Launch, measure: Callable[[Launch], float], axes: Mapping[str, Sequence[int]], gain: float = GAIN
) -> tuple[Launch, dict[Launch, float]]:
    """The fastest configuration that one change at a time leads to, and the seconds of all that were tried.

    Each configuration is measured once. Of equals the first wins, and the one that serves stays unless another takes
    less than (1 - gain) of its time.
    """
    seconds: dict[Launch, float] = {}

    def timed(launch: Launch) -> float:
        if launch not in seconds:
            seconds[launch] = measure(launch)
        return seconds[launch]

    best, before = start, None
    timed(best)
    while before != best:
        before = best
        for axis, values in axes.items():
            fastest = min((replace(best, **{axis: value}) for value in values), key=timed)
            if timed(fastest) < (1 - gain) * timed(best):
                best = fastest
    if not math.isfinite(timed(best)):
        raise RuntimeError(f"tune_lora: expected a configuration that runs, got none of {len(seconds)}")
    return best, seconds


def axes_for(r: int, axes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Without blocks of ranks of which half or more would be empty."""
    needed = max(16, 1 << (r - 1).bit_length())
    return {axis: [v for v in values if axis != "RANK" or v <= needed] for axis, values in axes.items()}


# --- the table's text --------------------------------------------------------------------------------------------
def row_text(key: Key, launch: Launch) -> str:
    capability, kernel, dtype, rank, columns = key
    sizes = ", ".join(str(value) for value in asdict(launch).values())
    return f'    ({capability}, "{kernel}", "{dtype}", {rank}, {columns}): Launch({sizes}),\n'


def with_rows(text: str, rows: Mapping[Key, Launch], note: str) -> str:
    """The table's file with these rows in place of what was written before, in the order of their keys."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"tune_lora: expected one place for the rows in {TABLE.name}, got another file")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return head + BEGIN + f"    # {note}\n" + "".join(row_text(key, rows[key]) for key in sorted(rows)) + END + tail


# --- the clock ---------------------------------------------------------------------------------------------------
class Watched:
    """A Triton kernel that keeps the code of its last launch, which knows its spills."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.code: Any = None

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.code = self.kernel[grid](*args, **options)

        return launch


@dataclass(frozen=True)
class Problem:
    """One launch of a kernel: M rows of C columns, rank r, as a training step asks for it, with dropout."""

    kernel: str
    dtype: str
    M: int
    C: int
    r: int

    def call(self, kernels: Any) -> Callable[[], torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        dtype, options = getattr(torch, self.dtype), {"generator": generator, "device": "cuda"}
        v = torch.randn(self.M, self.C, **options).to(dtype)
        s = torch.randn(self.M, self.r, **options)
        factor = torch.randn(self.r, self.C, **options)
        seed, out = torch.tensor([7], device="cuda"), torch.empty_like(v)

        def expand() -> torch.Tensor:
            kernels._expand(out, s, factor, 1.0, None, seed, 0, DROPOUT)
            return out

        return {
            "project": lambda: kernels._project(v, factor, 1.0, seed, 0, DROPOUT),
            "expand": expand,
            "outer": lambda: kernels._outer(v, s, 1.0, seed, 0, DROPOUT),
        }[self.kernel]


def clock(problem: Problem, capability: int) -> Callable[[Launch], float]:
    """Seconds of one launch under a configuration, which the table serves while it is measured."""
    import triton.testing
    from collm_fast.kernels import lora as kernels
    from triton.runtime.errors import OutOfResources, PTXASError

    name, key = f"{problem.kernel}_kernel", _key(problem, capability)
    watched = getattr(kernels, name)
    if not isinstance(watched, Watched):
        watched = Watched(watched)
        setattr(kernels, name, watched)
    call = problem.call(kernels)
    truth = call()
    # Sums of another order, and for what is stored in half precision its rounding.
    distance = (1e-2 if truth.dtype.itemsize == 2 else 1e-5) * float(truth.double().norm())
    truth = truth.double()

    def measure(launch: Launch) -> float:
        served = lora_table.MEASURED.get(key)
        lora_table.MEASURED[key] = launch
        try:
            right = float((call().double() - truth).norm()) <= distance
            if watched.code.n_spills > 0 or not right:
                return math.inf
            return 1e-3 * float(triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median"))
        except (OutOfResources, PTXASError):
            return math.inf
        finally:
            lora_table.MEASURED.pop(key)
            if served is not None:
                lora_table.MEASURED[key] = served

    return measure


def _key(problem: Problem, capability: int) -> Key:
    return lora_table.key_of(problem.kernel, problem.dtype, problem.r, problem.C, capability)


# --- the command -------------------------------------------------------------------------------------------------
def tune(
    problems: Sequence[Problem],
    capability: int,
    axes: Mapping[str, Sequence[int]],
    clock_of: Callable[[Problem, int], Callable[[Launch], float]] = clock,
) -> tuple[dict[Key, Launch], list[dict[str, Any]]]:
    """The table's rows, and what was measured for each."""
    rows: dict[Key, Launch] = {}
    report = []
    for problem in problems:
        start = lora_table.launch_of(problem.kernel, problem.dtype, problem.r, problem.C, capability)
        best, seconds = search(start, clock_of(problem, capability), axes_for(problem.r, axes))
        rows[_key(problem, capability)] = best
        entry = {**asdict(problem), "launch": asdict(best), "before_s": seconds[start], "after_s": seconds[best]}
        report.append({**entry, "tried": len(seconds)})
        print(f"{problem}: {1e6 * seconds[start]:.1f} us, now {1e6 * seconds[best]:.1f} us by {best}", flush=True)
    return rows, report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune_lora", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--columns", type=int, nargs="+", default=[576, 4096])
    parser.add_argument("--quick", action="store_true", help="one small problem and few configurations")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="put the rows into kernels/lora_table.py")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.dtypes, options.ranks, options.columns = 512, ["bfloat16"], [8], [576]
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print("tune_lora: expected an NVIDIA GPU that this torch can use, got none", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    problems = [
        Problem(kernel, dtype, options.rows, C, r)
        for kernel in lora_table.KERNELS
        for dtype in options.dtypes
        for r in options.ranks
        for C in options.columns
    ]
    rows, report = tune(problems, 10 * major + minor, QUICK if options.quick else AXES)
    # Rows of other GPUs stay, and the note is of the last run alone.
    note = f"sm_{major}{minor} was measured last: {torch.cuda.get_device_name()}, torch {torch.__version__}."
    if options.json is not None:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": report}, indent=1) + "\n")
    print("".join(row_text(key, rows[key]) for key in sorted(rows)), end="")
    if options.write:
        TABLE.write_text(with_rows(TABLE.read_text(), {**lora_table.MEASURED, **rows}, note))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

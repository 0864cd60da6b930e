"""Times implementations of one operation side by side and writes the result file.

Here: the cases, the order of the samples, the comparison of outputs. Not here: what is timed (the neighbouring
`bench_<family>.py`), the command line (`options.py`), ceilings (`ceilings.py`), table and file (`rows.py`), the machine
(`machine.py`), the comparison of two result files (`collm_fast/bench_compare.py`). It needs torch and NumPy only.

A benchmark is one function that hands over cases, and one line that runs it:

    import harness

    def cases(suite: harness.Suite) -> None:
        x, grad = suite.tensor(4096, 64), suite.tensor(4096, 64)   # seeded, on the suite's device, in the data hash
        impls = {"ours": lambda x: ops.double(x), "torch": lambda x: x * 2}             # "ours" first, peers after
        suite.case("N=4096", "fwd", x.dtype, {name: partial(fn, x) for name, fn in impls.items()},
                   expected=lambda: x.double() * 2, work=harness.Work(bytes=2 * x.nbytes))
        suite.case("N=4096", "fwd+bwd", x.dtype, {name: harness.backward(fn, [x], grad) for name, fn in impls.items()},
                   expected=lambda: [x.double() * 2, grad.double() * 2], work=harness.Work(bytes=4 * x.nbytes))

    if __name__ == "__main__":
        raise SystemExit(harness.main(cases, __doc__))

`expected` gives the right output (float64 where possible); an implementation that is further from it than the
tolerance gets no speed-up in the table, and if it is ours the run ends with exit code 1. A peer that cannot run is
reported, and has no row. Slower results stay in.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from ceilings import Table, Work, dtype_name, floor_seconds, gather_rate, measure_ceilings, sample
from options import Options, parse
from rows import Row, format_table, merge, write_json
from torch import Tensor

__all__ = ["Options", "Suite", "Table", "Work", "backward", "distance", "main", "measure_ceilings", "parse"]

Output = Tensor | Sequence[Tensor]
Impl = Callable[[], Output]
Impls = Mapping[str, Impl]
Samples = dict[str, dict[int, float]]  # of each implementation, seconds by turn
MIN_SAMPLES = 3  # whatever `--seconds` allows, unless one takes longer than twice that
PASSES = ("fwd", "fwd+dx", "fwd+bwd", "step", "eval", "rank")
# Normwise distance from the float64 result: a few roundings of the dtype, and the growth of a long sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Suite:
    """Collects cases, times them, and holds the rows. See the module's example."""

    options: Options
    ceilings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.options.device)
        self._generator = torch.Generator().manual_seed(0)
        self._hash = hashlib.sha256()
        self._done: set[tuple[str, str, str]] = set()

    @property
    def by_cpu(self) -> bool:
        """Whether processor time is what counts: one thread of a CPU."""
        return self.device.type == "cpu" and self.options.threads == 1

    def reseed(self, name: str) -> None:
        """Makes the numbers that follow depend on this name alone, not on what was drawn before (see `--only`)."""
        self._generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Seeded N(0, scale^2) numbers on the suite's device; the same in every process and on every machine."""
        return self._recorded(torch.randn(shape, generator=self._generator).mul_(scale)).to(self.device, dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Seeded integers in [low, high) on the suite's device."""
        return self._recorded(torch.randint(low, high, shape, generator=self._generator)).to(self.device, dtype)

    def file(self, name: str, path: Path) -> Path:
        """Notes a data file and its SHA-256 in the result; returns the path."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.data[name] = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
        return path

    def resume(self, result: Mapping[str, Any]) -> None:
        """Goes on from a result file: its rows and ceilings stay, and the cases of these rows are not run again.

        Raises: ValueError where the file was measured elsewhere, with other versions or code, or with other threads.
        """
        here = machine.description(self.device)
        for key in here:
            if result[key] != here[key]:
                raise ValueError(f"--continue: expected a file with {key} {here[key]!r}, got {result[key]!r}")
        self.rows = [Row.from_json(row) for row in result["rows"]]
        for row in self.rows:
            if row.threads != self.options.threads:
                raise ValueError(f"--continue: expected a file of {self.options.threads} threads, got {row.threads}")
        self._done = {(row.case, row.pass_, row.dtype) for row in self.rows}
        self.failures, self.data, self.ceilings = list(result["failures"]), dict(result["data"]), result["ceilings"]
        # What is drawn from here on is hashed behind what was.
        self._hash.update(str(self.data.get("synthetic")).encode())

    def wanted(self, name: str, passes: Sequence[str], dtype: torch.dtype) -> bool:
        """Whether one of these passes of a case is to run: `--only` takes it, and it is not in the file continued.

        Ask before a case's tensors are made.
        """
        only, kind = self.options.only, dtype_name(dtype)
        titles = [f"{name} {pass_} {kind}" for pass_ in passes if (name, pass_, kind) not in self._done]
        return any(not only or any(text in title for text in only) for title in titles)

    def case(
        self,
        name: str,
        pass_: str,
        dtype: torch.dtype,
        impls: Impls | Callable[[], Impls],
        *,
        expected: Impl,
        work: Work | Callable[[], Work] | None = None,
        tolerance: float | None = None,
    ) -> list[Row]:
        """Times every implementation in turn, round by round, and appends one row for each that runs.

        `impls` and `work` may be functions that build them: they are not called where `--only` leaves the case out.

        Returns: these rows.
        Raises: ValueError for an unknown pass; whatever "ours" raises.
        """
        if pass_ not in PASSES:
            raise ValueError(f"benchmark: expected a pass of {', '.join(PASSES)}, got {pass_!r}")
        if not self.wanted(name, (pass_,), dtype):
            return []
        title = f"{name} {pass_} {dtype_name(dtype)}"
        print(title, file=sys.stderr, flush=True)
        if self.options.json is not None and self.rows:
            write_json(self.to_json(), self.options.json)
        chosen = self._chosen(title, impls() if callable(impls) else impls)
        errors, running, first = self._compare(title, chosen, expected)
        work = work() if callable(work) else work
        rate = self._gather_rate(work)
        wall, cpu = self._times(running, first)
        limit = TOLERANCE[dtype] if tolerance is None else tolerance
        floor = None if work is None else floor_seconds(work, self.ceilings, dtype)
        rows = []
        for impl, fn in running.items():
            p20, median, p80 = np.quantile(list(wall[impl].values()), (0.2, 0.5, 0.8)).tolist()
            row = Row(
                case=name,
                impl=impl,
                pass_=pass_,
                dtype=dtype_name(dtype),
                threads=self.options.threads,
                median_s=median,
                p20_s=p20,
                p80_s=p80,
                cpu_s=float(np.median(list(cpu[impl].values()))),
                peak_bytes=machine.peak_bytes(fn, self.device) if self.options.peak else None,
                floor_s=floor,
                error=errors[impl] if math.isfinite(errors[impl]) else None,
                agrees=errors[impl] <= limit,  # False for NaN as well
                over_ours=_paired(impl, cpu if self.by_cpu else wall),
            )
            if work is not None and rate is not None:
                row.gather_fraction = work.gathered / row.seconds(self.by_cpu) / rate
            rows.append(row)
        self.rows += rows
        return rows

    def _chosen(self, title: str, impls: Impls) -> Impls:
        """Ours and those that `--beside` names, or all."""
        beside = self.options.beside
        if not beside:
            return impls
        self.failures += [f"{title} {name}: expected one of {', '.join(impls)}" for name in beside if name not in impls]
        return {name: fn for name, fn in impls.items() if name == "ours" or name in beside}

    def _gather_rate(self, work: Work | None) -> float | None:
        """The ceiling of the table that the case gathers from, measured once a run, just before the case."""
        if work is None or work.table is None or not self.ceilings:
            return None
        rates: dict[str, float] = self.ceilings["table_bytes_per_s"]
        name = str(work.table)
        if name not in rates:
            rates[name] = gather_rate(work.table, self.device, quick=self.options.quick)
        return rates[name]

    def _compare(
        self, title: str, impls: Impls, expected: Impl
    ) -> tuple[dict[str, float], dict[str, Impl], dict[str, float]]:
        """Runs each once: its distance from what is expected, those that run at all, and the seconds it took."""
        truth = [t.detach().double() for t in _listed(expected())]
        errors, running, seconds = {}, {}, {}
        for impl, fn in impls.items():
            begin = time.perf_counter()
            try:
                outputs = _listed(fn())
                seconds[impl] = time.perf_counter() - begin
                errors[impl], running[impl] = distance(outputs, truth), fn
            except (RuntimeError, ValueError, TypeError, ImportError) as error:
                if impl == "ours":
                    raise
                self.failures.append(f"{title} {impl}: {str(error).splitlines()[0]}")
        return errors, running, seconds

    def _times(self, impls: Impls, first: Mapping[str, float]) -> tuple[Samples, Samples]:
        """Seconds of one call, wall and processor, of each sample.

        Every turn has an order of its own, by chance: who runs after whom decides what lies in the caches, and whoever
        always ran after ours would find the tensors that all share there.

        Args: first: how long the call took that was compared.
        """
        flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device) if self.options.flush_l2 else None
        seconds = {name: self._warm_up(fn, first[name]) for name, fn in impls.items()}
        least = 0.0 if flush is not None else self.options.min_sample_s
        repeats = {name: max(1, min(1000, math.ceil(least / call))) for name, call in seconds.items()}
        samples = {name: self._samples(repeats[name] * call) for name, call in seconds.items()}
        names, turns, chance = list(impls), max(samples.values()), random.Random(0)
        wall: Samples = {name: {} for name in names}
        cpu: Samples = {name: {} for name in names}
        gc.collect()
        gc.disable()  # a collection in the middle of a sample would be charged to whoever ran then
        try:
            for turn in range(turns):
                for name in chance.sample(names, len(names)):
                    # A slow one has fewer samples, spread evenly over the turns.
                    if (turn + 1) * samples[name] // turns == turn * samples[name] // turns:
                        continue
                    wall[name][turn], cpu[name][turn] = sample(impls[name], repeats[name], self.device, flush)
        finally:
            gc.enable()
        return wall, cpu

    def _samples(self, seconds: float) -> int:
        """How many samples of that length: `--rounds`, fewer where `--seconds` ends before, but at least three.

        One alone where it is longer than twice that: `--processes` brings more.
        """
        least = 1 if seconds > 2 * self.options.seconds else MIN_SAMPLES
        allowed = min(self.options.seconds / seconds, 1e6)
        return min(self.options.rounds, max(least, int(allowed)))

    def _warm_up(self, fn: Impl, first: float) -> float:
        """Seconds of one call, after a few where they are short; a first call of a second was enough of a warm-up."""
        if first > 1.0 and self.device.type == "cpu":
            return first
        seconds = sample(fn, 1, self.device)[0]
        if seconds < 0.05:
            sample(fn, 2, self.device)
            seconds = sample(fn, 3, self.device)[0]
        return max(seconds, 1e-7)

    def _recorded(self, value: Tensor) -> Tensor:
        self._hash.update(value.numpy().tobytes())
        self.data["synthetic"] = {"sha256": self._hash.hexdigest(), "seed": 0}
        return value

    def to_json(self) -> dict[str, Any]:
        """The result file's content."""
        return {
            **machine.description(self.device),
            "data": self.data,
            "ceilings": self.ceilings,
            "processes": self.options.processes,
            "failures": self.failures,
            "rows": [row.to_json() for row in self.rows],
        }


def _paired(impl: str, seconds: Samples) -> float | None:
    """An implementation's time over ours, the median over the turns that sampled both.

    The rate of a machine may change by half within a run; samples of one turn are neighbours.
    """
    ours, its = seconds.get("ours", {}), seconds[impl]
    both = [its[turn] / ours[turn] for turn in its.keys() & ours.keys() if ours[turn] > 0]
    return float(np.median(both)) if both else None


def _listed(output: Output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def distance(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest ||output - truth|| / ||truth|| over the tensors; infinite for another shape, NaN if one is there."""
    if [t.shape for t in outputs] != [t.shape for t in truth]:
        return math.inf
    worst = 0.0
    for output, right in zip(outputs, truth, strict=True):
        size = float(right.norm())
        gap = float((output.detach().double() - right).norm()) / (size if size > 0 else 1.0)
        if not math.isfinite(gap):
            return math.nan
        worst = max(worst, gap)
    return worst


def backward(
    fn: Callable[..., Output], inputs: Sequence[Tensor], grad: Output, *, wrt: Sequence[int] | None = None
) -> Impl:
    """A call of fn(*inputs) and of its backward.

    Returns: a function that gives the outputs and then the gradients of the inputs numbered in `wrt` (default: all).
    """
    places = range(len(inputs)) if wrt is None else wrt
    leaves = [t.detach().requires_grad_(i in places) for i, t in enumerate(inputs)]
    grads = _listed(grad)

    def run() -> Output:
        outputs = _listed(fn(*leaves))
        return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, [leaves[i] for i in places], grads)]

    return run


def _again(command: Sequence[str], processes: int) -> dict[str, Any]:
    """Runs the same script in new processes, one after the other, and merges their results."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(processes):
            path = Path(folder) / f"{turn}.json"
            arguments = [sys.executable, *command, "--processes", "1", "--json", str(path)]
            subprocess.run(arguments, stdout=subprocess.DEVNULL, check=False)
            if not path.is_file():
                raise SystemExit(f"benchmark: process {turn + 1} of {processes} ended without a result")
            results.append(json.loads(path.read_text()))
    return merge(results)


def main(
    cases: Callable[[Suite], None],
    doc: str | None,
    argv: Sequence[str] | None = None,
    *,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
    finish: Callable[[dict[str, Any], Options], None] | None = None,
) -> int:
    """Runs the cases, prints the table, writes the file; before each case, the file with what is measured so far.

    Args: add: adds a benchmark's own options to the parser. finish: is given the result before it is written.
    Returns: 1 if an output of ours differs from what was expected, or if no case ran; else 0.
    """
    options = parse(doc, argv, add)
    if options.processes > 1:
        result = _again([sys.argv[0], *(sys.argv[1:] if argv is None else argv)], options.processes)
    else:
        machine.pin(options.threads)
        suite = Suite(options)
        if options.resume and options.json is not None and options.json.is_file():
            suite.resume(json.loads(options.json.read_text()))
        else:
            suite.ceilings = measure_ceilings(torch.device(options.device), quick=options.quick)
        cases(suite)
        result = suite.to_json()
    rows = [Row.from_json(row) for row in result["rows"]]
    print(f"{result['device']}, {result['simd']}, torch {result['versions']['torch']}, commit {result['commit']}")
    print(format_table(rows, options.device == "cpu" and options.threads == 1) or "no case was run")
    for failure in result["failures"]:
        print(f"not run: {failure}")
    if finish is not None:
        finish(result, options)
    if options.json is not None:
        write_json(result, options.json)
    return int(not rows or any(row.impl == "ours" and not row.agrees for row in rows))

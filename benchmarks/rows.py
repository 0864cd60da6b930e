"""The rows of a result: their form, how they print side by side, how several processes become one, the file.

Not here: how a row is measured (`harness.py`), and the comparison of two files (`collm_fast/bench_compare.py`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

KEY = ("case", "impl", "pass", "dtype", "threads")
TIMES = ("median_s", "p20_s", "p80_s", "cpu_s")
NUMBERS = (*TIMES, "peak_bytes", "floor_s", "error", "gather_fraction", "over_ours", "kept_bytes")


@dataclass
class Row:
    """One implementation in one case; `pass_` is written as "pass"."""

    case: str
    impl: str
    pass_: str
    dtype: str
    threads: int
    median_s: float
    p20_s: float
    p80_s: float
    cpu_s: float  # processor time of all threads for one call, the median; on a GPU the host's share
    peak_bytes: int | None  # memory above what was there before the call
    floor_s: float | None
    error: float | None  # normwise distance from `expected`; None where it is not finite
    agrees: bool
    gather_fraction: float | None = None  # the case's gathered bytes per second over the ceiling of its table
    over_ours: float | None = None  # its time over ours, the median over the turns that sampled both
    kept_bytes: int | None = None  # what autograd keeps for backward beside parameters

    def seconds(self, by_cpu: bool) -> float:
        """What is compared: processor time (one pinned thread, which other programs may interrupt) or wall time."""
        return self.cpu_s if by_cpu and self.cpu_s > 0 else self.median_s

    def to_json(self) -> dict[str, Any]:
        return {("pass" if name == "pass_" else name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        return cls(**{("pass_" if name == "pass" else name): value for name, value in values.items()})


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _cell(row: Row, ours: Row | None, by_cpu: bool) -> str:
    if not row.agrees:
        error = "not finite" if row.error is None else f"error {row.error:.1e}"
        return f"{row.impl} DIFFERS ({error}): no speed-up"
    wall = f"{_milliseconds(row.median_s)} [{_milliseconds(row.p20_s)} {_milliseconds(row.p80_s)}]"
    text = f"{row.impl} {_milliseconds(row.cpu_s)} ms (wall {wall})" if by_cpu else f"{row.impl} {wall} ms"
    if ours is not None and ours is not row and ours.agrees:
        quotient = row.seconds(by_cpu) / ours.seconds(by_cpu)
        text += f" = {quotient if row.over_ours is None else row.over_ours:.2f}x ours"
    return text if row.kept_bytes is None else f"{text}, keeps {row.kept_bytes / 2**20:.3g} MiB"


def format_case(rows: Sequence[Row], by_cpu: bool = False) -> str:
    """One line: ours, every peer and its time over ours, the floor and ours over it."""
    ours = next((row for row in rows if row.impl == "ours"), None)
    first = rows[0]
    title = f"{first.case} {first.pass_} {first.dtype} x{first.threads}"
    cells = [title, *(_cell(row, ours, by_cpu) for row in rows)]
    if first.floor_s:
        over = f" (ours {ours.seconds(by_cpu) / first.floor_s:.2f}x it)" if ours is not None and ours.agrees else ""
        cells.append(f"floor {_milliseconds(first.floor_s)} ms{over}")
    if ours is not None and ours.agrees:
        peak = "unknown" if ours.peak_bytes is None else f"{ours.peak_bytes / 2**20:.1f} MiB"
        gather = "" if ours.gather_fraction is None else f", {ours.gather_fraction:.0%} of the gather ceiling"
        cells.append(f"ours: cpu {_milliseconds(ours.cpu_s)} ms, peak {peak}, error {ours.error:.1e}{gather}")
    return " | ".join(cells)


def format_table(rows: Sequence[Row], by_cpu: bool = False) -> str:
    """One line for each case, in the order they were run; `by_cpu` compares processor time instead of wall time."""
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.pass_, row.dtype, row.threads), []).append(row)
    return "\n".join(format_case(group, by_cpu) for group in groups.values())


def _median(values: Sequence[Any]) -> Any:
    """Of numbers, or of every number in equal mappings; None where one is missing."""
    if isinstance(values[0], Mapping):
        shared = [key for key in values[0] if all(key in value for value in values)]
        return {key: _median([value[key] for value in values]) for key in shared}
    return None if None in values else type(values[0])(np.median(values))


def merge(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several processes: the median of every number over the processes, row by row."""
    rows = []
    for row in results[0]["rows"]:
        key = [row[k] for k in KEY]
        same = [r for result in results for r in result["rows"] if [r[k] for k in KEY] == key]
        median = {name: _median([r.get(name) for r in same]) for name in NUMBERS}
        rows.append({**row, **median, "agrees": all(r["agrees"] for r in same)})
    failures = sorted({failure for result in results for failure in result["failures"]})
    ceilings = _median([result["ceilings"] for result in results])
    return {**results[0], "processes": len(results), "ceilings": ceilings, "failures": failures, "rows": rows}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Writes to a temporary name and renames it; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)

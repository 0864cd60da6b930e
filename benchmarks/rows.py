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

    def to_json(self) -> dict[str, Any]:
        return {("pass" if name == "pass_" else name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        return cls(**{("pass_" if name == "pass" else name): value for name, value in values.items()})


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _cell(row: Row, ours: Row | None) -> str:
    if not row.agrees:
        error = "not finite" if row.error is None else f"error {row.error:.1e}"
        return f"{row.impl} DIFFERS ({error}): no speed-up"
    text = f"{row.impl} {_milliseconds(row.median_s)} [{_milliseconds(row.p20_s)} {_milliseconds(row.p80_s)}] ms"
    if ours is not None and ours is not row and ours.agrees:
        text += f" = {row.median_s / ours.median_s:.2f}x ours"
    return text


def format_case(rows: Sequence[Row]) -> str:
    """One line: ours, every peer and its time over ours, the floor and ours over it."""
    ours = next((row for row in rows if row.impl == "ours"), None)
    first = rows[0]
    cells = [f"{first.case} {first.pass_} {first.dtype} x{first.threads}", *(_cell(row, ours) for row in rows)]
    if first.floor_s:
        over = f" (ours {ours.median_s / first.floor_s:.2f}x it)" if ours is not None and ours.agrees else ""
        cells.append(f"floor {_milliseconds(first.floor_s)} ms{over}")
    if ours is not None and ours.agrees:
        peak = "unknown" if ours.peak_bytes is None else f"{ours.peak_bytes / 2**20:.1f} MiB"
        cells.append(f"ours: cpu {_milliseconds(ours.cpu_s)} ms, peak {peak}, error {ours.error:.1e}")
    return " | ".join(cells)


def format_table(rows: Sequence[Row]) -> str:
    """One line for each case, in the order they were run."""
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.pass_, row.dtype, row.threads), []).append(row)
    return "\n".join(format_case(group) for group in groups.values())


def merge(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several processes: the median of every number over the processes, row by row."""
    rows = []
    for row in results[0]["rows"]:
        key = [row[k] for k in KEY]
        same = [r for result in results for r in result["rows"] if [r[k] for k in KEY] == key]
        median = {}
        for name in ("median_s", "p20_s", "p80_s", "cpu_s", "peak_bytes", "floor_s", "error"):
            values = [r[name] for r in same]
            median[name] = None if None in values else type(values[0])(np.median(values))
        rows.append({**row, **median, "agrees": all(r["agrees"] for r in same)})
    failures = sorted({failure for result in results for failure in result["failures"]})
    return {**results[0], "processes": len(results), "failures": failures, "rows": rows}


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

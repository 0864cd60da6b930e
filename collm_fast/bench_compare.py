"""`collm-fast bench compare`: the ratios of two result files of a benchmark, and whether something became slower.

The files are written by benchmarks/rows.py; their shape is in benchmarks/results/README.md. The command line around
this is `collm_fast.bench`. Floor F3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, str, int]
_KEY = ("case", "pass", "dtype", "impl", "threads")
_MACHINE = ("device", "cpu", "simd")


def _load(path: Path | str) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"bench compare: expected a result file, got {path}, which does not exist")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"bench compare: expected JSON in {path}, got {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f"bench compare: expected an object with rows in {path}, got {str(result)[:60]}")
    return result


def _rows(result: Mapping[str, Any], path: Path | str) -> dict[Key, dict[str, Any]]:
    found: dict[Key, dict[str, Any]] = {}
    for number, row in enumerate(result["rows"]):
        missing = [name for name in (*_KEY, "median_s") if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(
                f"bench compare: expected {', '.join(missing)} in row {number} of {path}, got {str(row)[:60]}"
            )
        seconds = row["median_s"]
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ValueError(f"bench compare: expected a median_s above 0 in row {number} of {path}, got {seconds!r}")
        key = (str(row["case"]), str(row["pass"]), str(row["dtype"]), str(row["impl"]), int(row["threads"]))
        if key in found:
            raise ValueError(f"bench compare: expected each row once in {path}, got {_title(key)} twice")
        found[key] = row
    return found


def _title(key: Key) -> str:
    case, pass_, dtype, impl, threads = key
    return f"{case} {pass_} {dtype} x{threads} {impl}"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"note: another {name}: {old.get(name)} -> {new.get(name)}; the ratios compare machines as well"
        for name in _MACHINE
        if old.get(name) != new.get(name)
    ]


def compare(old: Path | str, new: Path | str, max_loss: float) -> tuple[str, bool]:
    """The table of new over old medians, row by row, and whether a row of ours lost more than `max_loss`.

    Args:
        old, new: result files of benchmarks/bench_<family>.py. Rows that only one of them has are listed.
        max_loss: 0.05 allows ours 5 % more time than before. Peers are listed and never judged: their time shows how
            much the machine itself changed. Where neither file has a row of ours, every row is judged.
    Returns: the text, and True if a judged row became slower than allowed or no longer gives the right output.
    Raises: ValueError for a file that is missing, no JSON or of another shape, or two files without a common row.
    """
    if not 0 <= max_loss < math.inf:
        raise ValueError(f"bench compare: expected a max_loss of at least 0, got {max_loss}")
    before, after = _load(old), _load(new)
    rows_before, rows_after = _rows(before, old), _rows(after, new)
    common = [key for key in rows_before if key in rows_after]
    if not common:
        raise ValueError(f"bench compare: expected rows in common, got none in {old} and {new}")
    judge_all = not any(key[3] == "ours" for key in common)
    lines = [f"{old} ({before.get('commit')}) -> {new} ({after.get('commit')})", *_differences(before, after)]
    width, worse = max(len(_title(key)) for key in common), False
    for key in common:
        first, second = rows_before[key], rows_after[key]
        ratio = second["median_s"] / first["median_s"]
        judged, wrong = judge_all or key[3] == "ours", not second.get("agrees", True)
        lost = judged and (wrong or ratio > 1 + max_loss)
        worse |= lost
        times = f"{first['median_s'] * 1e3:10.4g} -> {second['median_s'] * 1e3:10.4g} ms  {ratio:6.3f}x"
        reason = "  wrong output" if wrong else f"  slower than allowed ({1 + max_loss:.3g}x)" if lost else ""
        lines.append(f"{_title(key):{width}}  {times}{reason}")
    for name, path, rows, others in (("old", old, rows_before, rows_after), ("new", new, rows_after, rows_before)):
        lines.extend(f"only in the {name} file {path}: {_title(key)}" for key in rows if key not in others)
    judged_word = "rows" if judge_all else "rows of ours"
    lines.append(f"{judged_word} beyond the allowed loss: {'yes' if worse else 'none'}")
    return "\n".join(lines), worse

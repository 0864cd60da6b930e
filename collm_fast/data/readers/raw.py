"""What every reader returns, and how a row is judged: ids, ratings and times from text, bad rows with their lines.

The readers beside this file only know their formats. Floor F2.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.ragged import I64, Array

log = logging.getLogger(__name__)
SHOWN = 10


@dataclass
class BadRows:
    """Rows that a reader left out, with the first few places and reasons."""

    total: int = 0
    count: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, file: Path, line: int, kind: str, got: object) -> None:
        self.count += 1
        self.reasons[kind] += 1
        if len(self.first) < SHOWN:
            self.first.append({"file": file.name, "line": line, "reason": f"{kind}, got {got!r}"})

    def finish(self, max_fraction: float, file: Path) -> None:
        """Log what was left out; ValueError when it is more than the allowed fraction, or everything."""
        if self.total == 0:
            raise ValueError(f"prepare: expected rows in {file}, got none")
        if self.count == 0:
            return
        places = "; ".join(f"{row['file']} line {row['line']}: {row['reason']}" for row in self.first[:3])
        if self.count > max_fraction * self.total or self.count == self.total:
            raise ValueError(
                f"prepare: expected at most {max_fraction:.3g} of the rows of {file} to be bad, "
                f"got {self.count} of {self.total} ({places})"
            )
        log.warning("left out %d of %d rows: %s", self.count, self.total, places)

    def report(self) -> dict[str, Any]:
        """For meta.json."""
        return {"rows": self.total, "count": self.count, "reasons": dict(self.reasons), "first": self.first}


@dataclass(frozen=True)
class RawData:
    """Interactions as a reader found them, in the file's order.

    user, item: [n] int64 if every id of the column is a whole number, else [n] str; rating [n] float64;
    timestamp [n] int64 seconds; titles: item id as text -> title; files: what was read; domain: what the items are.
    """

    user: Array
    item: Array
    rating: NDArray[np.float64]
    timestamp: I64
    titles: dict[str, str]
    files: list[Path]
    bad: BadRows
    domain: str


def text_id(value: object) -> str | None:
    """An id as text; None where it is missing, negative or not text that can be stored."""
    if value is None:
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    if not text or text.lower() in ("nan", "none", "null") or "\x00" in text or not storable(text):
        return None
    return None if text[0] == "-" and text[1:].isdigit() else text


def storable(text: str) -> bool:
    """False for text with bytes that were not in the file's encoding (they were read as lone surrogates)."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def number(value: object) -> float | None:
    """A finite number from text or a number, else None."""
    try:
        out = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return out if math.isfinite(out) else None


def collect(
    rows: Iterable[tuple[int, Sequence[object]]], columns: Sequence[int], width: int, file: Path, bad: BadRows
) -> tuple[list[str], list[str], list[float], list[int]]:
    """Good rows as columns (user, item, rating, timestamp) from (line, fields); `columns` are their four places."""
    users, items, ratings, times = [], [], [], []
    at_user, at_item, at_rating, at_time = columns
    for line, fields in rows:
        bad.total += 1
        if len(fields) != width:
            bad.add(file, line, f"expected {width} fields", len(fields))
            continue
        user, item = text_id(fields[at_user]), text_id(fields[at_item])
        rating, time = number(fields[at_rating]), number(fields[at_time])
        if user is None:
            bad.add(file, line, "expected a user id that is not missing or negative", fields[at_user])
        elif item is None:
            bad.add(file, line, "expected an item id that is not missing or negative", fields[at_item])
        elif rating is None:
            bad.add(file, line, "expected a number as rating", fields[at_rating])
        elif time is None or abs(time) >= 2**53:
            bad.add(file, line, "expected a number of seconds as timestamp", fields[at_time])
        else:
            users.append(user)
            items.append(item)
            ratings.append(rating)
            times.append(int(time))
    return users, items, ratings, times


def assemble(
    columns: tuple[list[str], list[str], list[float], list[int]],
    titles: dict[str, str],
    files: list[Path],
    bad: BadRows,
    domain: str,
) -> RawData:
    """RawData from `collect`'s columns."""
    users, items, ratings, times = columns
    return RawData(
        ids_array(users),
        ids_array(items),
        np.array(ratings, dtype=np.float64),
        np.array(times, dtype=np.int64),
        titles,
        files,
        bad,
        domain,
    )


def ids_array(ids: list[str]) -> Array:
    """[n] int64 where every id is a whole number in its usual form (no leading zeros), else [n] str."""
    distinct = set(ids)
    whole = all(text.isascii() and text.isdigit() and (text[0] != "0" or text == "0") for text in distinct)
    if whole and all(len(text) <= 18 for text in distinct):
        return np.array([int(text) for text in ids], dtype=np.int64)
    return np.array(ids, dtype=np.str_)


def find_column(name: str, present: Sequence[str], file: Path, option: str | None = None) -> int:
    """The position of a column; ValueError names the columns there are."""
    if name in present:
        return list(present).index(name)
    hint = f" (choose one with {option})" if option else ""
    raise ValueError(f"prepare: expected column {name!r} in {file}, got {', '.join(map(repr, present))}{hint}")

"""The CoLLM authors' published splits: train, valid and test as Parquet, or as their pickles `*_ood2.pkl`.

The splits, histories and warm/cold marks are kept as published; only their shape is checked here. Pickles go through
data/readers/unpickle.py. Floor F2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collm_fast.data.dataset import SPLITS, Split, drop_padding, ragged_column
from collm_fast.data.ragged import I64, offsets_of

NUMBERS = ("uid", "iid", "label", "timestamp", "not_cold")
COLUMNS = (*NUMBERS, "his", "his_title", "title")


@dataclass(frozen=True)
class Published:
    """Splits as published; titles by item id, from the rows themselves and from their histories; what was read."""

    splits: dict[str, Split]
    titles: list[str]
    num_users: int
    files: list[Path]
    domain: str


def read_published(folder: Path, allow_pickle: bool) -> Published:
    """Read `train|valid|test.parquet`, or `train|valid|test_ood2.pkl` when `allow_pickle` is set.

    Raises: ValueError for missing files or columns, ids or labels out of range, histories and titles of different
    lengths, or pickles without `allow_pickle`.
    """
    if not folder.is_dir():
        raise ValueError(f"prepare: expected a folder with the published files, got {folder}")
    splits, files, titles = {}, [], {0: ""}
    for name in SPLITS:
        file, columns = _read_file(folder, name, allow_pickle)
        files.append(file)
        splits[name] = _split(columns, file)
        _note_titles(columns, file, titles)
    num_items = 1 + max(max(titles), *(int(split.iid.max()) for split in splits.values()))
    num_users = 1 + max(int(split.uid.max()) for split in splits.values())
    # An id below the largest that occurs nowhere gets its number as its title: the tables keep the published sizes.
    by_id = [titles.get(item, str(item)) for item in range(num_items)]
    return Published(splits, by_id, num_users, files, guess_domain(by_id[1:]))


def guess_domain(titles: Sequence[str]) -> str:
    """ "movie" when most titles end in a year, else "book": the two data sets the authors published."""
    dated = sum(re.search(r"\((19|20)\d\d\)\s*$", title) is not None for title in titles)
    return "movie" if 2 * dated > len(titles) else "book"


def _read_file(folder: Path, name: str, allow_pickle: bool) -> tuple[Path, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet, pickled = folder / f"{name}.parquet", folder / f"{name}_ood2.pkl"
    if not parquet.is_file():
        if not pickled.is_file():
            raise ValueError(f"prepare: expected {parquet.name} or {pickled.name} in {folder}, got neither")
        if not allow_pickle:
            raise ValueError(f"prepare: expected --allow_pickle true to read {pickled}, got a pickle without it")
        from collm_fast.data.readers.unpickle import read_frame

        return pickled, _require(read_frame(pickled), pickled)
    try:
        table = pq.read_table(parquet)
    except pa.ArrowException as error:
        raise ValueError(f"prepare: expected Parquet in {parquet}, got {str(error).splitlines()[0]}") from error
    return parquet, _require({column: table.column(column) for column in table.column_names}, parquet)


def _require(columns: dict[str, Any], file: Path) -> dict[str, Any]:
    for column in COLUMNS:
        if column not in columns:
            raise ValueError(f"prepare: expected column {column!r} in {file}, got {', '.join(columns)}")
    return columns


def _ragged(column: Any) -> tuple[I64, Any]:
    """(offsets, flat values) of a pyarrow list column or of an object array of lists."""
    if hasattr(column, "chunks"):
        if str(column.type.value_type) not in ("string", "large_string"):
            return ragged_column(column)
        lists = column.to_pylist()
    else:
        lists = [list(row) for row in column]
    offsets = offsets_of(np.array([len(row) for row in lists], dtype=np.int64))
    return offsets, [value for row in lists for value in row]


def _split(columns: dict[str, Any], file: Path) -> Split:
    numbers: dict[str, I64] = {}
    for name in NUMBERS:
        values = columns[name].to_numpy() if hasattr(columns[name], "to_numpy") else np.asarray(columns[name])
        try:
            with np.errstate(invalid="ignore"):  # NaN becomes some number, which then differs from NaN
                numbers[name] = values.astype(np.int64)
            exact = bool((numbers[name] == values).all())
        except (TypeError, ValueError):
            exact = False
        if not exact:
            raise ValueError(f"prepare: expected whole numbers in {name} of {file}, got {values.dtype}")
        low, high = {"label": (0, 1), "not_cold": (0, 1), "timestamp": (-(2**53), 2**53)}.get(name, (1, 2**31 - 2))
        bad = (numbers[name] < low) | (numbers[name] > high)
        if bad.any():
            row = int(np.argmax(bad))
            got = numbers[name][row]
            raise ValueError(f"prepare: expected {name} in [{low}, {high}] in {file}, got {got} in row {row}")
    if len(numbers["uid"]) == 0:
        raise ValueError(f"prepare: expected rows in {file}, got none")
    offsets, values = _ragged(columns["his"])
    his = np.asarray(values, dtype=np.int64)
    if (his < 0).any():
        row = int(np.searchsorted(offsets, np.argmax(his < 0), side="right")) - 1
        raise ValueError(f"prepare: expected item ids in his of {file}, got {his[his < 0][0]} in row {row}")
    his_offsets, his = drop_padding(offsets, his)
    return Split(
        numbers["uid"],
        numbers["iid"],
        numbers["label"],
        numbers["timestamp"],
        his_offsets,
        his,
        numbers["not_cold"].astype(bool),
    )


def _note_titles(columns: dict[str, Any], file: Path, titles: dict[int, str]) -> None:
    own = columns["title"].to_pylist() if hasattr(columns["title"], "to_pylist") else list(columns["title"])
    item = columns["iid"].to_pylist() if hasattr(columns["iid"], "to_pylist") else list(columns["iid"])
    offsets, his = _ragged(columns["his"])
    title_offsets, his_titles = _ragged(columns["his_title"])
    if not np.array_equal(offsets, title_offsets):
        row = int(np.argmax(np.diff(offsets) != np.diff(title_offsets)))
        raise ValueError(f"prepare: expected as many his_title as his in {file}, got other lengths in row {row}")
    for row, (place, title) in enumerate(zip(item, own, strict=True)):
        if not isinstance(title, str):
            raise ValueError(f"prepare: expected text in title of {file}, got {title!r} in row {row}")
        titles.setdefault(int(place), title)
    # Only the items that are nobody's target need their title from a history; a set keeps this one quick pass.
    ids = np.asarray(his, dtype=np.int64)
    first = np.unique(ids, return_index=True)[1]
    for place in first[np.argsort(first)].tolist():
        titles.setdefault(int(ids[place]), str(his_titles[place]))

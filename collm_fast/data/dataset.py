"""A prepared dataset in memory: splits with their histories, titles and raw ids, read from the folder `prepare` wrote.

Nothing here knows where the data came from (data/readers) or how it was split (data/splits); the folder is written by
data/prepare.py. Floor F2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.ragged import I64, Array, take_ragged

SPLITS = ("train", "valid", "test")
FORMAT = 1


@dataclass(frozen=True)
class Split:
    """Rows of one split; ids start at 1, 0 is padding and appears nowhere.

    Fields (n rows): uid, iid, label (0 or 1), timestamp (seconds): [n] int64; his_offsets [n + 1] int64 and his int64:
    the liked items before each row, oldest first, without the padding zero; not_cold [n] bool: user and item both
    occur in train.
    """

    uid: I64
    iid: I64
    label: I64
    timestamp: I64
    his_offsets: I64
    his: I64
    not_cold: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.uid)

    def take(self, index: Array | Sequence[int]) -> Split:
        """The rows at `index` (int64 positions or a bool mask), in that order."""
        index = np.asarray(index)
        rows = np.flatnonzero(index) if index.dtype == np.bool_ else index.astype(np.int64)
        his_offsets, his = take_ragged(self.his_offsets, self.his, rows)
        return Split(
            self.uid[rows],
            self.iid[rows],
            self.label[rows],
            self.timestamp[rows],
            his_offsets,
            his,
            self.not_cold[rows],
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all columns: equal rows in equal order have equal fingerprints."""
        digest = hashlib.sha256()
        for name in ("uid", "iid", "label", "timestamp", "his_offsets", "his", "not_cold"):
            column = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name}:{column.dtype.str}:{len(column)};".encode())
            digest.update(column.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Fields: path of the folder; meta: its meta.json; titles by item id (titles[0] == ""); splits "train", "valid",
    "test"; num_users and num_items: the table sizes, largest id + 1; raw_users and raw_items: the source's ids by our
    id (int64 or str; entry 0 is unused).
    """

    path: Path
    meta: dict[str, Any]
    titles: list[str]
    splits: dict[str, Split]
    num_users: int
    num_items: int
    raw_users: Array
    raw_items: Array

    def user_index(self, raw_ids: Sequence[Any] | Array) -> I64:
        """Our user ids [n] int64 of the source's ids; ValueError names the first one that the dataset does not have."""
        return _lookup("user", raw_ids, self.raw_users)

    def item_index(self, raw_ids: Sequence[Any] | Array) -> I64:
        """Our item ids [n] int64 of the source's ids; ValueError names the first one that the dataset does not have."""
        return _lookup("item", raw_ids, self.raw_items)

    @property
    def domain(self) -> str:
        """What the items are: "movie", "book" or "item"; chooses the built-in prompts."""
        return str(self.meta.get("domain", "item"))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the splits, titles and raw ids; models and caches made from this dataset carry it."""
        digest = hashlib.sha256(f"{FORMAT}:{self.num_users}:{self.num_items};".encode())
        for name in SPLITS:
            digest.update(self.splits[name].fingerprint.encode())
        for texts in (self.titles, self.raw_users.tolist(), self.raw_items.tolist()):
            digest.update(json.dumps(texts).encode())
        return digest.hexdigest()


def _lookup(kind: str, raw_ids: Sequence[Any] | Array, known: Array) -> I64:
    wanted = np.asarray(raw_ids).reshape(-1)
    # Text compares with text and numbers with numbers: "196" finds user 196, and 196 finds the user called "196".
    if np.issubdtype(known.dtype, np.integer) and not np.issubdtype(wanted.dtype, np.integer):
        canonical = [str(value)[:-2] if str(value).endswith(".0") else str(value) for value in wanted.tolist()]
        table = {str(value): place for place, value in enumerate(known.tolist()) if place}
        found = np.array([table.get(value, 0) for value in canonical], dtype=np.int64)
    else:
        if not np.issubdtype(known.dtype, np.integer):
            wanted = wanted.astype(str)
        body = known[1:]
        order = np.argsort(body, kind="stable")
        place = np.searchsorted(body, wanted, sorter=order)
        candidate = order[np.minimum(place, len(body) - 1)]
        found = np.where(body[candidate] == wanted, candidate + 1, 0).astype(np.int64)
    if (found == 0).any():
        row = int(np.argmax(found == 0))
        raise ValueError(f"{kind}_index: expected {kind} ids of the dataset, got {wanted[row].item()!r} in row {row}")
    return found


def load_dataset(path: Path | str) -> Dataset:
    """Read a folder that `collm-fast prepare` wrote, and check it.

    Raises: ValueError, one line with the file and the rule, for a missing or changed file, a missing column, an id
    beyond the table, a label other than 0 and 1, or an empty split.
    """
    folder = Path(path)
    meta = _read_meta(folder)
    users = _read(folder, "users.parquet", meta, ("uid", "user"))
    items = _read(folder, "items.parquet", meta, ("iid", "item", "title"))
    raw_users = _by_index(users.column("uid"), users.column("user"), "users.parquet")
    raw_items = _by_index(items.column("iid"), items.column("item"), "items.parquet")
    titles = [""] + items.column("title").to_pylist()
    if any(title is None for title in titles):
        raise ValueError("load_dataset: expected a title in every row of items.parquet, got null")
    splits = {name: _read_split(folder, name, meta, len(raw_users), len(raw_items)) for name in SPLITS}
    return Dataset(folder, meta, titles, splits, len(raw_users), len(raw_items), raw_users, raw_items)


def _read_meta(folder: Path) -> dict[str, Any]:
    file = folder / "meta.json"
    if not file.is_file():
        raise ValueError(f"load_dataset: expected a folder that prepare wrote, got {folder} without meta.json")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_dataset: expected JSON in {file}, got {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"load_dataset: expected format {FORMAT} in {file}, got {found!r}; prepare the data again")
    return meta


def _read(folder: Path, name: str, meta: dict[str, Any], columns: Sequence[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / name
    if not file.is_file():
        raise ValueError(f"load_dataset: expected {name} in {folder}, got no such file")
    expected = meta.get("hashes", {}).get(name)
    if expected is not None and file_hash(file) != expected:
        raise ValueError(f"load_dataset: expected {file} as prepare wrote it, got other contents; prepare again")
    try:
        present = pq.read_schema(file).names
        missing = [column for column in columns if column not in present]
        if missing:
            raise ValueError(f"load_dataset: expected column {missing[0]!r} in {file}, got {', '.join(present)}")
        return pq.read_table(file, columns=list(columns))
    except pa.ArrowException as error:
        raise ValueError(f"load_dataset: expected Parquet in {file}, got {str(error).splitlines()[0]}") from error


def _by_index(index: Any, raw: Any, name: str) -> Array:
    """Raw ids with entry 0 unused; the file's rows must be numbered 1, 2, .."""
    if not np.array_equal(index.to_numpy(), np.arange(1, len(index) + 1)):
        raise ValueError(f"load_dataset: expected ids 1, 2, .. in {name}, got another numbering")
    values = raw.to_pylist()
    if all(isinstance(value, int) for value in values):
        return np.array([-1, *values], dtype=np.int64)
    return np.array(["", *values], dtype=np.str_)


def _read_split(folder: Path, name: str, meta: dict[str, Any], num_users: int, num_items: int) -> Split:
    file = f"{name}.parquet"
    table = _read(folder, file, meta, ("uid", "iid", "label", "timestamp", "his", "not_cold"))
    if len(table) == 0:
        raise ValueError(f"load_dataset: expected rows in {folder / file}, got an empty split")
    plain: dict[str, I64] = {}
    for column in ("uid", "iid", "label", "timestamp", "not_cold"):
        if table.column(column).null_count:
            raise ValueError(f"load_dataset: expected a value in every row of {column} in {file}, got null")
        plain[column] = table.column(column).to_numpy().astype(np.int64)
    his_offsets, his = ragged_column(table.column("his"))
    del table
    for column, values, low, high in (
        ("uid", plain["uid"], 1, num_users),
        ("iid", plain["iid"], 1, num_items),
        ("label", plain["label"], 0, 2),
        ("not_cold", plain["not_cold"], 0, 2),
        ("his", his, 0, num_items),
    ):
        bad = (values < low) | (values >= high)
        if bad.any():
            row = int(np.argmax(bad))
            row = row if column != "his" else int(np.searchsorted(his_offsets, row, side="right")) - 1
            rule = f"{column} in [{low}, {high - 1}]"
            raise ValueError(f"load_dataset: expected {rule} in {file}, got {values[np.argmax(bad)]} in row {row}")
    his_offsets, his = drop_padding(his_offsets, his)
    return Split(
        plain["uid"], plain["iid"], plain["label"], plain["timestamp"], his_offsets, his, plain["not_cold"].astype(bool)
    )


def ragged_column(column: Any) -> tuple[I64, I64]:
    """(offsets, values) int64 of a pyarrow list column."""
    import pyarrow as pa

    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])).to_numpy(zero_copy_only=False)
    return offsets - offsets[0], values.astype(np.int64)


def drop_padding(offsets: I64, values: I64) -> tuple[I64, I64]:
    """A history without the padding item 0 that the published files begin every history with."""
    kept = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values != 0, out=kept[1:])
    return kept[offsets], values[values != 0]


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Writes a dataset folder: five Parquet files and meta.json under a temporary name, then one rename.

What is in it is decided by data/prepare.py; data/dataset.py reads it back. Floor F2.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.dataset import SPLITS, Split, file_hash
from collm_fast.data.ragged import I64, Array, spans

# Bounds the memory of writing: histories of many rows hold far more titles than one Arrow array can address.
ROWS_PER_GROUP = 16384


@dataclass(frozen=True)
class Contents:
    """What a dataset folder holds besides meta.json. raw_users and raw_items have an unused entry 0.

    rating: [n] float64 in the order of the splits' rows (train, valid, test), None where the source has no ratings.
    """

    splits: dict[str, Split]
    titles: list[str]
    raw_users: Array
    raw_items: Array
    rating: NDArray[np.float64] | None


def check_out(out: Path) -> None:
    """ValueError unless `out` does not exist or is an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        held = "a prepared dataset" if (out / "meta.json").is_file() else "other files"
        raise ValueError(f"prepare: expected an out folder that is new or empty, got {out}, which holds {held}")


def write_folder(out: Path, contents: Contents, meta: dict[str, Any]) -> None:
    """Write everything beside `out` and rename it into place; nothing is left behind when a write fails."""
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        _write_maps(temporary, contents)
        _write_interactions(temporary / "interactions.parquet", contents)
        for name in SPLITS:
            _write_split(temporary / f"{name}.parquet", contents.splits[name], contents.titles)
        files = sorted(file.name for file in temporary.iterdir())
        full = {**meta, "hashes": {name: file_hash(temporary / name) for name in files}}
        (temporary / "meta.json").write_text(json.dumps(full, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes private folders
        _sync(temporary)
        os.replace(temporary, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(file: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file, compression="zstd")


def _write_maps(folder: Path, contents: Contents) -> None:
    users, items = contents.raw_users[1:], contents.raw_items[1:]
    _write(folder / "users.parquet", {"uid": np.arange(1, len(users) + 1), "user": users})
    _write(folder / "items.parquet", {"item": items, "title": contents.titles[1:], "iid": np.arange(1, len(items) + 1)})


def _write_interactions(file: Path, contents: Contents) -> None:
    import pyarrow as pa

    def joined(name: str) -> Array:
        return np.concatenate([getattr(contents.splits[split], name) for split in SPLITS])

    uid, iid, label = joined("uid"), joined("iid"), joined("label")
    rating = pa.nulls(len(uid), pa.float64()) if contents.rating is None else pa.array(contents.rating)
    part = np.repeat(np.array(SPLITS), [len(contents.splits[split]) for split in SPLITS])
    columns = {
        "user": contents.raw_users[uid],
        "item": contents.raw_items[iid],
        "rating": rating,
        "timestamp": joined("timestamp"),
        "label": label,
        "uid": uid,
        "iid": iid,
        "split": part,
    }
    _write(file, columns)


def _write_split(file: Path, split: Split, titles: Sequence[str]) -> None:
    """The published form: every history begins with the padding item 0 and its empty title."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = pa.array(titles, pa.string())
    writer = None
    try:
        for start in range(0, max(len(split), 1), ROWS_PER_GROUP):
            part = split.take(np.arange(start, min(start + ROWS_PER_GROUP, len(split))))
            offsets, his = _with_padding(part.his_offsets, part.his)
            arrays = {
                "uid": pa.array(part.uid),
                "iid": pa.array(part.iid),
                "label": pa.array(part.label),
                "timestamp": pa.array(part.timestamp),
                "his": pa.ListArray.from_arrays(offsets, pa.array(his)),
                "his_title": pa.ListArray.from_arrays(offsets, names.take(pa.array(his))),
                "title": names.take(pa.array(part.iid)),
                "not_cold": pa.array(part.not_cold.astype(np.int64)),
            }
            table = pa.table(arrays)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _with_padding(offsets: I64, his: I64) -> tuple[NDArray[np.int32], I64]:
    lengths = np.diff(offsets)
    padded = np.zeros(len(his) + len(lengths), dtype=np.int64)
    new_offsets = offsets + np.arange(len(offsets))
    padded[spans(new_offsets[:-1] + 1, lengths)] = his
    return new_offsets.astype(np.int32), padded

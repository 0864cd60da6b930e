"""From a source's files to a dataset folder: read, label, split, number the ids, attach histories, write.

Formats live in data/readers, the rules in data/splits.py and data/history.py, the folder in data/folder.py. Floor F2.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.config import PrepareConfig
from collm_fast.data.dataset import FORMAT, SPLITS, Dataset, Split, file_hash, load_dataset
from collm_fast.data.folder import Contents, check_out, write_folder
from collm_fast.data.history import fixed_blocks, histories, row_blocks
from collm_fast.data.ragged import I64, Array
from collm_fast.data.readers import RawData, read_raw
from collm_fast.data.readers.published import read_published
from collm_fast.data.splits import ML1M_MONTHS, WARM_RULES, by_user, calendar_months, calendar_quantiles, not_cold

log = logging.getLogger(__name__)
ODD_ROW = "an odd row goes to test and to valid for every other user in turn"

_RAW = ("ml-100k", "ml-1m", "recbole", "table")  # the sources that prepare labels and splits itself
# The options that only these sources read; with another one they would change nothing.
_READ_BY = {
    "like_threshold": _RAW,
    "history_block": _RAW,
    "max_bad_fraction": _RAW,
    "allow_pickle": ("collm",),
    **dict.fromkeys(("user_column", "item_column", "rating_column", "timestamp_column"), ("recbole", "table")),
    **dict.fromkeys(("title_column", "items"), ("table",)),
}


def prepare(config: PrepareConfig) -> Dataset:
    """Read `config.input` as `config.source`, split it, write the folder `config.out` in one rename and load it.

    A label is 1 where rating >= like_threshold. Rows are sorted by (user, time), ties in the file's order; ids are
    numbered from 1 in that order, 0 is padding. Histories hold liked items only (data/history.py).

    Raises: ValueError, one line, for bad input (file, row and rule), an option that the source does not read, an empty
    split, or an `out` that already holds something; nothing is left behind then.
    """
    check_out(config.out)
    if config.source == "amazon":
        known = "ml-100k, ml-1m, collm, recbole or table"
        raise ValueError(f"prepare: expected source {known}, got 'amazon', which a later version reads")
    _check_options(config)
    contents, meta = _published(config) if config.source == "collm" else _split_raw(config)
    for name in SPLITS:
        if len(contents.splits[name]) == 0:
            raise ValueError(f"prepare: expected rows in every split, got an empty {name} ({_why_empty(meta)})")
    meta = {"format": FORMAT, "source": config.source, **meta, **_counts(contents)}
    write_folder(config.out, contents, meta)
    log.info("wrote %s: %s", config.out, meta["counts"])
    del contents  # the histories of a large data set need not be in memory twice
    return load_dataset(config.out)


def _check_options(config: PrepareConfig) -> None:
    given = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    for name, sources in _READ_BY.items():
        if name in given and config.source not in sources:
            rule = f"--{name} only with source {' or '.join(sources)}"
            raise ValueError(f"prepare: expected {rule}, got {given[name]!r} with {config.source!r}")
    if "history_block" in given and _rules(config)[1] != "block":
        raise ValueError(f"prepare: expected --history_block only with --history block, got {config.history_block}")


def _rules(config: PrepareConfig) -> tuple[str, str]:
    """The split rule and the history rule of a source that prepare splits itself."""
    split = config.split or ("calendar" if config.source == "ml-1m" else "user")
    return split, config.history or ("block" if split == "user" else "row")


def _why_empty(meta: dict[str, Any]) -> str:
    split = meta["split"]
    other = "user" if split["rule"] == "calendar" else "calendar"
    return f"split rule {split['rule']!r}: {split['text']}; --split {other} may serve"


def _published(config: PrepareConfig) -> tuple[Contents, dict[str, Any]]:
    if config.input is None:
        raise ValueError("prepare: expected --input with the published files for source 'collm', got none")
    for name, kept in (("split", "calendar"), ("history", "row")):
        if getattr(config, name) not in (None, kept):
            rule = f"--{name} {kept} for source 'collm', whose published {name} is kept"
            raise ValueError(f"prepare: expected {rule}, got {getattr(config, name)!r}")
    found = read_published(config.input, config.allow_pickle)
    # The published ids are already numbers from 1: they are their own raw ids.
    users, items = (np.append(-1, np.arange(1, size)) for size in (found.num_users, len(found.titles)))
    contents = Contents(found.splits, found.titles, users, items, None)
    meta = {
        "domain": config.domain or found.domain,
        "split": {"rule": "calendar", "text": "as published by the authors of CoLLM"},
        "history": {"rule": "row", "text": "as published: everything liked in the user's earlier rows"},
        "files": _files(found.files),
    }
    return contents, meta


def _split_raw(config: PrepareConfig) -> tuple[Contents, dict[str, Any]]:
    raw = read_raw(config)
    order = np.lexsort((raw.timestamp, raw.user))  # stable: ties keep the file's order
    raw = _reorder(raw, order)
    split, split_meta = _apply_split(config, raw)
    kept = split >= 0
    dropped, raw, split = int((~kept).sum()), _reorder(raw, np.flatnonzero(kept)), split[kept]
    uid, raw_users = number_ids(raw.user)
    iid, raw_items = number_ids(raw.item)
    label = (raw.rating >= config.like_threshold).astype(np.int64)
    blocks, history_meta = _apply_history(config, uid, split)
    warm = not_cold(uid, iid, split)
    splits, order_of_splits = {}, []
    for part, name in enumerate(SPLITS):
        rows = np.flatnonzero(split == part)
        order_of_splits.append(rows)
        part_offsets, part_his = histories(uid, iid, label == 1, blocks, rows)
        splits[name] = Split(uid[rows], iid[rows], label[rows], raw.timestamp[rows], part_offsets, part_his, warm[rows])
    titles = [""] + [raw.titles.get(str(item), "") or str(item) for item in raw_items[1:].tolist()]
    untitled = sum(not raw.titles.get(str(item)) for item in raw_items[1:].tolist())
    if untitled:
        log.warning("%d of %d items have no title: their id stands in for it", untitled, len(raw_items) - 1)
    contents = Contents(splits, titles, raw_users, raw_items, raw.rating[np.concatenate(order_of_splits)])
    meta = {
        "domain": config.domain or raw.domain,
        "like_threshold": config.like_threshold,
        "split": {**split_meta, "rows_in_no_split": dropped},
        "history": history_meta,
        "bad_rows": raw.bad.report(),
        "items_without_title": untitled,
        "files": _files(raw.files),
    }
    return contents, meta


def _reorder(raw: RawData, order: I64) -> RawData:
    return replace(
        raw, user=raw.user[order], item=raw.item[order], rating=raw.rating[order], timestamp=raw.timestamp[order]
    )


def _apply_split(config: PrepareConfig, raw: RawData) -> tuple[NDArray[np.int8], dict[str, Any]]:
    rule, _ = _rules(config)
    if rule == "user":
        return by_user(raw.user), {
            "rule": rule,
            "text": "each user's last fifth of rows, halved into valid and test (" + ODD_ROW + ")",
        }
    if config.source == "ml-1m":
        months = dict(zip(SPLITS, ML1M_MONTHS, strict=True))
        text = "months of the data, counted from 0: " + ", ".join(f"{n} {a}-{b}" for n, (a, b) in months.items())
        return calendar_months(raw.timestamp), {"rule": rule, "text": text, "months": months}
    text = "by time over all users: first 80 % train, next 10 % valid, last 10 % test"
    return calendar_quantiles(raw.timestamp), {"rule": rule, "text": text}


def _apply_history(config: PrepareConfig, uid: I64, split: NDArray[np.int8]) -> tuple[I64, dict[str, Any]]:
    _, rule = _rules(config)
    if rule == "row":
        return row_blocks(uid), {"rule": rule, "text": "everything liked in the user's earlier rows, across the splits"}
    text = (
        f"everything liked before the row's block; blocks are {config.history_block} consecutive train rows of a user, "
        "a user's valid rows, a user's test rows"
    )
    meta = {"rule": rule, "block": config.history_block, "text": text}
    return fixed_blocks(uid, split, config.history_block), meta


def number_ids(raw: Array) -> tuple[I64, Array]:
    """(ids [n] from 1 in the order of first occurrence, raw id by id with entry 0 unused)."""
    distinct, first, inverse = np.unique(raw, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(distinct), dtype=np.int64)
    rank[order] = np.arange(1, len(distinct) + 1)
    unused = np.array([-1 if np.issubdtype(raw.dtype, np.integer) else ""], dtype=raw.dtype)
    return rank[inverse.reshape(-1)], np.concatenate([unused, distinct[order]])


def _files(files: list[Path]) -> list[dict[str, Any]]:
    return [{"name": file.name, "bytes": file.stat().st_size, "sha256": file_hash(file)} for file in files]


def _counts(contents: Contents) -> dict[str, Any]:
    splits = contents.splits
    counts = {
        "users": len(contents.raw_users) - 1,
        "items": len(contents.raw_items) - 1,
        "rows": {name: len(splits[name]) for name in SPLITS},
        "liked": {name: int(splits[name].label.sum()) for name in SPLITS},
        "not_cold": {name: int(splits[name].not_cold.sum()) for name in SPLITS},
    }
    maps = {
        "users": {"file": "users.parquet", "id": "uid", "raw": "user"},
        "items": {"file": "items.parquet", "id": "iid", "raw": "item"},
    }
    return {"counts": counts, "maps": maps, "warm": WARM_RULES}

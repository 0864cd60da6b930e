"""Histories: the items a user liked before a moment, oldest first.

A history is cut to the last `history_length` items only where a prompt is written (data/prompts.py). Floor F2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.ragged import I64, Array, gather_spans

if TYPE_CHECKING:
    from collm_fast.data.dataset import Dataset


def row_blocks(user: I64) -> I64:
    """Rule `row`: every row is its own block, so a history holds everything liked in the user's earlier rows."""
    return np.arange(len(user), dtype=np.int64)


def fixed_blocks(user: I64, split: NDArray[np.integer], block: int) -> I64:
    """Rule `block`: for each row the first row of its block, [n] int64.

    Rows are sorted by (user, time), `split` is 0 for train, 1 for valid, 2 for test. In train, `block` consecutive
    rows of a user are a block; all rows of a user in valid are one, and all in test. Rows of a block share one
    history, so they share one prompt prefix.
    """
    n = len(user)
    new = np.ones(n, dtype=bool)
    new[1:] = (user[1:] != user[:-1]) | (split[1:] != split[:-1])
    row = np.arange(n, dtype=np.int64)
    start = np.maximum.accumulate(np.where(new, row, 0))
    inside = row - start
    return np.where(split == 0, start + inside // block * block, start).astype(np.int64)


def histories(
    user: I64, item: I64, liked: NDArray[np.bool_], block_start: I64, rows: I64 | None = None
) -> tuple[I64, I64]:
    """The liked items of each row's user before the row's block: (offsets [n + 1], values), both int64.

    Rows are sorted by (user, time); block_start[r] <= r is the first row of r's block. The item of a row of the block
    itself, or of a later row, is never in it. `rows` asks for those rows' histories only.
    """
    n = len(user)
    liked_before = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(liked, out=liked_before[1:])
    new_user = np.ones(n, dtype=bool)
    new_user[1:] = user[1:] != user[:-1]
    user_start = np.maximum.accumulate(np.where(new_user, np.arange(n, dtype=np.int64), 0))
    starts = liked_before[user_start]
    lengths = liked_before[block_start] - starts
    if rows is not None:
        starts, lengths = starts[rows], lengths[rows]
    return gather_spans(item[liked], starts, lengths)


def history_before(dataset: Dataset, uid: Array | list[int], at: Any = None) -> tuple[I64, I64]:
    """What each user liked before a moment: (offsets [n + 1], items), both int64, oldest first.

    Args:
        uid: [n] user ids of the dataset (from `Dataset.user_index`).
        at: one timestamp (seconds) or [n] of them; rows at or after it do not count. None: before the test period,
            that is everything in train and valid.
    Raises: ValueError for a user id outside the table or an `at` of another length.
    """
    uid = np.asarray(uid, dtype=np.int64).reshape(-1)
    bad = (uid < 1) | (uid >= dataset.num_users)
    if bad.any():
        rule = f"user ids in [1, {dataset.num_users - 1}]"
        raise ValueError(f"history_before: expected {rule}, got {uid[bad][0]} in row {int(np.argmax(bad))}")
    names = ("train", "valid") if at is None else ("train", "valid", "test")
    parts = [dataset.splits[name] for name in names]
    user, item, time = (
        np.concatenate([getattr(part, column)[part.label == 1] for part in parts])
        for column in ("uid", "iid", "timestamp")
    )
    order = np.lexsort((time, user))  # stable: ties keep the order of the files
    user, item, time = user[order], item[order], time[order]
    starts = np.searchsorted(user, uid, side="left")
    ends = np.searchsorted(user, uid, side="right")
    if at is not None:
        moment = np.asarray(at)
        if moment.dtype.kind not in "iuf":
            raise ValueError(f"history_before: expected timestamps as numbers of seconds, got {at!r}")
        if moment.ndim > 1 or (moment.ndim == 1 and len(moment) != len(uid)):
            raise ValueError(f"history_before: expected one timestamp or {len(uid)} of them, got {moment.shape}")
        # Within a user the times are sorted: the count of earlier rows is the length of the history.
        earlier = _count_earlier(user, time, uid, np.broadcast_to(moment, uid.shape))
        ends = np.minimum(ends, starts + earlier)
    return gather_spans(item, starts.astype(np.int64), (ends - starts).astype(np.int64))


def _count_earlier(user: I64, time: I64, uid: I64, moment: Array) -> I64:
    """For each (uid, moment) the rows of uid with time < moment; `user` and `time` are sorted by (user, time)."""
    row_user = np.concatenate([user, uid])
    row_time = np.concatenate([time.astype(np.float64), moment.astype(np.float64)])
    # Queries sort before data rows of the same moment, so those rows are not earlier.
    kind = np.concatenate([np.ones(len(user), dtype=np.int8), np.zeros(len(uid), dtype=np.int8)])
    order = np.lexsort((kind, row_time, row_user))
    data_before = np.cumsum(kind[order])
    place = np.empty(len(order), dtype=np.int64)
    place[order] = data_before
    return place[len(user) :] - np.searchsorted(user, uid, side="left")

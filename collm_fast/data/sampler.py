"""Negative items for BPR: uniform over the items a user has not liked, counter-based.

Native in csrc/host/sampler.cpp; here its NumPy twin, which gives the same bits. The loss that uses them is
training/cf.py. Floor F2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from collm_fast import _native
from collm_fast.data.ragged import I64, Array, offsets_of
from collm_fast.reference import philox

# "BPRN": the last counter word, which no other use of a seed shares.
_STREAM = 0x4250524E
# Philox calls (four words each) that may hit positives before the exact draw; the same number stands in sampler.cpp.
_CALLS = 8


@dataclass(frozen=True)
class Positives:
    """The items of each user, sorted and without duplicates: offsets [num_users + 1], items, int64; num_items."""

    offsets: I64
    items: I64
    num_items: int

    @classmethod
    def of(cls, uid: Array, iid: Array, num_users: int, num_items: int) -> Positives:
        """From the (user, item) rows that count as positive; ids start at 1, the table sizes include padding 0."""
        uid, iid = np.asarray(uid, dtype=np.int64), np.asarray(iid, dtype=np.int64)
        for name, ids, size in (("users", uid, num_users), ("items", iid, num_items)):
            bad = (ids < 1) | (ids >= size)
            if bad.any():
                row = int(np.argmax(bad))
                raise ValueError(f"Positives: expected {name} in [1, {size - 1}], got {ids[row]} in row {row}")
        key = np.unique(uid * num_items + iid)
        counts = np.bincount(key // num_items, minlength=num_users)
        return cls(offsets_of(counts), key % num_items, num_items)


def sample_negatives(users: Array, positives: Positives, *, seed: int, epoch: int = 0, first_row: int = 0) -> I64:
    """One item in [1, num_items) for each row, uniform over those that are no positives of the row's user.

    Row r's words are philox(seed; r low, r high | call << 16, epoch, "BPRN") for call = 0, 1, .. with r counted from
    first_row, so the result does not depend on the order, the number of threads, or how the rows are cut into calls.
    A word w stands for item 1 + (w (num_items - 1) >> 32); the first that is no positive is taken. After 8 calls the
    first word of a ninth chooses among the remaining items exactly.

    Args: users: [n] ids; seed: any int64.
    Returns: [n] int64.
    Raises: ValueError for a user out of range or with every item as a positive.
    """
    users = np.ascontiguousarray(users, dtype=np.int64)
    module = _native.C()
    sample = sample_negatives_numpy if module is None else module.sample_negatives
    return sample(users, positives.offsets, positives.items, positives.num_items, seed, epoch, first_row)


def sample_negatives_numpy(
    users: I64, offsets: I64, positives: I64, num_items: int, seed: int, epoch: int, first_row: int
) -> I64:
    """`sample_negatives` in NumPy: the oracle of the native sampler, and what runs without a compiler."""
    _check(users, offsets, positives, num_items, epoch, first_row)
    count = offsets[users + 1] - offsets[users]
    row = np.arange(first_row, first_row + len(users), dtype=np.int64)
    # One sorted key per (user, item): a draw is looked up for all rows at once.
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    keys = owner * num_items + positives
    out = np.zeros(len(users), dtype=np.int64)
    left = np.arange(len(users))
    for call in range(_CALLS):
        words = _words(seed, row[left], call, epoch)
        for column in range(4):
            item = 1 + (words[:, column] * (num_items - 1) >> 32)
            key = users[left] * num_items + item
            place = np.searchsorted(keys, key)
            hit = keys[np.minimum(place, len(keys) - 1)] == key if len(keys) else np.zeros(len(key), dtype=bool)
            out[left[~hit]] = item[~hit]
            left, words = left[hit], words[hit]
    if len(left):
        words = _words(seed, row[left], _CALLS, epoch)
        for place, word in zip(left.tolist(), words[:, 0].tolist(), strict=True):
            item = 1 + (word * (num_items - 1 - int(count[place])) >> 32)
            for positive in positives[offsets[users[place]] : offsets[users[place] + 1]].tolist():
                item += positive <= item
            out[place] = item
    return out


def _words(seed: int, row: I64, call: int, epoch: int) -> NDArray[np.int64]:
    """[n, 4] int64 in [0, 2^32). A product with num_items - 1 < 2^31 stays below 2^63."""
    low, high = torch.from_numpy(row & 0xFFFFFFFF), torch.from_numpy((row >> 32) | (call << 16))
    return philox(seed, low, high, torch.tensor(epoch), torch.tensor(_STREAM)).numpy()


def _check(users: I64, offsets: I64, positives: I64, num_items: int, epoch: int, first_row: int) -> None:
    def fail(rule: str, got: object) -> None:
        raise ValueError(f"sample_negatives: expected {rule}, got {got}")

    num_users, n = len(offsets) - 1, len(users)
    if not 2 <= num_items < 2**31:
        fail(f"num_items in [2, {2**31 - 1}]", num_items)
    if not (0 <= first_row <= 2**48 - n and 0 <= epoch < 2**32):
        fail("first_row and epoch in [0, 2^48 - n] and [0, 2^32)", f"{first_row} and {epoch}")
    if num_users < 0 or offsets[0] != 0 or offsets[-1] != len(positives):
        fail(f"offsets from 0 to {len(positives)}", "others")
    bad = (users < 0) | (users >= num_users)
    if bad.any():
        fail(f"users in [0, {num_users})", f"{users[bad][0]} in row {int(np.argmax(bad))}")
    begin, end = offsets[users], offsets[users + 1]
    if (begin > end).any():
        place = int(np.argmax(begin > end))
        fail("offsets that do not decrease", f"{begin[place]} and {end[place]} for user {users[place]}")
    full = end - begin >= num_items - 1
    if full.any():
        fail(f"an item that user {users[full][0]} has not", f"all {num_items - 1} items as positives")

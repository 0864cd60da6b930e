"""Samples for BPR, uniform over the items a user has not liked, and the distinct nodes that a batch reads.

Counter-based: what is drawn depends on the seed, the epoch and the row's number, never on the number of threads.
Native in csrc/host/sampler.cpp; here the NumPy twins, which give the same bits. The losses that use them are
training/bpr.py and training/cf.py. Floor F2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_fast import _native
from collm_fast.data.ragged import I64, Array, offsets_of
from collm_fast.graph import BipartiteGraph
from collm_fast.reference import philox

# "BPRN" and "BPRT": the last counter words, which no other use of a seed shares.
_STREAM = 0x4250524E
_TRIPLES = 0x42505254
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


@dataclass(frozen=True)
class Batch:
    """What one step reads: rows [R] int64, the distinct nodes, ascending; slots [C, b] int64, the place in `rows` of
    each node of the batch's C columns; counts [R] float32, how often each row occurs in the batch."""

    rows: Tensor
    slots: Tensor
    counts: Tensor


def batches_of(
    nodes: Tensor | I64, num_nodes: int, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The batches of consecutive samples, `batch_size` each and the rest last, in terms of their distinct nodes.

    Args:
        nodes: [C, n] int64 in [0, num_nodes), a sample a column.
        device: where the batches shall be; all of them are copied there at once, so that no step waits for a copy.
    Returns: ceil(n / batch_size) of them; rows[slots] are the batch's nodes.
    Raises: ValueError for another shape or dtype or a node out of range, before the first batch.
    """
    array = np.ascontiguousarray(nodes)
    if array.dtype != np.int64:
        raise ValueError(f"batch_rows: expected nodes in int64, got {array.dtype}")
    module = _native.C()
    if module is None:
        parts = batch_rows_numpy(array, num_nodes, batch_size)
    else:
        parts = module.batch_rows(array, num_nodes, batch_size, torch.get_num_threads())
    slots, rows, counts = (torch.from_numpy(parts[i]).to(device) for i in (0, 2, 3))
    return _batches(slots, parts[1].tolist(), rows, counts, batch_size)


def _batches(slots: Tensor, offsets: list[int], rows: Tensor, counts: Tensor, batch_size: int) -> Iterator[Batch]:
    for number, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        columns = slice(number * batch_size, (number + 1) * batch_size)
        yield Batch(rows[begin:end], slots[:, columns].contiguous(), counts[begin:end])


def batch_rows_numpy(nodes: I64, num_nodes: int, batch_size: int) -> tuple[I64, I64, I64, NDArray[np.float32]]:
    """(slots [C, n], offsets [batches + 1], rows, counts) as `batches_of` cuts them: the oracle of the native form."""
    if nodes.ndim != 2 or not 0 <= num_nodes < 2**31 or batch_size < 1:
        got = f"{nodes.ndim} dimensions, {num_nodes} and {batch_size}"
        raise ValueError(f"batch_rows: expected nodes [C, n], num_nodes in [0, 2^31) and batch_size >= 1, got {got}")
    bad = (nodes < 0) | (nodes >= num_nodes)
    if bad.any():
        row = int(np.argmax(bad.any(0)))
        raise ValueError(
            f"batch_rows: expected nodes in [0, {num_nodes}), got {nodes[bad[:, row], row][0]} in row {row}"
        )
    slots = np.empty_like(nodes)
    rows, counts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.float32)], []
    for begin in range(0, nodes.shape[1], batch_size):
        columns = slice(begin, begin + batch_size)
        distinct, inverse, count = np.unique(nodes[:, columns], return_inverse=True, return_counts=True)
        slots[:, columns] = inverse.reshape(slots[:, columns].shape)
        rows.append(distinct)
        counts.append(count.astype(np.float32))
        lengths.append(len(distinct))
    return slots, offsets_of(np.array(lengths, dtype=np.int64)), np.concatenate(rows), np.concatenate(counts)


def sample_triples(graph: BipartiteGraph, count: int, *, seed: int, epoch: int = 0, first_row: int = 0) -> I64:
    """(user, positive item, negative item) samples as LightGCN's reference code draws them for BPR.

    A user uniformly, with replacement, among those that have a positive and an item that is none; one of its
    positives uniformly; an item uniformly among those that are no positives. So a user with few interactions counts
    as much as one with many, which an epoch over the edges would change.

    Row r's words are philox(seed; r low, r high | call << 16, epoch, "BPRT") for call = 0, 1, .. Word 0 of call 0
    chooses the user, word 1 the positive (w n >> 32 of n), words 2 and 3 and then those of calls 1 to 7 propose
    negatives w num_items >> 32; the first that is no positive is taken. After that the first word of call 8 chooses
    among the remaining items exactly.

    Args:
        graph: the interactions; on the CPU, or it is copied there.
        count: the number of samples; the reference takes as many as there are edges.
        seed, epoch, first_row: any int64, [0, 2^32) and [0, 2^48 - count]. Rows do not depend on how they are cut
            into calls.
    Returns: [3, count] int64: users in [0, num_users), items in [0, num_items).
    Raises: ValueError for numbers out of range or a graph without such a user.
    Source: He et al., LightGCN (SIGIR 2020); the authors' PyTorch code, UniformSample_original.
    """
    crow, col = graph.crow.cpu().numpy(), graph.col.cpu().numpy()
    arguments = (crow, col, graph.num_users, graph.num_items, count, seed, epoch, first_row)
    module = _native.C()
    if module is None:
        return sample_triples_numpy(*arguments)
    triples: I64 = module.sample_triples(*arguments, torch.get_num_threads())
    return triples


def sample_triples_numpy(
    crow: I64,
    col: NDArray[np.int32],
    num_users: int,
    num_items: int,
    count: int,
    seed: int,
    epoch: int,
    first_row: int,
) -> I64:
    """`sample_triples` in NumPy: the oracle of the native sampler, and what runs without a compiler."""
    op = "sample_triples"
    if not (1 <= num_users < len(crow) and num_items >= 1 and num_users + num_items < 2**31 and count >= 0):
        got = f"{num_users}, {num_items} and {count} with {len(crow)} of crow"
        raise ValueError(f"{op}: expected 1 <= num_users < len(crow), num_items >= 1 and count >= 0, got {got}")
    _check_rows(op, first_row, count, epoch)
    begin, end = crow[:num_users], crow[1 : num_users + 1]
    bad = (begin < 0) | (begin > end) | (end > len(col))
    if bad.any():
        user = int(np.argmax(bad))
        got = f"{begin[user]} and {end[user]} for user {user}"
        raise ValueError(f"{op}: expected crow to rise from 0 to {len(col)}, got {got}")
    usable = np.flatnonzero((begin < end) & (end - begin < num_items))
    if not len(usable):
        rule = "a user with a positive and with an item that is none"
        raise ValueError(f"{op}: expected {rule}, got none of {num_users}")
    rows = np.arange(first_row, first_row + count, dtype=np.int64)
    words = _words(seed, rows, 0, epoch, _TRIPLES)
    users = usable[words[:, 0] * len(usable) >> 32]
    positives = col[begin[users] + (words[:, 1] * (end - begin)[users] >> 32)].astype(np.int64) - num_users
    bad = (positives < 0) | (positives >= num_items)
    if bad.any():
        row = int(np.argmax(bad))
        got = f"{positives[row] + num_users} for user {users[row]}"
        rule = f"items of users as nodes in [{num_users}, {num_users + num_items})"
        raise ValueError(f"{op}: expected {rule}, got {got}")
    liked = col[: crow[num_users]].astype(np.int64) - num_users
    negatives = _draw(users, crow[: num_users + 1], liked, (0, num_items), (seed, rows, epoch, _TRIPLES), words[:, 2:])
    return np.stack((users, positives, negatives))


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
    arguments = (users, positives.offsets, positives.items, positives.num_items, seed, epoch, first_row)
    module = _native.C()
    if module is None:
        return sample_negatives_numpy(*arguments)
    items: I64 = module.sample_negatives(*arguments, torch.get_num_threads())
    return items


def sample_negatives_numpy(
    users: I64, offsets: I64, positives: I64, num_items: int, seed: int, epoch: int, first_row: int
) -> I64:
    """`sample_negatives` in NumPy: the oracle of the native sampler, and what runs without a compiler."""
    _check(users, offsets, positives, num_items, epoch, first_row)
    rows = np.arange(first_row, first_row + len(users), dtype=np.int64)
    stream = (seed, rows, epoch, _STREAM)
    return _draw(users, offsets, positives, (1, num_items - 1), stream, _words(seed, rows, 0, epoch, _STREAM))


def _draw(
    users: I64, offsets: I64, positives: I64, items: tuple[int, int], stream: tuple[int, I64, int, int], words: I64
) -> I64:
    """For each row the first item that is no positive of its user; `words` [n, .] are those of call 0."""
    first, size = items
    seed, row, epoch, name = stream
    # One sorted key per (user, item): a draw is looked up for all rows at once.
    keys = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * (first + size) + positives
    out = np.zeros(len(users), dtype=np.int64)
    left = np.arange(len(users))
    for call in range(_CALLS):
        words = words if call == 0 else _words(seed, row[left], call, epoch, name)
        for column in range(words.shape[1]):
            item = first + (words[:, column] * size >> 32)
            key = users[left] * (first + size) + item
            place = np.searchsorted(keys, key)
            hit = keys[np.minimum(place, len(keys) - 1)] == key if len(keys) else np.zeros(len(key), dtype=bool)
            out[left[~hit]] = item[~hit]
            left, words = left[hit], words[hit]
    if len(left):
        count = np.diff(offsets)[users]
        words = _words(seed, row[left], _CALLS, epoch, name)
        for place, word in zip(left.tolist(), words[:, 0].tolist(), strict=True):
            item = first + (word * (size - int(count[place])) >> 32)
            for positive in positives[offsets[users[place]] : offsets[users[place] + 1]].tolist():
                item += positive <= item
            out[place] = item
    return out


def _words(seed: int, row: I64, call: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """[n, 4] int64 in [0, 2^32). A product with num_items - 1 < 2^31 stays below 2^63."""
    low, high = torch.from_numpy(row & 0xFFFFFFFF), torch.from_numpy((row >> 32) | (call << 16))
    return philox(seed, low, high, torch.tensor(epoch), torch.tensor(stream)).numpy()


def _check_rows(op: str, first_row: int, n: int, epoch: int) -> None:
    if not (0 <= first_row <= 2**48 - n and 0 <= epoch < 2**32):
        rule = "first_row and epoch in [0, 2^48 - n] and [0, 2^32)"
        raise ValueError(f"{op}: expected {rule}, got {first_row} and {epoch}")


def _check(users: I64, offsets: I64, positives: I64, num_items: int, epoch: int, first_row: int) -> None:
    def fail(rule: str, got: object) -> None:
        raise ValueError(f"sample_negatives: expected {rule}, got {got}")

    num_users, n = len(offsets) - 1, len(users)
    if not 2 <= num_items < 2**31:
        fail(f"num_items in [2, {2**31 - 1}]", num_items)
    _check_rows("sample_negatives", first_row, n, epoch)
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

"""Full ranking over dot products: the exact top k of every user, and recall, NDCG and precision at k from them.

The users x items score matrix is never held: on a CPU scores live in registers only (csrc/host/ranking.cpp; its twin
`_top_torch`, which also serves GPUs, holds one block). Metrics of scored rows (AUC, UAUC, NDCG over given candidates)
are in metrics.py; ranking by a language model is in rank.py. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_fast import _native

I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

# What the users of one block, their scores and the working memory of the selection may take.
_BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# With so many users at once, putting the items in the order of the native loop costs 1 % of the products.
_HEIGHT = 4096
# Users whose lists are held at once while metrics are summed: 2^20 places.
_PLACES = 1 << 20


def _fail(op: str, rule: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: expected {rule}, got {got}")


@dataclass(frozen=True)
class Lists:
    """A list of distinct items for each user: user u has items[offsets[u]:offsets[u + 1]].

    Fields:
        offsets: [U + 1] int64, from 0 to len(items), not decreasing.
        items: int32 or int64, at least 0, ascending inside a user.
    Raises: ValueError for anything else; `Lists.of` sorts and merges duplicates.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int32] | NDArray[np.int64]

    def __post_init__(self) -> None:
        offsets, items = self.offsets, self.items
        if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets):
            _fail("Lists", "offsets of shape [U + 1], int64", f"{list(offsets.shape)}, {offsets.dtype}")
        if items.ndim != 1 or items.dtype not in (np.int32, np.int64):
            _fail("Lists", "items of shape [n], int32 or int64", f"{list(items.shape)}, {items.dtype}")
        if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
            _fail("Lists", f"offsets from 0 to {len(items)} that do not decrease", "others")
        if len(items) and items.min() < 0:
            _fail("Lists", "items of at least 0", f"{items.min()} at place {items.argmin()}")
        inside = np.ones(max(len(items) - 1, 0), dtype=bool)
        inside[offsets[(offsets > 0) & (offsets < len(items))] - 1] = False
        bad = inside & (items[1:] <= items[:-1])
        if bad.any():
            place = int(bad.argmax())
            _fail("Lists", "items that ascend inside a user", f"{items[place]}, {items[place + 1]} at place {place}")

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, users: Any, items: Any, num_users: int) -> Lists:
        """From (user, item) pairs in any order, arrays or tensors of integers; a pair given twice counts once.

        Raises: ValueError for unequal lengths, another dtype, or an id out of range.
        """
        user, item = _ids("users", users), _ids("items", items)
        if len(user) != len(item):
            _fail("Lists", "users and items of equal length", f"{len(user)} and {len(item)}")
        for name, ids, limit in (("users", user, num_users), ("items", item, 2**31 - 1)):
            bad = (ids < 0) | (ids >= limit)
            if bad.any():
                _fail("Lists", f"{name} in [0, {limit})", f"{ids[bad][0]} in row {int(bad.argmax())}")
        width = int(item.max(initial=0)) + 1
        pair = np.sort(user * width + item)
        pair = pair[np.diff(pair, prepend=-1) > 0]
        offsets = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(pair // width, minlength=num_users), out=offsets[1:])
        return cls(offsets, (pair % width).astype(np.int32))


def _ids(name: str, values: Any) -> I64:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        _fail("Lists", f"{name} of shape [n], integers", f"{list(array.shape)}, {array.dtype}")
    return array.astype(np.int64)


@dataclass(frozen=True)
class RankingMetrics:
    """Means over the users that have a held-out item; nan only if there is none."""

    recall: float
    ndcg: float
    precision: float
    users_counted: int
    users_skipped: int


def top_items(
    user: Tensor, item: Tensor, seen: Lists | None, k: int, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k items with the largest dot product for each user, without the items that the user has seen.

        items[u] = first k of sort(i not in seen[u], by (-user[u] . item[i], i))

    Equal scores: the lower item id comes first, wherever block borders fall. Scores are float32 (float64 for float64
    tables; bfloat16 and float16 tables are widened first, exactly), and no result depends on the number of threads.
    The compiled CPU loop sums a score in the order of d with fused multiply-adds, so there its bits depend on neither
    the block nor the processor; elsewhere they are a matrix product's. It stops for a user once no item left is long
    enough to enter the list (|u . i| <= |u| |i|): of LightGCN's scores on Gowalla about a tenth are then computed.

    Memory beside input and output: in the compiled loop block (D + 4 k + 32) scores a thread, as much again for the
    users' rows, 24 bytes an item, and half-precision items widened; elsewhere block x items at once x (score + 7
    bytes). The default block keeps each to 64 MB on a CPU and 512 MB on a GPU, whatever U and I.

    Args:
        user: [U, D]; item: [I, D]: floating, one dtype, one device. Their dot products must not be able to overflow.
        seen: the items to leave out; None for none.
        k: length of a list; a user with fewer candidates ends with item -1 and score -inf.
        block: users scored at once; the default follows from the memory.
    Returns: (items [U, k] int64, scores [U, k]) on the device of `user`.
    Raises: ValueError for other shapes, dtypes, devices, ids out of range, or a table with a nan or an infinity.
    """
    _check_tables("top_items", user, item, block)
    _check_k("top_items", k)
    if seen is not None:
        _check_lists("top_items", "seen", seen, user, item)
    with torch.no_grad():
        return _top(user, item, seen, np.arange(len(user)), k, block)


def full_ranking(
    user: Tensor,
    item: Tensor,
    seen: Lists,
    held_out: Lists,
    *,
    k: int | Sequence[int] = 20,
    block: int | None = None,
) -> dict[int, RankingMetrics]:
    """Recall, NDCG and precision at k of the ranking of all items that a user has not seen, in one pass for every k.

        hit[r]    = 1 if the item at rank r = 1, 2, .. is in held_out[u], else 0
        recall    = mean_u sum_{r <= k} hit[r] / |held_out[u]|
        precision = mean_u sum_{r <= k} hit[r] / k
        ndcg      = mean_u (sum_{r <= k} hit[r] / log2(r + 1)) / (sum_{r <= min(k, |held_out[u]|)} 1 / log2(r + 1))

    The means are over the users with at least one held-out item; the others are counted as skipped. A held-out item
    that is in `seen` as well counts in |held_out[u]| and can never be hit. Places that no candidate fills are misses.
    Order and ties are those of `top_items`, its memory too, and 2^20 list places.

    Args:
        user: [U, D]; item: [I, D]; block: as for `top_items`.
        seen, held_out: the items of each user; `seen` is left out of the ranking.
        k: one cut-off or several.
    Returns: {k: RankingMetrics}, in the order given.
    Raises: ValueError as `top_items`.
    Source: He et al., LightGCN (arXiv 2002.02126), section 4.1, and the evaluation of its authors' PyTorch code.
    """
    _check_tables("full_ranking", user, item, block)
    cutoffs = list(k) if isinstance(k, Sequence) else [k]
    if not cutoffs:
        _fail("full_ranking", "at least one k", "none")
    for cutoff in cutoffs:
        _check_k("full_ranking", cutoff)
    _check_lists("full_ranking", "seen", seen, user, item)
    _check_lists("full_ranking", "held_out", held_out, user, item)
    longest = max(cutoffs)
    lengths = np.diff(held_out.offsets)
    users = np.flatnonzero(lengths)
    discount = 1.0 / np.log2(np.arange(2, longest + 2))
    ideal = np.concatenate(([0.0], np.cumsum(discount)))
    total = {cutoff: np.zeros(3) for cutoff in cutoffs}
    step = max(1, _PLACES // longest)
    for begin in range(0, len(users), step):
        rows = users[begin : begin + step]
        with torch.no_grad():
            items, _ = _top(user, item, seen, rows, longest, block)
            hits = _hits(items, held_out, rows, len(item))
        for cutoff in cutoffs:
            hit = hits[:, :cutoff]
            count = hit.sum(axis=1)
            gain = (hit * discount[:cutoff]).sum(axis=1) / ideal[np.minimum(lengths[rows], cutoff)]
            total[cutoff] += (count / lengths[rows]).sum(), gain.sum(), (count / cutoff).sum()
    result = {}
    for cutoff in cutoffs:
        recall, ndcg, precision = (total[cutoff] / len(users)).tolist() if len(users) else [float("nan")] * 3
        result[cutoff] = RankingMetrics(recall, ndcg, precision, len(users), len(lengths) - len(users))
    return result


def _hits(items: Tensor, held_out: Lists, rows: I64, num_items: int) -> Bool:
    """Which places of the lists [n, k] of the users `rows` hold an item of held_out."""
    owner, kept = _entries(held_out, rows)
    # One ascending key a pair (user, item): all places are looked up at once.
    held = torch.from_numpy(owner * num_items + kept).to(items.device)
    key = torch.arange(len(items), device=items.device)[:, None] * num_items + items
    place = torch.searchsorted(held, key).clamp_(max=len(held) - 1)
    # An empty place, item -1, has the key of the user before.
    return ((held[place] == key) & (items >= 0)).cpu().numpy()


def _entries(lists: Lists, rows: I64) -> tuple[I64, I64]:
    """The pairs (position in `rows`, item) of these users, user by user."""
    lengths = lists.offsets[rows + 1] - lists.offsets[rows]
    owner = np.repeat(np.arange(len(rows)), lengths)
    first = lists.offsets[rows] - (np.cumsum(lengths) - lengths)
    return owner, lists.items[np.arange(len(owner)) + first[owner]].astype(np.int64)


def _top(user: Tensor, item: Tensor, seen: Lists | None, rows: I64, k: int, block: int | None) -> tuple[Tensor, Tensor]:
    """`top_items` of the users `rows`; arguments are checked."""
    module = _native.C()
    if module is None or user.device.type != "cpu":
        return _top_torch(user, item, seen, rows, k, block)
    dtype = torch.float64 if user.dtype == torch.float64 else torch.float32
    row_bytes, threads = user.shape[1] * dtype.itemsize, torch.get_num_threads()
    # A user takes a packed row and room for 2 k + 16 pairs of score and item.
    height = block or max(
        1, min(_HEIGHT, _BLOCK_BYTES["cpu"] // (threads * (row_bytes + (4 * k + 32) * dtype.itemsize)))
    )
    items = torch.empty(len(rows), k, dtype=torch.int64)
    scores = torch.empty(len(rows), k, dtype=dtype)
    right = item.detach().to(dtype).contiguous().numpy()
    left_out = np.zeros(0, dtype=np.int32) if seen is None else seen.items.astype(np.int32, copy=False)
    step = max(height, _BLOCK_BYTES["cpu"] // max(1, row_bytes))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        left = user.detach()[torch.from_numpy(part)].to(dtype).numpy()
        begin, end = (part * 0, part * 0) if seen is None else (seen.offsets[part], seen.offsets[part + 1])
        found, best = module.top_items(left, right, begin, end, left_out, k, height, threads)
        items[first : first + step], scores[first : first + step] = torch.from_numpy(found), torch.from_numpy(best)
    return items, scores


def _top_torch(
    user: Tensor, item: Tensor, seen: Lists | None, rows: I64, k: int, block: int | None
) -> tuple[Tensor, Tensor]:
    """Blocks of scores by one matrix product each, and the best of each merged with the best so far."""
    dtype = torch.float64 if user.dtype == torch.float64 else torch.float32
    items = torch.full((len(rows), k), -1, dtype=torch.int64, device=user.device)
    scores = torch.full((len(rows), k), -torch.inf, dtype=dtype, device=user.device)
    # A score, two comparisons and their combination (1 byte each), a count (4): what a cell of a block takes.
    cell, budget = dtype.itemsize + 7, _BLOCK_BYTES[user.device.type]
    columns = min(len(item), max(1, budget // (cell * (block or 64))))
    height = block or max(1, budget // (cell * max(1, columns)))
    for begin in range(0, len(rows), height):
        part = rows[begin : begin + height]
        left = user[torch.from_numpy(part).to(user.device)].to(dtype)
        owner, masked = _entries(seen, part) if seen is not None else (part[:0], part[:0])
        best = torch.empty(len(part), 0, dtype=dtype, device=user.device)
        ids = torch.empty(len(part), 0, dtype=torch.int64, device=user.device)
        for first in range(0, len(item), max(1, columns)):
            block_scores = left @ item[first : first + columns].to(dtype).T
            inside = (masked >= first) & (masked < first + columns)
            cells = np.stack((owner[inside], masked[inside] - first))
            where = torch.from_numpy(cells).to(user.device)
            block_scores[where[0], where[1]] = -torch.inf
            chosen, values = _select(block_scores, k)
            # Ids of earlier blocks are lower and stand first, so the stable order keeps the rule for ties.
            best, order = torch.cat((best, values), 1).sort(dim=1, descending=True, stable=True)
            ids = torch.cat((ids, chosen + first), 1).gather(1, order[:, :k])
            best = best[:, :k]
        width = best.shape[1]
        scores[begin : begin + height, :width] = best
        # Every score of a candidate is finite: only what was masked is -inf.
        items[begin : begin + height, :width] = torch.where(best > -torch.inf, ids, -1)
    return items, scores


def _select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns and values of the min(k, n) largest of each row of [B, n], descending; equal values by column."""
    size = min(k, scores.shape[1])
    # topk leaves open which of several equal scores it takes, so it only gives the smallest value that belongs.
    smallest = scores.topk(size, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    keep, equal = scores > smallest, scores == smallest
    free = size - keep.sum(dim=1, keepdim=True, dtype=torch.int32)
    keep |= equal & (equal.cumsum(dim=1, dtype=torch.int32) <= free)
    columns = keep.nonzero()[:, 1].reshape(len(scores), size)
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values


def _check_k(op: str, k: object) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        _fail(op, "k to be an integer of at least 1", repr(k))


def _check_lists(op: str, name: str, lists: Lists, user: Tensor, item: Tensor) -> None:
    if lists.num_users != len(user):
        _fail(op, f"{name} of {len(user)} users, as the table has", lists.num_users)
    if len(lists.items) and lists.items.max() >= len(item):
        _fail(op, f"items of {name} in [0, {len(item)})", lists.items.max())


def _check_tables(op: str, user: Tensor, item: Tensor, block: int | None) -> None:
    for name, table in (("user", user), ("item", item)):
        if table.dim() != 2 or not table.is_floating_point():
            _fail(op, f"{name} of shape [n, D], floating", f"{list(table.shape)}, {table.dtype}")
    if user.shape[1] != item.shape[1] or user.dtype != item.dtype or user.device != item.device:
        got = (f"{list(table.shape)}, {table.dtype}, {table.device}" for table in (user, item))
        _fail(op, "user and item of one width, dtype and device", " and ".join(got))
    if user.device.type not in _BLOCK_BYTES:
        _fail(op, "tables on a CPU or a CUDA device", user.device)
    if len(item) >= 2**31:
        _fail(op, "fewer than 2^31 items", len(item))
    if block is not None and (not isinstance(block, int) or block < 1):
        _fail(op, "block to be an integer of at least 1", repr(block))
    largest = []
    for name, table in (("user", user), ("item", item)):
        # Without copies of the tables; a nan comes through.
        low, high = table.detach().aminmax() if table.numel() else (torch.zeros(()), torch.zeros(()))
        bound = max(-float(low), float(high))
        if not np.isfinite(bound) or np.isnan(float(low)):
            row = int((~table.isfinite()).any(dim=1).int().argmax())
            _fail(op, f"finite {name} embeddings", f"another number in row {row}")
        largest.append(bound)
    # Then no score, and no part of its sum, is infinite or nan, and -inf can mark what is left out.
    bound = max(1, user.shape[1]) * largest[0] * largest[1]
    limit = torch.finfo(torch.float64 if user.dtype == torch.float64 else torch.float32).max
    if bound > limit:
        _fail(op, f"D max|user| max|item| of at most {limit:.3g}, so that no score overflows", f"{bound:.3g}")

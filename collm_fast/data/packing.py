"""Batches of prompts as packed trees: rows of one (user, history) share their common prefix, and nothing is padded.

Which rows form a batch is `batches`, the layout of its tokens is `plan_tree` (native in csrc/host/planner.cpp, here
its NumPy twin), and `pack` adds the distinct collaborative rows to look up. Attention is models/attention.py. Floor F2.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_fast import _native
from collm_fast.data.prompts import TARGET, TEXT, USER, Prompts
from collm_fast.data.ragged import I64, Array, offsets_of, spans
from collm_fast.data.transfer import on_device

Order = Literal["group", "random", "flat"]
Plan = tuple[I64, I64, NDArray[np.int32], NDArray[np.int32], I64]
# How far `batches` looks ahead for a group that fits into the room left in a batch.
_LOOK_AHEAD = 64


@dataclass
class PackedBatch:
    """One packed batch: T tokens, B rows, S distinct slots.

    token_ids [T] int64 (0 at slots); position_ids [T] int64; row_index [T] int32: -1 for text, else
    slot * tokens_per_id + part; tree [T] int32: the token's prompt tree; branch [T] int32: -1 for a tree's shared
    prefix, else the row (0..B-1) whose own token it is; answer [B] int64: the place in T of each row's last token;
    label [B] float32; row [B] int64: the row in Prompts; slot_role [S] uint8: 1 user, 2 or 3 item; slot_id [S] int64:
    the user or item id; slot_pair [S, 2] int64: (user, 0) of a user, (0, item) of an item, (user, item) of a target
    item when it was packed with pairs=True.
    """

    token_ids: Tensor
    position_ids: Tensor
    row_index: Tensor
    tree: Tensor
    branch: Tensor
    answer: Tensor
    label: Tensor
    row: Tensor
    slot_role: Tensor
    slot_id: Tensor
    slot_pair: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(*(on_device(getattr(self, field.name), device) for field in fields(self)))

    def mask(self) -> Tensor:
        """[T, T] bool: whether token t (row) sees token s (column).

        visible(t, s) = tree[s] == tree[t] and s <= t and (branch[s] == -1 or branch[s] == branch[t])
        """
        tree, branch, place = self.tree, self.branch, torch.arange(len(self.tree), device=self.tree.device)
        same_tree, earlier = tree[:, None] == tree[None, :], place[:, None] >= place[None, :]
        return same_tree & earlier & ((branch[None, :] == -1) | (branch[:, None] == branch[None, :]))


def pack(prompts: Prompts, rows: Array, *, share_prefix: bool = True, pairs: bool = False) -> PackedBatch:
    """Lay out the prompts of `rows` [B] (positions in `prompts`) as one packed batch.

    With share_prefix, rows of one group form a tree: their longest common prefix once, then each row's own tokens.
    Without it every row is a tree of its own. With pairs, a target item's slot is distinct for every (user, item).
    Trees come in the order of their first row, branches in the order of the rows.
    """
    rows = np.ascontiguousarray(rows, dtype=np.int64)
    group = prompts.group if share_prefix else np.arange(len(prompts), dtype=np.int64)
    source, position, tree, branch, answer = plan_tree(
        prompts.offsets, prompts.token_ids, prompts.slot_role, prompts.slot_id, group, rows
    )
    row_index, slot_role, slot_id, slot_pair = _slots(prompts, source, pairs)
    return PackedBatch(
        torch.from_numpy(prompts.token_ids[source].astype(np.int64)),
        torch.from_numpy(position),
        torch.from_numpy(row_index),
        torch.from_numpy(tree),
        torch.from_numpy(branch),
        torch.from_numpy(answer),
        torch.from_numpy(prompts.label[rows].astype(np.float32)),
        torch.from_numpy(rows.copy()),
        torch.from_numpy(slot_role),
        torch.from_numpy(slot_id),
        torch.from_numpy(slot_pair),
    )


def _slots(
    prompts: Prompts, source: I64, pairs: bool
) -> tuple[NDArray[np.int32], NDArray[np.uint8], I64, NDArray[np.int64]]:
    """(row_index [T], slot_role [S], slot_id [S], slot_pair [S, 2]); slots sorted by (is an item, user, item)."""
    role = prompts.slot_role[source]
    place = np.flatnonzero(role != TEXT)
    row_index = np.full(len(source), -1, dtype=np.int32)
    role, ident = role[place], prompts.slot_id[source[place]].astype(np.int64)
    is_user, is_pair = role == USER, (role == TARGET) & pairs
    # The prompt that a source position belongs to names the user of a pair.
    owner = prompts.uid[np.searchsorted(prompts.offsets, source[place], side="right") - 1]
    user = np.where(is_user, ident, np.where(is_pair, owner, 0))
    item = np.where(is_user, 0, ident)
    key = np.stack([~is_user, user, item], axis=1).astype(np.int64)
    distinct, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    part = prompts.slot_part[source[place]].astype(np.int64)
    row_index[place] = inverse.reshape(-1) * prompts.tokens_per_id + part
    return row_index, role[first], ident[first], np.ascontiguousarray(distinct[:, 1:])


def plan_tree(
    offsets: I64,
    token_ids: NDArray[np.int32],
    slot_role: NDArray[np.uint8],
    slot_id: NDArray[np.int32],
    group: I64,
    rows: I64,
) -> Plan:
    """The layout of a packed batch: (source, position, tree, branch, answer).

    source [T] int64: the place in the flat prompts; position [T] int64 from 0 in each row; tree and branch [T] int32
    and answer [B] int64 as in `PackedBatch`. A tree's prefix is the longest common prefix of its rows, but at most
    one token less than its shortest row, so every row keeps its answer position.

    Raises: ValueError for arrays of unequal lengths, a row out of range, or a row without tokens.
    """
    module = _native.C()
    plan = plan_tree_numpy if module is None else module.plan_tree
    return plan(offsets, token_ids, slot_role, slot_id, group, rows)


def plan_tree_numpy(
    offsets: I64,
    token_ids: NDArray[np.int32],
    slot_role: NDArray[np.uint8],
    slot_id: NDArray[np.int32],
    group: I64,
    rows: I64,
) -> Plan:
    """`plan_tree` in NumPy: the oracle of the native planner, and what runs without a compiler."""
    _check_plan(offsets, token_ids, slot_role, slot_id, group, rows)
    first: dict[int, int] = {}  # group -> the number of its tree
    members: list[list[int]] = []
    for b, row in enumerate(rows.tolist()):
        number = first.setdefault(int(group[row]), len(first))
        if number == len(members):
            members.append([])
        members[number].append(b)
    source, position, tree, branch = [], [], [], []
    answer = np.zeros(len(rows), dtype=np.int64)
    total = 0
    for number, branches in enumerate(members):
        starts, ends = offsets[rows[branches]], offsets[rows[branches] + 1]
        prefix = int((ends - starts).min()) - 1
        for start in starts[1:]:
            here, there = slice(starts[0], starts[0] + prefix), slice(start, start + prefix)
            same = token_ids[here] == token_ids[there]
            same &= (slot_role[here] == slot_role[there]) & (slot_id[here] == slot_id[there])
            prefix = prefix if same.all() else int(np.argmin(same))
        for b, start, end in zip(
            [-1, *branches], [starts[0], *(starts + prefix)], [starts[0] + prefix, *ends], strict=True
        ):
            length = int(end - start)
            source.append(np.arange(start, end, dtype=np.int64))
            position.append(np.arange(length, dtype=np.int64) + (0 if b < 0 else prefix))
            tree.append(np.full(length, number, dtype=np.int32))
            branch.append(np.full(length, b, dtype=np.int32))
            total += length
            if b >= 0:
                answer[b] = total - 1
    if not source:
        none32 = np.zeros(0, dtype=np.int32)
        return answer, answer.copy(), none32, none32.copy(), answer.copy()
    return (*map(np.concatenate, (source, position, tree, branch)), answer)  # type: ignore[return-value]


def _check_plan(
    offsets: I64,
    token_ids: NDArray[np.int32],
    slot_role: NDArray[np.uint8],
    slot_id: NDArray[np.int32],
    group: I64,
    rows: I64,
) -> None:
    total, n = len(token_ids), len(group)
    if len(slot_role) != total or len(slot_id) != total:
        got = f"{total}, {len(slot_role)} and {len(slot_id)}"
        raise ValueError(f"plan_tree: expected token_ids, slot_role and slot_id of one length, got {got}")
    if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != total:
        rule = f"{n + 1} offsets from 0 to {total}"
        raise ValueError(f"plan_tree: expected {rule}, got {len(offsets)} from {offsets[:1]} to {offsets[-1:]}")
    for row in rows.tolist():
        if not 0 <= row < n:
            raise ValueError(f"plan_tree: expected rows in [0, {n}), got {row}")
        if not 0 <= offsets[row] < offsets[row + 1] <= total:
            raise ValueError(f"plan_tree: expected at least one token in every row, got none in row {row}")


def batches(
    prompts: Prompts,
    *,
    order: Order,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    group_rows: int | None = None,
    generator: np.random.Generator | None = None,
    rows: Array | None = None,
) -> list[I64]:
    """The rows of each batch of one pass; every row of `rows` (default: all) comes exactly once.

    group: rows of one (user, history) stay together, whole where they fit; the groups are shuffled by `generator`, or
    keep the order of their first rows without one. `group_rows` cuts them first into pieces of so many rows, which are
    shuffled as if they were groups: more users in a batch, and the prefix once more for each piece.
    random: a permutation, as the paper trains. flat: as they are.
    A batch has at most `batch_size` rows and at most `max_tokens` packed tokens (with shared prefixes in order
    "group"); a single row longer than `max_tokens` is a batch of its own. Equal generators give equal batches.

    Raises: ValueError without any limit, for group_rows below 1, for order "random" without a generator, or for rows
        out of range.
    """
    limits = [limit for limit in (batch_size, max_tokens) if limit is not None]
    if not limits or min(limits) < 1:
        raise ValueError(f"batches: expected batch_size or max_tokens of at least 1, got {batch_size} and {max_tokens}")
    if group_rows is not None and group_rows < 1:
        raise ValueError(f"batches: expected group_rows of at least 1, got {group_rows}")
    wanted = np.arange(len(prompts), dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
    if ((wanted < 0) | (wanted >= len(prompts))).any():
        bad = wanted[(wanted < 0) | (wanted >= len(prompts))][0]
        raise ValueError(f"batches: expected rows in [0, {len(prompts)}), got {bad}")
    lengths = np.diff(prompts.offsets)[wanted]
    size, room = batch_size or len(wanted) + 1, max_tokens or int(lengths.sum()) + 1
    if order == "group":
        pieces = _pieces(prompts, wanted, min(size, group_rows or size), room)
        return _group_batches(pieces, size, room, generator)
    if order == "random":
        if generator is None:
            raise ValueError("batches: expected a generator for order 'random', got None")
        shuffle = generator.permutation(len(wanted))
        wanted, lengths = wanted[shuffle], lengths[shuffle]
    elif order != "flat":
        raise ValueError(f"batches: expected order group, random or flat, got {order!r}")
    out, start, tokens = [], 0, 0
    for place, length in enumerate(lengths.tolist()):
        if place > start and (place - start == size or tokens + length > room):
            out.append(wanted[start:place])
            start, tokens = place, 0
        tokens += length
    return [*out, wanted[start:]] if len(wanted) else []


def _group_batches(
    pieces: list[tuple[I64, int]], size: int, room: int, generator: np.random.Generator | None
) -> list[I64]:
    if generator is not None:
        pieces = [pieces[place] for place in generator.permutation(len(pieces))]
    out: list[I64] = []
    waiting = list(reversed(pieces))  # the next piece is the last
    while waiting:
        batch: list[I64] = []
        count = tokens = 0
        while waiting and count < size:
            for back in range(1, min(_LOOK_AHEAD, len(waiting)) + 1):
                rows, cost = waiting[-back]
                if count + len(rows) <= size and tokens + cost <= room or not batch:
                    del waiting[-back]
                    break
            else:
                rows, cost = waiting[-1]
                # No piece fits whole. Within a token limit the batch is done; else the next one fills it up.
                if tokens + cost > room:
                    break
                waiting[-1] = (rows[size - count :], cost)
                rows = rows[: size - count]
            batch.append(rows)
            count, tokens = count + len(rows), tokens + cost
        out.append(np.concatenate(batch))
    return out


def _pieces(prompts: Prompts, wanted: I64, size: int, room: int) -> list[tuple[I64, int]]:
    """Groups in the order of their first rows, cut to at most `size` rows and `room` tokens: (rows, packed tokens)."""
    if len(wanted) == 0:
        return []
    _, first, inverse = np.unique(prompts.group[wanted], return_index=True, return_inverse=True)
    ordered = wanted[np.argsort(first[inverse.reshape(-1)], kind="stable")]
    group = prompts.group[ordered]
    new = np.append(True, group[1:] != group[:-1])
    common = common_prefix(prompts, ordered, ordered[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))])
    lengths = np.diff(prompts.offsets)[ordered]
    out: list[tuple[I64, int]] = []
    start, prefix, total = 0, 0, 0

    def cost() -> int:
        return int(total - prefix * (place - start - 1))

    for place, (is_new, length, shared) in enumerate(zip(new.tolist(), lengths.tolist(), common.tolist(), strict=True)):
        longer = total + length - min(prefix, shared) * (place - start)
        if place > start and (is_new or place - start == size or longer > room):
            out.append((ordered[start:place], cost()))
            start, prefix, total = place, length, 0
        prefix = min(prefix, shared) if place > start else shared
        total += length
    place = len(ordered)
    out.append((ordered[start:], cost()))
    return out


def common_prefix(prompts: Prompts, rows: I64, others: I64) -> I64:
    """[n] int64: how many tokens rows[i] and others[i] begin with alike, at most one less than the shorter has."""
    start, other = prompts.offsets[rows], prompts.offsets[others]
    lengths = np.minimum(prompts.offsets[rows + 1] - start, prompts.offsets[others + 1] - other) - 1
    out: I64 = lengths.copy()
    # A bounded number of tokens at a time: a whole split would make arrays of hundreds of megabytes.
    for begin in range(0, len(rows), 4096):
        part = slice(begin, begin + 4096)
        here, there = spans(start[part], lengths[part]), spans(other[part], lengths[part])
        differ = prompts.token_ids[here] != prompts.token_ids[there]
        differ |= prompts.slot_id[here] != prompts.slot_id[there]
        differ |= prompts.slot_role[here] != prompts.slot_role[there]
        places = np.flatnonzero(differ)
        bounds = offsets_of(lengths[part])
        row = np.searchsorted(bounds, places, side="right") - 1
        row, first = np.unique(row, return_index=True)
        out[begin + row] = places[first] - bounds[row]
    return out

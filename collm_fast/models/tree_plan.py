"""Where the trees of a packed axis lie: their pieces, what attention calls they take, and the masks of these.

A tree is a shared prefix followed by branches, and each branch sees the prefix and itself. Packing lives in
`collm_fast.data.packing`, whose `tree` and `branch` vectors are read here; attention itself is models/attention.py.
Floor F2.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.data.transfer import on_device
from collm_fast.models import flex

# What computes an attention call: `attention.kernel_of` has the rule.
Kernel = Literal["paths", "flex", "fused"]


class Piece(NamedTuple):
    """A tree's shared prefix or one of its branches: `past` tokens whose keys are given, then `own` new ones.

    The last `asked` of the new ones have queries.
    """

    past: int
    own: int
    asked: int


class Call(NamedTuple):
    """One attention call: the pieces of its queries, and its keys as places in the splits of past and own tokens."""

    pieces: tuple[Piece, ...]
    keys: tuple[tuple[bool, int], ...]  # (whether it is past, its place in that split), in the order of the axis
    masked: bool  # more than one branch: needs the mask of its tree


class TreePlan:
    """Where the pieces of a packed axis lie, and the masks its attention calls share across layers.

    Args:
        tree:       [T] int, the tree of each token; the tokens of a tree are contiguous.
        branch:     [T] int, -1 in the shared prefix (which comes first in its tree), else the branch.
        per_branch: True: one call for prefix and first branch, one for each further branch (least arithmetic, and so
                    for CPUs). False: one masked call a tree (fewest launches, and so for GPUs).
    Attributes:
        trees: the pieces of each tree, its prefix first (of no tokens where a tree has none).
        kernel: what its last attention call was computed by, None before the first.
    Raises: ValueError where a tree or a branch is not contiguous, or a prefix token stands behind a branch.
    """

    def __init__(self, tree: np.ndarray, branch: np.ndarray, *, per_branch: bool) -> None:
        if tree.shape != branch.shape or tree.ndim != 1 or tree.size == 0:
            got = f"{tree.shape}, {branch.shape}"
            raise ValueError(f"tree_attention: expected tree and branch of one shape [T], got {got}")
        cut = np.flatnonzero((np.diff(tree) != 0) | (np.diff(branch) != 0)) + 1
        start = np.concatenate(([0], cut))
        length = np.diff(np.concatenate((start, [tree.size])))
        pieces = np.stack((tree[start], branch[start]), axis=1)
        first = np.concatenate(([True], pieces[1:, 0] != pieces[:-1, 0]))
        if len(np.unique(pieces, axis=0)) != len(pieces) or first.sum() != len(np.unique(tree)):
            raise ValueError("tree_attention: expected every tree and branch in one contiguous run, got a broken one")
        if (pieces[~first, 1] < 0).any():
            raise ValueError("tree_attention: expected a prefix before the branches of its tree, got one behind them")
        self.trees: list[list[Piece]] = []
        for is_first, (_, piece_branch), size in zip(first, pieces.tolist(), length.tolist(), strict=True):
            if is_first:
                self.trees.append([] if piece_branch < 0 else [Piece(0, 0, 0)])
            self.trees[-1].append(Piece(0, size, size))
        self.per_branch = per_branch
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._calls: tuple[list[int], list[int], list[int], list[Call]] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._block_masks: dict[tuple[int | None, torch.device], flex.Mask] = {}
        self._answers: TreePlan | None = None
        self._ends: Tensor | None = None
        self.kernel: Kernel | None = None

    def _with(self, trees: list[list[Piece]]) -> TreePlan:
        """Other pieces, the same masks."""
        other = copy.copy(self)
        other.trees, other._calls, other._tables, other._block_masks, other.kernel = trees, None, None, {}, None
        other._answers = other._ends = None
        return other

    def answers(self) -> TreePlan:
        """The same keys, but only the last token of every branch has a query; the same plan in every call."""
        if self._answers is None:
            asked = [[p._replace(asked=int(i > 0)) for i, p in enumerate(tree)] for tree in self.trees]
            self._answers = self._with(asked)
        return self._answers

    def with_filler(self, tokens: int) -> TreePlan:
        """This plan and behind it a tree of a prefix alone, so many tokens that nobody reads."""
        return self._with([*self.trees, [Piece(0, tokens, tokens)]])

    def split(self, cut: list[list[int]]) -> tuple[TreePlan, TreePlan]:
        """(head, tail): the first cut[t][j] tokens of piece j of tree t, and the rest, to which these are past.

        Where a prefix is cut before its end its branches must be whole tails: their keys would not be consecutive.
        """
        pairs = [list(zip(tree, sizes, strict=True)) for tree, sizes in zip(self.trees, cut, strict=True)]
        head = self._with([[Piece(0, size, size) for _, size in tree] for tree in pairs])
        tail = self._with([[Piece(size, p.own - size, p.own - size) for p, size in tree] for tree in pairs])
        return head, tail

    def only(self, index: int) -> TreePlan:
        """One of the trees."""
        return self._with([self.trees[index]])

    def ends(self) -> NDArray[np.int64]:
        """[branches] the place of each branch's last token among the plan's own tokens."""
        ends = np.cumsum([piece.own for tree in self.trees for piece in tree])
        is_branch = np.array([j > 0 for tree in self.trees for j in range(len(tree))])
        places: NDArray[np.int64] = ends[is_branch] - 1
        return places

    def ends_on(self, device: torch.device) -> Tensor:
        """`ends` on the device, moved once."""
        if self._ends is None:
            self._ends = on_device(torch.from_numpy(self.ends()), device)
        return self._ends

    def own_places(self, cut: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places of the tokens of `split`'s head and tail among the plan's own tokens."""
        own = [piece.own for tree in self.trees for piece in tree]
        first = [size for sizes in cut for size in sizes]
        counts = [n for size, total in zip(first, own, strict=True) for n in (size, total - size)]
        is_head = np.repeat(np.tile([True, False], len(own)), counts)
        return np.flatnonzero(is_head), np.flatnonzero(~is_head)

    def tables(self) -> tuple[Tensor, Tensor]:
        """The pieces [N, 3] and their number in each tree, as `path_attention` reads them; the same for every layer."""
        if self._tables is None:
            pieces = torch.tensor([piece for tree in self.trees for piece in tree])
            self._tables = pieces, torch.tensor([len(tree) for tree in self.trees])
        return self._tables

    def block_mask(self, window: int | None, device: torch.device) -> flex.Mask:
        """FlexAttention's mask, the same for every layer with this window."""
        if (window, device) not in self._block_masks:
            self._block_masks[window, device] = flex.block_mask(flex.axes(self.trees), window, device)
        return self._block_masks[window, device]

    def calls(self) -> tuple[list[int], list[int], list[int], list[Call]]:
        """(split of the queries, of the past keys, of the own keys, the calls), the same for every layer."""
        if self._calls is None:
            self._calls = self._make_calls()
        return self._calls

    def _make_calls(self) -> tuple[list[int], list[int], list[int], list[Call]]:
        queries: list[int] = []
        sizes: tuple[list[int], list[int]] = ([], [])  # own, past
        calls: list[Call] = []

        def keys(pieces: list[Piece]) -> list[tuple[bool, int]]:
            found = []
            for past, size in ((past, p[not past]) for p in pieces for past in (True, False)):
                if size:
                    found.append((past, len(sizes[past])))
                    sizes[past].append(size)
            return found

        for tree in self.trees:
            # One query a branch: all keys once cost less than the prefix for each branch.
            few = sum(p.asked for p in tree) < len(tree)
            if len(tree) > 2 and self.per_branch and not few:
                prefix = keys(tree[:1])
                for j, piece in enumerate(tree[1:]):
                    part = (*tree[:1], piece) if j == 0 else (tree[0]._replace(asked=0), piece)
                    calls.append(Call(part, (*prefix, *keys([piece])), False))
            elif any(p.past for p in tree):
                calls.append(Call(tuple(tree), tuple(keys(tree)), len(tree) > 2))
            else:
                total = sum(p.own for p in tree)
                calls.append(Call(tuple(tree), tuple(keys([Piece(0, total, 0)])), len(tree) > 2))
        calls = [call for call in calls if any(p.asked for p in call.pieces)]
        queries = [sum(p.asked for p in call.pieces) for call in calls]
        return queries, sizes[True], sizes[False], calls

    def mask(self, call: Call, window: int | None, like: Tensor) -> Tensor | None:
        """[q, k] additive mask of a call, 0 where visible and -inf elsewhere; None where every query sees every key."""
        q_length = sum(p.asked for p in call.pieces)
        k_length = sum(p.past + p.own for p in call.pieces)
        if not call.masked:
            window = None if window is None or k_length <= window else window
            if q_length == 1 and window is None:
                return None
        key = (call.pieces if call.masked else (q_length, k_length), window, like.dtype)
        if key not in self._masks:
            if call.masked:
                visible = _tree_mask(call.pieces, window)
            else:
                q, k = torch.arange(k_length - q_length, k_length)[:, None], torch.arange(k_length)[None, :]
                visible = k <= q if window is None else (k <= q) & (k > q - window)
            self._masks[key] = _additive(visible, like)
        return self._masks[key]


def _tree_mask(pieces: tuple[Piece, ...], window: int | None) -> Tensor:
    """[queries, keys] bool of a tree whose keys stand piece by piece."""
    prefix, *branches = (p.past + p.own for p in pieces)
    name = torch.cat([torch.full((n,), j - 1) for j, n in enumerate((prefix, *branches))])
    position = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in branches)])
    axis = torch.arange(name.numel())
    ends = np.cumsum([prefix, *branches])
    rows = torch.cat([torch.arange(end - p.asked, end) for p, end in zip(pieces, ends.tolist(), strict=True)])
    visible = (axis[None, :] <= rows[:, None]) & ((name[None, :] < 0) | (name[None, :] == name[rows, None]))
    return visible if window is None else visible & (position[None, :] > position[rows, None] - window)


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, float("-inf"))
    # Not from pinned memory: of a long tree it would take hundreds of megabytes of that.
    return mask.to(like.device, non_blocking=True)

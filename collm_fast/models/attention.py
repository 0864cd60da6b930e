"""Attention over packed prompt trees, as an attention function that Hugging Face models call.

One token axis holds several trees; a tree is a shared prefix followed by branches, and each branch sees the prefix
and itself. Nothing of size [T, T] over the whole pack exists. Packing lives in `collm_fast.data.packing`; this file
only reads its `tree` and `branch` vectors. Floor F2.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.ops.decoder import masked_softmax

NAME = "collm_fast_tree"
# bfloat16 on a CPU: a tree of so few tokens is faster as one masked product than branch by branch.
_WHOLE = 320


class Piece(NamedTuple):
    """A tree's shared prefix or one of its branches: `past` tokens whose keys are given, then `own` new ones.

    The last `asked` of the new ones have queries.
    """

    past: int
    own: int
    asked: int


class _Call(NamedTuple):
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
    Attributes: trees: the pieces of each tree, its prefix first (of no tokens where a tree has none).
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
        self._calls: dict[int, tuple[list[int], list[int], list[int], list[_Call]]] = {}

    def _with(self, trees: list[list[Piece]]) -> TreePlan:
        """Other pieces, the same masks."""
        other = copy.copy(self)
        other.trees, other._calls = trees, {}
        return other

    def answers(self) -> TreePlan:
        """The same keys, but only the last token of every branch has a query."""
        return self._with([[p._replace(asked=int(i > 0)) for i, p in enumerate(tree)] for tree in self.trees])

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

    def own_places(self, cut: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places of the tokens of `split`'s head and tail among the plan's own tokens."""
        own = [piece.own for tree in self.trees for piece in tree]
        first = [size for sizes in cut for size in sizes]
        counts = [n for size, total in zip(first, own, strict=True) for n in (size, total - size)]
        is_head = np.repeat(np.tile([True, False], len(own)), counts)
        return np.flatnonzero(is_head), np.flatnonzero(~is_head)

    def calls(self, whole_up_to: int) -> tuple[list[int], list[int], list[int], list[_Call]]:
        """(split of the queries, of the past keys, of the own keys, the calls), the same for every layer."""
        if whole_up_to not in self._calls:
            self._calls[whole_up_to] = self._make_calls(whole_up_to)
        return self._calls[whole_up_to]

    def _make_calls(self, whole_up_to: int) -> tuple[list[int], list[int], list[int], list[_Call]]:
        queries: list[int] = []
        sizes: tuple[list[int], list[int]] = ([], [])  # own, past
        calls: list[_Call] = []

        def keys(pieces: list[Piece]) -> list[tuple[bool, int]]:
            found = []
            for past, size in ((past, p[not past]) for p in pieces for past in (True, False)):
                if size:
                    found.append((past, len(sizes[past])))
                    sizes[past].append(size)
            return found

        for tree in self.trees:
            asked, total = sum(p.asked for p in tree), sum(p.past + p.own for p in tree)
            few = asked < len(tree)  # one query a branch: all keys once cost less than the prefix for each branch
            if len(tree) > 2 and self.per_branch and total > whole_up_to and not few:
                prefix = keys(tree[:1])
                for j, piece in enumerate(tree[1:]):
                    part = (*tree[:1], piece) if j == 0 else (tree[0]._replace(asked=0), piece)
                    calls.append(_Call(part, (*prefix, *keys([piece])), False))
            elif any(p.past for p in tree):
                calls.append(_Call(tuple(tree), tuple(keys(tree)), len(tree) > 2))
            else:
                calls.append(_Call(tuple(tree), tuple(keys([Piece(0, total, 0)])), len(tree) > 2))
        calls = [call for call in calls if any(p.asked for p in call.pieces)]
        queries = [sum(p.asked for p in call.pieces) for call in calls]
        return queries, sizes[True], sizes[False], calls

    def mask(self, call: _Call, window: int | None, like: Tensor) -> Tensor | None:
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
    # float32 for the products, the inputs' own dtype for torch's kernel.
    dtype = torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))
    return mask.to(like.device, non_blocking=True)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scaling: float | None,
    window: int | None,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T scaling + mask) v along every branch of every tree.

    One rule chooses the kernel: in bfloat16 on a CPU products with float32 scores (forward and backward of torch's
    fused kernel take 2 to 4 times as long there at these sizes), everywhere else torch's fused attention.

    Args:
        query: [1, h, Q, d], the plan's asked tokens; key, value: [1, h or fewer, T, d] (grouped-query heads), its own
            tokens; one dtype.
        plan: the trees of the tokens. scaling: None is d^-1/2.
        window: tokens see at most this many positions back, themselves included.
        past: key and value of the plan's past tokens, where it has such.
    Returns: [1, h, Q, d] in the dtype of query.
    """
    products = query.device.type == "cpu" and query.dtype == torch.bfloat16
    repeat = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_sizes, past_sizes, own_sizes, calls = plan.calls(_WHOLE if products else 0)

    # One split for all pieces: its backward is one concatenation, slices would each pad a full gradient.
    def segments(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return torch.split(x if products or repeat == 1 else _repeat_heads(x, repeat), sizes, dim=2)

    own_k, own_v = segments(key, own_sizes), segments(value, own_sizes)
    past_k, past_v = ((), ()) if past is None else (segments(x, past_sizes) for x in past)
    out: list[Tensor] = []
    for q, call in zip(torch.split(query, q_sizes, dim=2), calls, strict=True):
        k = _joined([past_k[place] if is_past else own_k[place] for is_past, place in call.keys])
        v = _joined([past_v[place] if is_past else own_v[place] for is_past, place in call.keys])
        if products:
            o = _Products.apply(q, k, v, plan.mask(call, window, q), scale)  # type: ignore[no-untyped-call]
        else:
            o = _fused(q, k, v, plan, call, window, scale)
        # The order of torch's kernels, and of the layer that reads the result: transposed, it is one block of memory.
        out.append(o.transpose(1, 2))
    return _joined(out, dim=1).transpose(1, 2)


def _joined(parts: list[Tensor], dim: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _fused(q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, call: _Call, window: int | None, scale: float) -> Tensor:
    """Torch's attention; a plain causal sequence goes without a mask."""
    whole = not call.masked and q.shape[2] == k.shape[2] > 1 and (window is None or k.shape[2] <= window)
    mask = None if whole else plan.mask(call, window, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=scale)


class _Products(torch.autograd.Function):
    """softmax(q k^T scale + mask) v in bfloat16 by batched products, the query heads of one key head under one another.

    Scores and their gradient are float32 until the softmax has read them: rounded to bfloat16 before, they double the
    error of the mapper's gradient. Keeps q, k, v and the weights.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        heads, (q_length, k_length) = k.shape[1], (q.shape[2], k.shape[2])
        rows = q.reshape(heads, -1, q.shape[3])
        scores = torch.bmm(rows.float(), k[0].float().transpose(1, 2)).view(heads, -1, q_length, k_length)
        weights = masked_softmax(scores, mask, scale, torch.bfloat16)
        ctx.save_for_backward(rows, k, v, weights)
        ctx.scale, ctx.shape = scale, q.shape
        return torch.bmm(weights.view(heads, -1, k_length), v[0]).view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, k, v, weights = ctx.saved_tensors
        grad = grad.reshape(rows.shape)
        flat = weights.view(len(rows), rows.shape[1], -1)
        d_weights = torch.bmm(grad.float(), v[0].float().transpose(1, 2)).view(weights.shape)
        scores = torch.ops.collm_fast.masked_softmax_backward(d_weights, weights, ctx.scale, torch.bfloat16)
        scores = scores.view(flat.shape)
        d_q = torch.bmm(scores, k[0]).view(ctx.shape)
        d_k, d_v = torch.bmm(scores.transpose(1, 2), rows)[None], torch.bmm(flat.transpose(1, 2), grad)[None]
        return d_q, d_k, d_v, None, None


def _repeat_heads(x: Tensor, repeat: int) -> Tensor:
    return x[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def _attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree_plan: TreePlan | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a Hugging Face attention layer calls: [1, h, T, d] -> [1, T, h, d]. Without a plan it is plain SDPA."""
    if tree_plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return plain
    out = tree_attention(query, key, value, tree_plan, scaling=scaling, window=sliding_window)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Registers the attention function (and SDPA's masks for calls without a plan) with transformers; idempotent.

    Returns: the name to give to `model.set_attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention_function)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME

"""Attention over packed prompt trees, as an attention function that Hugging Face models call.

One token axis holds several trees; a tree is a shared prefix followed by branches, and each branch sees the prefix
and itself. Nothing of size [T, T] over the whole pack exists. Packing lives in `collm_fast.data.packing`; this file
only reads its `tree` and `branch` vectors. Floor F2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "collm_fast_tree"
# bfloat16 on a CPU: a tree of so few tokens is faster as one masked product than branch by branch.
_WHOLE = 320


class TreePlan:
    """Where the pieces of a packed axis lie, and the masks its attention calls share across layers.

    Args:
        tree:       [T] int, the tree of each token; the tokens of a tree are contiguous.
        branch:     [T] int, -1 in the shared prefix (which comes first in its tree), else the branch.
        per_branch: True: one call for prefix and first branch, one for each further branch (least arithmetic, and so
                    for CPUs). False: one masked call a tree (fewest launches, and so for GPUs).
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
        # trees: a list of piece lengths each, prefix first; its length is 0 where a tree has none.
        self.trees: list[list[int]] = []
        for is_first, (_, piece_branch), piece_length in zip(first, pieces.tolist(), length.tolist(), strict=True):
            if is_first:
                self.trees.append([] if piece_branch < 0 else [0])
            self.trees[-1].append(piece_length)
        self.per_branch = per_branch
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def causal(self, q_length: int, k_length: int, window: int | None, like: Tensor) -> Tensor:
        """[q, k] additive mask of the last q of k consecutive positions: 0 where visible, -inf elsewhere."""
        key = (q_length, k_length, window, like.dtype)
        if key not in self._masks:
            q = torch.arange(k_length - q_length, k_length)[:, None]
            k = torch.arange(k_length)[None, :]
            visible = k <= q if window is None else (k <= q) & (k > q - window)
            self._masks[key] = _additive(visible, like)
        return self._masks[key]

    def whole(self, index: int, window: int | None, like: Tensor) -> Tensor:
        """[L, L] additive mask of tree `index`."""
        key = ("tree", index, window, like.dtype)
        if key not in self._masks:
            prefix, *branches = self.trees[index]
            name = torch.cat([torch.full((n,), j - 1) for j, n in enumerate([prefix, *branches])])
            position = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in branches)])
            axis = torch.arange(name.numel())
            visible = (axis[None, :] <= axis[:, None]) & ((name[None, :] < 0) | (name[None, :] == name[:, None]))
            if window is not None:
                visible &= position[None, :] > position[:, None] - window
            self._masks[key] = _additive(visible, like)
        return self._masks[key]


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    # float32 for the products, the inputs' own dtype for torch's kernel.
    dtype = torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))
    return mask.to(like.device, non_blocking=True)


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, *, scaling: float | None, window: int | None
) -> Tensor:
    """softmax(q k^T scaling + mask) v along every branch of every tree.

    One rule chooses the kernel: in bfloat16 on a CPU plain products with a float32 softmax (forward and backward of
    torch's fused kernel take 2 to 4 times as long there at these sizes), everywhere else torch's fused attention.

    Args:
        query: [1, h, T, d]; key, value: [1, h or fewer, T, d] (grouped-query heads), one dtype.
        plan: the trees of the T tokens. scaling: None is d^-1/2.
        window: tokens see at most this many positions back, themselves included.
    Returns: [1, h, T, d] in the dtype of query.
    """
    products = query.device.type == "cpu" and query.dtype == torch.bfloat16
    attend = _products if products else _fused
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and not products:
        key, value = _repeat_heads(key, repeat), _repeat_heads(value, repeat)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    whole_up_to = _WHOLE if products else 0
    branched = [plan.per_branch and len(tree) > 2 and sum(tree) > whole_up_to for tree in plan.trees]

    def sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The last q positions of one sequence of k positions.
        q_length, k_length = q.shape[2], k.shape[2]
        limit = None if window is None or k_length <= window else window
        if q_length == k_length and limit is None and not products:
            return attend(q, k, v, None, scale)
        return attend(q, k, v, plan.causal(q_length, k_length, limit, q), scale)

    sizes: list[int] = []
    for tree, cut in zip(plan.trees, branched, strict=True):
        sizes += [sum(tree[:2]), *tree[2:]] if cut else [sum(tree)]
    # One split for all pieces: its backward is one concatenation, slices would each pad a full gradient.
    pieces = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
    out: list[Tensor] = []
    for index, tree in enumerate(plan.trees):
        q, k, v = next(pieces)
        if not branched[index] and len(tree) > 2:
            out.append(attend(q, k, v, plan.whole(index, window, q), scale))
            continue
        out.append(sequence(q, k, v))
        prefix_k, prefix_v = k[:, :, : tree[0]], v[:, :, : tree[0]]
        for _ in tree[2:]:
            q, k, v = next(pieces)
            out.append(sequence(q, torch.cat((prefix_k, k), dim=2), torch.cat((prefix_v, v), dim=2)))
    return torch.cat(out, dim=2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Torch's attention; causal without a mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Two batched products; the query heads of one key head stand under one another, so nothing is repeated."""
    heads, (q_length, k_length) = k.shape[1], (q.shape[2], k.shape[2])
    scores = torch.matmul(q.reshape(heads, -1, q.shape[3]), k[0].transpose(1, 2)).float() * scale
    scores = scores.view(heads, -1, q_length, k_length)
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1).to(v.dtype)
    return torch.matmul(weights.view(heads, -1, k_length), v[0]).view(q.shape)


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

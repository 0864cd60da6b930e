"""Attention over packed prompt trees, as an attention function that Hugging Face models call.

One token axis holds several trees; a tree is a shared prefix followed by branches, and each branch sees the prefix
and itself. On a CPU nothing of size [T, T] over the whole pack exists. Where the trees lie is models/tree_plan.py, the
kernel of our own ops/attention.py, FlexAttention models/flex.py. Floor F2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collm_fast.models import flex
from collm_fast.models.tree_plan import Call, Kernel, TreePlan
from collm_fast.ops.attention import path_attention, serves
from collm_fast.ops.decoder import masked_softmax

NAME = "collm_fast_tree"
# Products on a CPU: a tree of so few tokens is faster as one masked product than branch by branch.
_WHOLE = 320
# In float32, of calls with more keys: the weights, which are kept for the gradient, would take too much memory.
_LONGEST = 512


def kernel_of(query: Tensor) -> Kernel:
    """The one rule for what computes `tree_attention`.

    paths     bfloat16 on a CPU with AMX tiles: our own kernel, one call for all trees
    products  bfloat16 on another CPU, and float32 on any while a gradient is wanted: batched products with float32
              scores, one call a branch (in float32 of at most 512 keys, else torch's fused attention). Forward and
              backward of torch's fused kernel take 2 to 4 times as long there at these sizes; its forward alone in
              float32 takes as long.
    flex      half precision on CUDA, where triton is importable: FlexAttention, one call for all trees
    fused     everything else: torch's fused attention, one call a branch on a CPU and one a tree on a GPU
    """
    if query.device.type == "cpu":
        if query.dtype == torch.bfloat16:
            return "paths" if serves(query) else "products"
        trains = query.dtype == torch.float32 and query.requires_grad
        return "products" if trains and torch.is_grad_enabled() else "fused"
    return "flex" if flex.serves(query) else "fused"


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

    Args:
        query: [1, h, Q, d], the plan's asked tokens; key, value: [1, h or fewer, T, d] (grouped-query heads), its own
            tokens; one dtype.
        plan: the trees of the tokens. scaling: None is d^-1/2.
        window: tokens see at most this many positions back, themselves included.
        past: key and value of the plan's past tokens, where it has such.
    Returns: [1, h, Q, d] in the dtype of query.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plan.kernel = kernel = kernel_of(query)
    if kernel == "flex":
        mask = plan.block_mask(window, query.device)
        return flex.flex_tree_attention(query, key, value, mask, scale=scale, past=past)
    if kernel == "paths":
        before = None if past is None else (past[0][0], past[1][0])
        out = path_attention(query[0], key[0], value[0], *plan.tables(), scale=scale, window=window, past=before)
        return out.transpose(0, 1)[None]
    products, repeat = kernel == "products", query.shape[1] // key.shape[1]
    q_sizes, past_sizes, own_sizes, calls = plan.calls(_WHOLE if products else 0)

    # One split for all pieces: its backward is one concatenation, slices would each pad a full gradient.
    def segments(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return torch.split(x if products else _repeat_heads(x, repeat), sizes, dim=2)

    own_k, own_v = segments(key, own_sizes), segments(value, own_sizes)
    past_k, past_v = ((), ()) if past is None else (segments(x, past_sizes) for x in past)
    parts: list[Tensor] = []
    for q, call in zip(torch.split(query, q_sizes, dim=2), calls, strict=True):
        k = _joined([past_k[place] if is_past else own_k[place] for is_past, place in call.keys])
        v = _joined([past_v[place] if is_past else own_v[place] for is_past, place in call.keys])
        if products and (q.dtype != torch.float32 or k.shape[2] <= _LONGEST):
            o = _Products.apply(q, k, v, plan.mask(call, window, q), scale)  # type: ignore[no-untyped-call]
        else:
            k, v = (_repeat_heads(x, q.shape[1] // x.shape[1]) for x in (k, v))
            o = _fused(q, k, v, plan, call, window, scale)
        # The order of torch's kernels, and of the layer that reads the result: transposed, it is one block of memory.
        parts.append(o.transpose(1, 2))
    return _joined(parts, dim=1).transpose(1, 2)


def _joined(parts: list[Tensor], dim: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _fused(q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, call: Call, window: int | None, scale: float) -> Tensor:
    """Torch's attention; a plain causal sequence goes without a mask."""
    whole = not call.masked and q.shape[2] == k.shape[2] > 1 and (window is None or k.shape[2] <= window)
    mask = None if whole else plan.mask(call, window, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=scale)


class _Products(torch.autograd.Function):
    """softmax(q k^T scale + mask) v by batched products, the query heads of one key head under one another.

    Scores and their gradient are float32 until the softmax has read them: rounded to bfloat16 before, they double the
    error of the mapper's gradient. Keeps q, k, v and the weights, in their dtype.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        heads, (q_length, k_length) = k.shape[1], (q.shape[2], k.shape[2])
        rows = q.reshape(heads, -1, q.shape[3])
        scores = torch.bmm(rows.float(), k[0].float().transpose(1, 2)).view(heads, -1, q_length, k_length)
        weights = masked_softmax(scores, mask, scale, q.dtype)
        ctx.save_for_backward(rows, k, v, weights)
        ctx.scale, ctx.shape = scale, q.shape
        return torch.bmm(weights.view(heads, -1, k_length), v[0]).view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, k, v, weights = ctx.saved_tensors
        grad = grad.reshape(rows.shape)
        flat = weights.view(len(rows), rows.shape[1], -1)
        d_weights = torch.bmm(grad.float(), v[0].float().transpose(1, 2)).view(weights.shape)
        scores = torch.ops.collm_fast.masked_softmax_backward(d_weights, weights, ctx.scale, rows.dtype)
        scores = scores.view(flat.shape)
        d_q = torch.bmm(scores, k[0]).view(ctx.shape)
        d_k, d_v = torch.bmm(scores.transpose(1, 2), rows)[None], torch.bmm(flat.transpose(1, 2), grad)[None]
        return d_q, d_k, d_v, None, None


def _repeat_heads(x: Tensor, repeat: int) -> Tensor:
    if repeat == 1:
        return x
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

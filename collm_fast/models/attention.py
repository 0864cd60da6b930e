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

NAME = "collm_fast_tree"


def kernel_of(query: Tensor) -> Kernel:
    """The one rule for what computes `tree_attention`.

    paths     float32 and bfloat16 on a CPU, where the extension is compiled: our own kernel, one call for all trees
    flex      half precision on CUDA, where triton is importable: FlexAttention, one call for all trees
    fused     everything else: torch's fused attention, one call a branch on a CPU and one a tree on a GPU
    """
    if serves(query):
        return "paths"
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
    repeat = query.shape[1] // key.shape[1]
    q_sizes, past_sizes, own_sizes, calls = plan.calls()

    # One split for all pieces: its backward is one concatenation, slices would each pad a full gradient.
    def segments(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return torch.split(_repeat_heads(x, repeat), sizes, dim=2)

    own_k, own_v = segments(key, own_sizes), segments(value, own_sizes)
    past_k, past_v = ((), ()) if past is None else (segments(x, past_sizes) for x in past)
    parts: list[Tensor] = []
    for q, call in zip(torch.split(query, q_sizes, dim=2), calls, strict=True):
        k = _joined([past_k[place] if is_past else own_k[place] for is_past, place in call.keys])
        v = _joined([past_v[place] if is_past else own_v[place] for is_past, place in call.keys])
        # The order of torch's kernels, and of the layer that reads the result: transposed, it is one block of memory.
        parts.append(_fused(q, k, v, plan, call, window, scale).transpose(1, 2))
    return _joined(parts, dim=1).transpose(1, 2)


def _joined(parts: list[Tensor], dim: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _fused(q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, call: Call, window: int | None, scale: float) -> Tensor:
    """Torch's attention; a plain causal sequence goes without a mask."""
    whole = not call.masked and q.shape[2] == k.shape[2] > 1 and (window is None or k.shape[2] <= window)
    mask = None if whole else plan.mask(call, window, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=scale)


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

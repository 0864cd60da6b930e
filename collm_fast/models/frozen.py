"""What a decoder layer adds to x: x + mlp(norm(x)), where frozen one step of autograd that knows no weight trains.

Autograd over the modules keeps and adds more than that: the normed input, the products' sum, a gradient for each use.
Without a graph it runs over a few rows at a time, in place. Adapted projections run as they do in attention
(models/lora.py). The passes between the products are ops/decoder.py, the layer is models/decoder.py. Floor F2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collm_fast.models.lora import is_hooked, project_together
from collm_fast.ops import decoder as ops

# Rows of one step on a CPU where nothing is kept. The inner products of 8,192 tokens of SmolLM2 are larger (48 MiB in
# float32) than what the allocator keeps for the next layer (32 MiB): new pages for each made the MLP a sixth slower in
# both dtypes (512 rows: as fast in float32, slower in bfloat16; 2,048: the other way round).
_ROWS = 1024
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SILU = ("SiLU", "SiLUActivation")


class _FrozenMLP(torch.autograd.Function):
    """y = x + swiglu(n Wg^T, n Wu^T) Wd^T, n = rms_norm(x); keeps x, the norm's factor and the two inner products.

    x and y may be wider than n and the weights; their sum is then rounded to their own dtype alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
        normed, scale = torch.ops.collm_fast.rms_norm(x, weight, eps)
        inner, outer = F.linear(normed, gate), F.linear(normed, up)
        ctx.save_for_backward(x, scale, inner, outer, weight, gate, up, down)
        product = ops.swiglu(inner, outer)
        if x.dtype == down.dtype:
            return torch.addmm(x, product, down.t())
        return torch.add(x, F.linear(product, down))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, scale, inner, outer, weight, gate, up, down = ctx.saved_tensors
        d_inner, d_outer = torch.ops.collm_fast.swiglu_backward(grad.to(down.dtype) @ down, inner, outer)
        normed = (d_inner @ gate).addmm_(d_outer, up)
        dx = torch.ops.collm_fast.rms_norm_backward(normed, x, weight, scale, grad)
        return dx, None, None, None, None, None


def norm(module: Any, x: Tensor, *, wide: bool = False) -> Tensor:
    """`module(x)` in the dtype of its weight (wide: of x), by `rms_norm` where the module is such a norm and frozen."""
    out: Tensor
    if hasattr(module, "variance_epsilon") and not module.weight.requires_grad:
        weight = module.weight.to(x.dtype) if wide else module.weight
        out = ops.rms_norm(x, weight, module.variance_epsilon)
    else:
        narrow = next((parameter.dtype for parameter in module.parameters()), x.dtype)
        out = module(x).to(x.dtype if wide else narrow)
    return out


def add_projected(x: Tensor, projection: Any, attended: Tensor, *, into_x: bool) -> Tensor:
    """x + projection(attended); where `into_x` allows it, a plain frozen projection adds to x itself if no gradient is
    wanted: a sum apart takes as long as a seventh of the product, at SmolLM2's 576 outputs."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or attended.requires_grad)
    out: Tensor
    if wanted or not into_x or not _is_plain(projection):
        out = x + projection(attended)
    elif x.dtype == attended.dtype == projection.weight.dtype:
        out = x.addmm_(attended, projection.weight.t())
    else:
        out = x.add_(F.linear(attended, projection.weight))
    return out


def mlp_residual(layer: Any, x: Tensor) -> Tensor:
    """x + layer.mlp(layer.post_attention_layernorm(x)), x [T, H], which is overwritten where it needs no gradient.

    In one step where the three projections are plain frozen `nn.Linear`s without bias around SiLU. Other projections
    around SiLU are called by themselves, gate and up in one step where LoRA adapts them; another MLP by its module.
    """
    mlp, before = layer.mlp, layer.post_attention_layernorm
    out: Tensor
    if not _is_gated(mlp):
        out = x + mlp(norm(before, x))
        return out
    weights = _frozen_weights(mlp, before)
    if weights is None:
        gate, up = project_together((mlp.gate_proj, mlp.up_proj), norm(before, x))
        out = x + mlp.down_proj(ops.swiglu(gate, up))
    elif torch.is_grad_enabled() and x.requires_grad:
        out = _FrozenMLP.apply(x, *weights, before.variance_epsilon)  # type: ignore[no-untyped-call]
    else:
        out = _in_place(x, *weights, before.variance_epsilon)
    return out


def _in_place(x: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    """What `_FrozenMLP` computes, into x, a few rows at a time on a CPU."""
    for part in x.split(_ROWS) if x.device.type == "cpu" else (x,):
        normed = ops.rms_norm(part, weight, eps)
        product = ops.swiglu(F.linear(normed, gate), F.linear(normed, up))
        if x.dtype == down.dtype:
            part.addmm_(product, down.t())
        else:
            part.add_(F.linear(product, down))
    return x


def _is_gated(mlp: Any) -> bool:
    """Whether the module computes down_proj(silu(gate_proj(n)) up_proj(n)), whatever the projections are."""
    projections = all(isinstance(getattr(mlp, name, None), nn.Module) for name in _PROJECTIONS)
    silu = type(getattr(mlp, "act_fn", None)).__name__ in _SILU
    return projections and silu and not any(is_hooked(module) for module in (mlp, mlp.act_fn))


def _frozen_weights(mlp: Any, before: Any) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(norm, gate, up, down) of a gated MLP and the norm before it that are the plain ones, or None."""
    parts = [getattr(mlp, name) for name in _PROJECTIONS]
    normal = hasattr(before, "variance_epsilon") and not before.weight.requires_grad
    if not normal or is_hooked(before) or not all(_is_plain(part) for part in parts):
        return None
    gate, up, down = (p.weight for p in parts)
    return before.weight, gate, up, down


def _is_plain(module: Any) -> bool:
    """Whether it is a frozen `nn.Linear` without bias, and nothing else: another class may compute something else (an
    adapter, a quantised base), a hook wants to be called."""
    plain = type(module) is nn.Linear and module.bias is None and not module.weight.requires_grad
    return plain and not is_hooked(module)

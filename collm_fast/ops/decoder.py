"""What stands between the matrix products of a decoder layer: schema, fake, autograd, registration, public functions.

rms_norm, swiglu and rotate_heads, each one pass over its operands. The CPU's kernels live in csrc/cpu/decoder.cpp; on a
GPU plain torch serves. The specification is reference.py, the layer models/decoder.py. Floor F1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.ops._arguments import dtype_name, require
from collm_fast.ops._autograd import register_autograd

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ops = torch.ops.collm_fast

for _schema in (
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor? residual) -> Tensor",
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    "rotate_heads(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    "rotate_heads_backward(Tensor grad, Tensor cos, Tensor sin) -> Tensor",
):
    _native.LIBRARY.define(_schema)


# --- checks: the sentences of csrc/cpu/decoder.cpp ---------------------------------------------------------------
def _check_float(op: str, name: str, tensor: Tensor) -> None:
    require(tensor.dtype in _FLOATS, op, f"{name} in float32, bfloat16, float16 or float64", tensor.dtype)


def _check_shape(op: str, name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    require(tensor.shape == like.shape, op, f"{name} of the shape of {first} {list(like.shape)}", tensor)


def _check_like(op: str, name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    _check_shape(op, name, tensor, first, like)
    require(tensor.dtype == like.dtype, op, f"{name} of the dtype of {first}", tensor.dtype)


def _check_norm(op: str, x: Tensor, weight: Tensor) -> None:
    require(x.dim() >= 1, op, "x of shape [..., W]", x)
    _check_float(op, "x", x)
    require(weight.shape == x.shape[-1:], op, f"weight of shape [{x.shape[-1]}]", weight)
    narrower = x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
    rule = "weight of the dtype of x, or in half precision for x in float32"
    require(weight.dtype == x.dtype or narrower, op, rule, f"{dtype_name(weight.dtype)} and {dtype_name(x.dtype)}")


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None) -> None:
    op = "rms_norm_backward"
    _check_norm(op, x, weight)
    _check_shape(op, "grad", grad, "x", x)
    require(grad.dtype == weight.dtype, op, "grad of the dtype of weight", grad.dtype)
    if residual is not None:
        _check_like(op, "residual", residual, "x", x)
    good = scale.shape == x.shape[:-1] and scale.dtype == _sum_type(x)
    require(good, op, "the scale that rms_norm gave", f"{scale.dtype} of shape {list(scale.shape)}")


def _check_swiglu(op: str, gate: Tensor, up: Tensor, grad: Tensor | None = None) -> None:
    _check_float(op, "gate", gate)
    _check_like(op, "up", up, "gate", gate)
    if grad is not None:
        _check_like(op, "grad", grad, "gate", gate)


def _check_rotary(op: str, x: Tensor, tokens: int, cos: Tensor, sin: Tensor) -> None:
    _check_float(op, "x", x)
    good = cos.dim() == 2 and cos.shape[0] == tokens and cos.shape[1] > 0 and cos.shape[1] % 2 == 0
    require(good, op, f"cos of shape [{tokens}, d] with d even", cos)
    _check_like(op, "sin", sin, "cos", cos)
    require(cos.dtype == x.dtype, op, "cos of the dtype of x", cos.dtype)


def _check_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "rotate_heads"
    require(x.dim() == 2, op, "x of shape [T, h d]", x)
    _check_rotary(op, x, x.shape[0], cos, sin)
    require(x.shape[1] % cos.shape[1] == 0, op, f"x of a multiple of {cos.shape[1]} columns", x.shape[1])


def _check_rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "rotate_heads_backward"
    require(grad.dim() == 3, op, "grad of shape [h, T, d]", grad)
    _check_rotary(op, grad, grad.shape[1], cos, sin)
    require(cos.shape[1] == grad.shape[2], op, f"cos of {grad.shape[2]} columns", cos.shape[1])


# --- plain torch -------------------------------------------------------------------------------------------------
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm("rms_norm", x, weight)
    wide = x.to(_sum_type(x))
    return reference.rms_norm(x, weight, eps).contiguous(), torch.rsqrt(wide.square().mean(-1) + eps).contiguous()


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None) -> Tensor:
    _check_norm_backward(grad, x, weight, scale, residual)
    wide, inner = x.to(scale.dtype), grad.to(scale.dtype) * weight.to(scale.dtype)
    scale = scale[..., None]
    dx = (inner - wide * (scale.square() * (inner * wide).mean(-1, keepdim=True))) * scale
    return (dx if residual is None else dx + residual.to(dx.dtype)).to(x.dtype).contiguous()


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    _check_swiglu("swiglu", gate, up)
    return reference.swiglu(gate, up).contiguous()


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check_swiglu("swiglu_backward", gate, up, grad)
    wide, g = grad.to(_sum_type(grad)), gate.to(_sum_type(gate))
    s = torch.sigmoid(g)
    d_gate = wide * up.to(wide.dtype) * s * (1 + g * (1 - s))
    return d_gate.to(gate.dtype), (wide * (g * s).to(gate.dtype)).to(gate.dtype)


def _rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_rotate(x, cos, sin)
    return reference.rotate_heads(x, cos, sin).contiguous()


def _rotate_heads_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_rotate_backward(grad, cos, sin)
    first, second = (grad * sin).chunk(2, dim=-1)
    return (grad * cos + torch.cat((second, -first), dim=-1)).transpose(0, 1).reshape(grad.shape[1], -1)


_native.register("rms_norm", reference=_rms_norm)
_native.register("rms_norm_backward", reference=_rms_norm_backward)
_native.register("swiglu", reference=_swiglu)
_native.register("swiglu_backward", reference=_swiglu_backward)
_native.register("rotate_heads", reference=_rotate_heads)
_native.register("rotate_heads_backward", reference=_rotate_heads_backward)


# --- fakes and autograd ------------------------------------------------------------------------------------------
def _fake(name: str) -> Any:
    return torch.library.register_fake(f"collm_fast::{name}", lib=_native.LIBRARY)


@_fake("rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm("rms_norm", x, weight)
    return x.new_empty(x.shape, dtype=weight.dtype), x.new_empty(x.shape[:-1], dtype=_sum_type(x))


@_fake("rms_norm_backward")
def _rms_norm_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None) -> Tensor:
    _check_norm_backward(grad, x, weight, scale, residual)
    return x.new_empty(x.shape)


@_fake("swiglu")
def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    _check_swiglu("swiglu", gate, up)
    return gate.new_empty(gate.shape)


@_fake("swiglu_backward")
def _swiglu_backward_fake(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check_swiglu("swiglu_backward", gate, up, grad)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@_fake("rotate_heads")
def _rotate_heads_fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_rotate(x, cos, sin)
    return x.new_empty(x.shape[1] // cos.shape[1], x.shape[0], cos.shape[1])


@_fake("rotate_heads_backward")
def _rotate_heads_backward_fake(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_rotate_backward(grad, cos, sin)
    return grad.new_empty(grad.shape[1], grad.shape[0] * grad.shape[2])


def _rms_norm_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    require(not weight.requires_grad, "rms_norm", "a frozen weight", "one that requires a gradient")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _ops.rms_norm_backward(grad, *ctx.saved_tensors, None), None, None


def _swiglu_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _ops.swiglu_backward(grad, *ctx.saved_tensors)
    return d_gate, d_up


def _rotate_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotate_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _ops.rotate_heads_backward(grad, *ctx.saved_tensors), None, None


_rms_norm_op = register_autograd("rms_norm", _rms_norm_grad, _rms_norm_setup)
_swiglu_op = register_autograd("swiglu", _swiglu_grad, _swiglu_setup)
_rotate_heads_op = register_autograd("rotate_heads", _rotate_grad, _rotate_setup)


# --- public functions --------------------------------------------------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm with a frozen weight.

        y = w x r,  r = (mean x^2 + eps)^-1/2

    Args:
        x: [..., W] float32, bfloat16, float16 or float64.
        weight: [W], frozen, of the dtype of x; or in half precision for x in float32.
    Returns: [..., W] in the dtype of weight; sums in float32 (float64 in float64). x r is rounded to the dtype of x
        before the weight, as Llama's own norm does. The gradient has the dtype of x.
    Raises: ValueError for other shapes and dtypes, or a weight that requires a gradient.
    Source: Zhang and Sennrich, Root mean square layer normalization (NeurIPS 2019), equation 4.
    """
    y: Tensor = _rms_norm_op(x, weight, eps)[0]
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, silu(g) = g / (1 + e^-g); any shape, one of float32, bfloat16, float16 and float64.

    Raises: ValueError for other dtypes, or operands of different shapes or dtypes.
    Source: Shazeer, GLU variants improve transformer (arXiv 2002.05202), equation 6.
    """
    out: Tensor = _swiglu_op(gate, up)
    return out


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads of a projection, [T, h d], at their rotary positions, as attention reads them: [h, T, d].

        out[h, t] = x[t, h] cos[t] + (-x2, x1) sin[t],  (x1, x2) the halves of x[t, h]

    Args: x: [T, h d] float32, bfloat16, float16 or float64; cos, sin: [T, d] of its dtype, d even.
    Raises: ValueError for other shapes and dtypes.
    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2.2, in the halves that Llama uses.
    """
    out: Tensor = _rotate_heads_op(x, cos, sin)
    return out

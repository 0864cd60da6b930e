"""LoRA linear: schema, fake, autograd formula, registration and the public function.

Several projections of one x are lora_group.py. The argument checks are in _lora_checks.py; the kernels in
csrc/cpu/lora.cpp, csrc/cuda/lora.cuh and kernels/lora.py; the specification in reference.py; the module that holds the
parameters in models/lora.py. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.ops._arguments import seed_tensor, without_autocast
from collm_fast.ops._autograd import register_autograd
from collm_fast.ops._device_errors import raise_device_errors
from collm_fast.ops._lora_checks import (
    check_backward,
    check_forward,
    check_frozen,
    check_linear,
    check_probability,
    require,
)

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

_native.LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p, "
    "Tensor? seed, int stream) -> (Tensor, Tensor)"
)
_native.LIBRARY.define(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, float scaling, "
    "float dropout_p, Tensor? seed, int stream, bool[3] mask) -> (Tensor, Tensor, Tensor)"
)


def forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream)
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast():
        s = _dropped(x, dropout_p, seed, stream) @ lora_A.to(wide).T
        y = torch.nn.functional.linear(x, weight, bias)
        return y + (scaling * (s @ lora_B.to(wide).T)).to(y.dtype), s


def backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask)
    wide = torch.promote_types(grad.dtype, torch.float32)
    dx, dA, dB = grad.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    with without_autocast():
        ds = scaling * (grad.to(wide) @ lora_B.to(wide))
        if mask[0]:
            dx = grad @ weight + _dropped(ds @ lora_A.to(wide), dropout_p, seed, stream).to(grad.dtype)
        if mask[1]:
            dA = (_matrix(ds).T @ _matrix(_dropped(x, dropout_p, seed, stream))).to(lora_A.dtype)
        if mask[2]:
            dB = scaling * (_matrix(grad.to(wide)).T @ _matrix(s))
    return dx, dA, dB.to(lora_B.dtype)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    """dropout(x) in the dtype of accumulation."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if dropout_p == 0.0 or seed is None or x.numel() == 0:
        return x
    mask = reference.dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p, stream)
    return x * mask.reshape(x.shape).to(x)


def _forward_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from collm_fast.kernels import lora as kernels

    raise_device_errors()
    check_forward(*args[:5], *args[6:])
    with without_autocast():
        y, s = kernels.lora_linear(*args)
    return y, s


def _backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from collm_fast.kernels import lora as kernels

    raise_device_errors()
    check_backward(*args[:6], *args[7:])
    with without_autocast():
        dx, dA, dB = kernels.lora_linear_backward(*args)
    return dx, dA, dB


_native.register("lora_linear", reference=forward_reference, triton=_forward_triton)
_native.register("lora_linear_backward", reference=backward_reference, triton=_backward_triton)


@torch.library.register_fake("collm_fast::lora_linear", lib=_native.LIBRARY)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[:-1]
    return x.new_empty((*rows, weight.shape[0])), x.new_empty((*rows, lora_A.shape[0]), dtype=wide)


@torch.library.register_fake("collm_fast::lora_linear_backward", lib=_native.LIBRARY)
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask)
    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if mask[0] else (0,)),
        lora_A.new_empty(lora_A.shape if mask[1] else (0,)),
        lora_B.new_empty(lora_B.shape if mask[2] else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, stream = inputs
    check_frozen(weight, bias)
    s = output[1]
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.numbers = scaling, dropout_p, stream
    # Frozen adapters (stage 2) keep nothing: x serves only lora_A's gradient, and s only lora_B's.
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[3] else None, weight, lora_A, lora_B, s if needs[4] else None, seed)


def _backward(ctx: Any, grad: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | float | None, ...]:
    if grad is None:
        return (None,) * 9
    x, weight, lora_A, lora_B, s, seed = ctx.saved_tensors
    scaling, dropout_p, stream = ctx.numbers
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[3], needs[4]]
    if x is None:
        x = grad.new_empty(0)
    if s is None:
        s = grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    dx, dA, dB = _lora_linear_backward(grad, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed, stream, mask)
    return dx if mask[0] else None, None, None, dA if mask[1] else None, dB if mask[2] else None, None, None, None, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("lora_linear: expected a first derivative, got a request for the second")


_lora_linear = register_autograd("lora_linear", _backward, _setup_context)
_lora_linear_backward = register_autograd("lora_linear_backward", _no_second_derivative, _keep_nothing)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What x, weight and bias are cast to, as in torch's own linear; lora_A and lora_B keep their dtype."""
    if not _is_any_autocast_enabled():
        return None
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    training: bool = False,
    stream: int = 0,
) -> Tensor:
    """A frozen linear layer plus a trainable low-rank update, in one pass.

        y = x W^T + b + scaling * dropout(x) A^T B^T

    Args:
        x: [..., K] float32, bfloat16, float16, or float64 on a CPU.
        weight, bias: [N, K] and [N] or None, in x's dtype, frozen.
        lora_A, lora_B: [r, K] and [N, r], 1 <= r <= 256, float32 or x's dtype; both None: the plain linear layer.
        scaling: PEFT's alpha / r.
        dropout_p: drops elements of x on the way to lora_A, in training only.
        seed: int64, one element on x's device, or an int. Equal seeds give equal masks on every device and backend.
        stream: which of the 2^32 independent masks of one seed.
    Returns: [..., N] in x's dtype. Gradients for x, lora_A and lora_B; the mask is drawn again, never stored.
    Under autocast x, weight and bias are cast as in torch's linear; lora_A and lora_B are not.
    Raises: ValueError for shapes, dtypes and devices that do not fit, a weight or bias that requires a gradient, or
        dropout in training without a seed.
    Source: Hu et al., LoRA (arXiv 2106.09685); dropout as in PEFT.
    """
    if (lora_A is None) != (lora_B is None):
        require(False, "lora_A and lora_B both given or both None", "one of them")
    if torch.is_grad_enabled():
        check_frozen(weight, bias)
    check_probability(dropout_p)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if lora_A is None or lora_B is None:
        check_linear(x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias)
    p = dropout_p if training else 0.0
    seed = seed_tensor("lora_linear", seed, x.device) if p > 0.0 else None
    y: Tensor = _lora_linear(x, weight, bias, lora_A, lora_B, scaling, p, seed, stream)[0]
    return y

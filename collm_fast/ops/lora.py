"""LoRA linear: schema, fake, autograd formula, registration and the public functions.

The kernels live in csrc/cpu/lora.cpp, csrc/cuda/lora.cuh and kernels/lora.py; the specification in reference.py; the
module that holds the parameters in models/lora.py. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collm_fast import _native, reference

_OP = "lora_linear"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_RULE_P = "dropout_p in [0, 1) with round(dropout_p 2^16) below 2^16"

_native.LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p, "
    "Tensor? seed, int stream) -> (Tensor, Tensor)"
)
_native.LIBRARY.define(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, float scaling, "
    "float dropout_p, Tensor? seed, int stream, bool[3] mask) -> (Tensor, Tensor, Tensor)"
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require(ok: bool, rule: str, got: object, op: str = _OP) -> None:
    # The sentence of csrc/checks.h. `got` is formatted only when it is needed: this runs at every call.
    if not ok:
        if isinstance(got, Tensor):
            got = list(got.shape)
        raise ValueError(f"{op}: expected {rule}, got {_name(got) if isinstance(got, torch.dtype) else got}")


def _check_dtypes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    served = _DTYPES if x.device.type == "cpu" else _DTYPES[:3]
    _require(x.dtype in served, f"x in {', '.join(map(_name, served))}", x.dtype, op)
    _require(weight.dtype == x.dtype, f"weight in x's dtype {_name(x.dtype)}", weight.dtype, op)
    if bias is not None:
        _require(bias.dtype == x.dtype, f"bias in x's dtype {_name(x.dtype)}", bias.dtype, op)
    same = lora_A.dtype == x.dtype or (lora_A.dtype == torch.float32 and x.dtype != torch.float64)
    _require(same, f"lora_A in float32 or x's dtype {_name(x.dtype)}", lora_A.dtype, op)
    _require(lora_B.dtype == lora_A.dtype, f"lora_B in lora_A's dtype {_name(lora_A.dtype)}", lora_B.dtype, op)


def _check_dropout(op: str, x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> None:
    _require(0.0 <= dropout_p < 1.0 and round(dropout_p * 65536) < 65536, _RULE_P, dropout_p, op)
    _require(0 <= stream < 2**32, "stream in [0, 2^32)", stream, op)
    if seed is None:
        _require(dropout_p == 0.0, "a seed where dropout_p > 0 in training", None, op)
        return
    _require(seed.dtype == torch.int64, "seed in int64", seed.dtype, op)
    _require(seed.numel() == 1, "seed of one element", seed, op)
    _require(seed.device == x.device, f"seed on x's device {x.device}", seed.device, op)


def _check_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> None:
    _require(x.dim() >= 1, "x of shape [..., K]", x)
    K = x.shape[-1]
    _require(weight.dim() == 2 and weight.shape[1] == K, f"weight of shape [N, {K}]", weight)
    N = weight.shape[0]
    _require(bias is None or tuple(bias.shape) == (N,), f"bias of shape [{N}]", bias)
    ok = lora_A.dim() == 2 and 1 <= lora_A.shape[0] <= 256 and lora_A.shape[1] == K
    _require(ok, f"lora_A of shape [r, {K}] with r in [1, 256]", lora_A)
    r = lora_A.shape[0]
    _require(lora_B.dim() == 2 and tuple(lora_B.shape) == (N, r), f"lora_B of shape [{N}, {r}]", lora_B)
    _check_dtypes(_OP, x, weight, bias, lora_A, lora_B)
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor is not None:
            _require(tensor.device == x.device, f"{name} on x's device {x.device}", tensor.device)
    _check_dropout(_OP, x, dropout_p, seed, stream)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    mask: Sequence[bool],
) -> None:
    op = "lora_linear_backward"
    _require(weight.dim() == 2, "weight of shape [N, K]", weight, op)
    (N, K), r = weight.shape, lora_A.shape[0] if lora_A.dim() == 2 else 0
    _require(grad.dim() >= 1 and grad.shape[-1] == N, f"grad of shape [..., {N}]", grad, op)
    ok = lora_A.dim() == 2 and 1 <= r <= 256 and lora_A.shape[1] == K
    _require(ok, f"lora_A of shape [r, {K}] with r in [1, 256]", lora_A, op)
    _require(lora_B.dim() == 2 and tuple(lora_B.shape) == (N, r), f"lora_B of shape [{N}, {r}]", lora_B, op)
    # x is read for lora_A's gradient alone, and s for lora_B's: whoever does not ask may pass empty tensors.
    rows = list(grad.shape[:-1])
    _require(not mask[1] or list(x.shape) == [*rows, K], f"x of shape {[*rows, K]}", x, op)
    _require(not mask[2] or list(s.shape) == [*rows, r], f"s of shape {[*rows, r]}", s, op)
    _check_dtypes(op, grad, weight, None, lora_A, lora_B)
    _require(x.dtype == grad.dtype, f"x in grad's dtype {_name(grad.dtype)}", x.dtype, op)
    wide = torch.promote_types(grad.dtype, torch.float32)
    _require(s.dtype == wide, f"s in {_name(wide)}", s.dtype, op)
    for name, tensor in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("s", s)):
        _require(tensor.device == grad.device, f"{name} on grad's device {grad.device}", tensor.device, op)
    _check_dropout(op, grad, dropout_p, seed, stream)


def _forward_reference(
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
    _check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream)
    wide = torch.promote_types(x.dtype, torch.float32)
    s = _dropped(x, dropout_p, seed, stream) @ lora_A.to(wide).T
    y = torch.nn.functional.linear(x, weight, bias)
    return y + (scaling * (s @ lora_B.to(wide).T)).to(y.dtype), s


def _backward_reference(
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
    _check_backward(grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask)
    wide = torch.promote_types(grad.dtype, torch.float32)
    ds = scaling * (grad.to(wide) @ lora_B.to(wide))
    dx, dA, dB = grad.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
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

    x, weight, bias, lora_A, lora_B, _, dropout_p, seed, stream = args
    _check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream)
    y, s = kernels.lora_linear(*args)
    return y, s


def _backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from collm_fast.kernels import lora as kernels

    _check_backward(*args[:6], *args[7:])
    dx, dA, dB = kernels.lora_linear_backward(*args)
    return dx, dA, dB


_native.register("lora_linear", reference=_forward_reference, triton=_forward_triton)
_native.register("lora_linear_backward", reference=_backward_reference, triton=_backward_triton)


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
    _check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream)
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
    _check_backward(grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask)
    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if mask[0] else (0,)),
        lora_A.new_empty(lora_A.shape if mask[1] else (0,)),
        lora_B.new_empty(lora_B.shape if mask[2] else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, stream = inputs
    _check_frozen(weight, bias)
    s = output[1]
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.scaling, ctx.dropout_p, ctx.stream = scaling, dropout_p, stream
    # Frozen adapters (stage 2) keep nothing: x serves only lora_A's gradient, and s only lora_B's.
    none = s.new_empty(0)
    kept_x = x if ctx.needs_input_grad[3] else none.to(x.dtype)
    ctx.save_for_backward(kept_x, weight, lora_A, lora_B, s if ctx.needs_input_grad[4] else none, seed)


def _backward(ctx: Any, grad: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | float | None, ...]:
    if grad is None:
        return (None,) * 9
    x, weight, lora_A, lora_B, s, seed = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
    grads = torch.ops.collm_fast.lora_linear_backward(
        grad, x, weight, lora_A, lora_B, s, ctx.scaling, ctx.dropout_p, seed, ctx.stream, mask
    )
    dx, dA, dB = (g if wanted else None for g, wanted in zip(grads, mask, strict=True))
    return dx, None, None, dA, dB, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError(f"{_OP}: expected a first derivative, got a request for the second")


torch.library.register_autograd("collm_fast::lora_linear", _backward, setup_context=_setup_context, lib=_native.LIBRARY)
torch.library.register_autograd("collm_fast::lora_linear_backward", _no_second_derivative, lib=_native.LIBRARY)


def _check_frozen(weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            _require(False, f"{name} without requires_grad", "requires_grad=True")


def _seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    if seed is None or isinstance(seed, Tensor):
        return seed
    _require(-(2**63) <= seed < 2**63, "seed in the range of int64", seed)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    # As torch's own linear: the frozen product runs in the autocast dtype. lora_A and lora_B keep their dtype.
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


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
    _require((lora_A is None) == (lora_B is None), "lora_A and lora_B both given or both None", "one of them")
    if torch.is_grad_enabled():
        _check_frozen(weight, bias)
    _require(0.0 <= dropout_p < 1.0 and round(dropout_p * 65536) < 65536, _RULE_P, dropout_p)
    x, weight, bias = _autocast(x, weight, bias)
    if lora_A is None or lora_B is None:
        return torch.nn.functional.linear(x, weight, bias)
    p = dropout_p if training else 0.0
    seed = _seed_tensor(seed, x.device) if p > 0.0 else None
    # The registered kernel checks too (it can be called directly), but torch turns its errors into RuntimeError.
    _check_forward(x, weight, bias, lora_A, lora_B, p, seed, stream)
    y, _ = torch.ops.collm_fast.lora_linear(x, weight, bias, lora_A, lora_B, scaling, p, seed, stream)
    return y


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    training: bool = False,
) -> list[Tensor]:
    """`lora_linear` for several projections of one x (q, k and v; gate and up).

        y_j = x W_j^T + b_j + scaling * dropout_j(x) A_j^T B_j^T

    Args:
        x: [..., K].
        weights, biases, lora_As, lora_Bs: lists of equal length; None where a projection has no bias or no adapter.
        seed, dropout_p, training: as in `lora_linear`; projection j draws its own mask, that of stream j.
    Returns: a list of [..., N_j].
    Raises: ValueError as `lora_linear`, or where the lists differ in length.
    """
    lengths = [len(weights), len(biases), len(lora_As), len(lora_Bs)]
    _require(len(set(lengths)) == 1, "lists of equal length", lengths, "lora_linear_group")
    seed = _seed_tensor(seed, x.device)
    return [
        lora_linear(x, w, b, lora_a, lora_b, scaling, dropout_p=dropout_p, seed=seed, training=training, stream=j)
        for j, (w, b, lora_a, lora_b) in enumerate(zip(weights, biases, lora_As, lora_Bs, strict=True))
    ]

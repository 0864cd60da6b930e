"""The argument checks of lora_linear, lora_linear_group and their backwards: public functions, fake, Triton, reference.

csrc/lora_checks.h says the same sentences for the compiled kernels. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collm_fast.ops import _arguments
from collm_fast.ops._arguments import dtype_name

_OP = "lora_linear"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Place:
    """Whose arguments these are: an op's own, or those of one projection of a group."""

    op: str = _OP
    index: int | None = None

    def name(self, argument: str) -> str:
        """weight, or weights[1]."""
        if self.index is None:
            return argument
        return f"{argument}{'es' if argument == 'bias' else 's'}[{self.index}]"


_ALONE, _ALONE_BACKWARD = Place(), Place(f"{_OP}_backward")


def require(ok: bool, rule: str, got: object, op: str = _OP) -> None:
    _arguments.require(ok, op, rule, got)


def _check_linear_dtypes(at: Place, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    served = _DTYPES[:3] if x.device.type == "cuda" else _DTYPES
    kind = dtype_name(x.dtype)
    require(x.dtype in served, f"x in {', '.join(map(dtype_name, served))}", x.dtype, at.op)
    require(weight.dtype == x.dtype, f"{at.name('weight')} in x's dtype {kind}", weight.dtype, at.op)
    if bias is not None:
        require(bias.dtype == x.dtype, f"{at.name('bias')} in x's dtype {kind}", bias.dtype, at.op)


def _check_dtypes(at: Place, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    _check_linear_dtypes(at, x, weight, bias)
    A, B = at.name("lora_A"), at.name("lora_B")
    same = lora_A.dtype == x.dtype or (lora_A.dtype == torch.float32 and x.dtype != torch.float64)
    require(same, f"{A} in float32 or x's dtype {dtype_name(x.dtype)}", lora_A.dtype, at.op)
    require(lora_B.dtype == lora_A.dtype, f"{B} in {A}'s dtype {dtype_name(lora_A.dtype)}", lora_B.dtype, at.op)


def check_probability(dropout_p: float, op: str = _OP) -> None:
    if not (0.0 <= dropout_p < 1.0 and round(dropout_p * 65536) < 65536):
        require(False, "dropout_p in [0, 1) with round(dropout_p 2^16) below 2^16", dropout_p, op)


def _check_dropout(op: str, x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> None:
    check_probability(dropout_p, op)
    require(0 <= stream < 2**32, "stream in [0, 2^32)", stream, op)
    if seed is None:
        require(dropout_p == 0.0, "a seed where dropout_p > 0 in training", None, op)
        return
    require(seed.dtype == torch.int64, "seed in int64", seed.dtype, op)
    require(seed.numel() == 1, "seed of one element", seed, op)
    require(seed.device == x.device, f"seed on x's device {x.device}", seed.device, op)


def _check_linear_shapes(at: Place, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Returns (N, K)."""
    require(x.dim() >= 1, "x of shape [..., K]", x, at.op)
    K = x.shape[-1]
    ok = weight.dim() == 2 and weight.shape[1] == K
    require(ok, f"{at.name('weight')} of shape [N, {K}]", weight, at.op)
    N = weight.shape[0]
    require(bias is None or tuple(bias.shape) == (N,), f"{at.name('bias')} of shape [{N}]", bias, at.op)
    return N, K


def _check_adapters(at: Place, N: int, K: int, lora_A: Tensor, lora_B: Tensor) -> int:
    """Returns r."""
    ok = lora_A.dim() == 2 and 1 <= lora_A.shape[0] <= 256 and lora_A.shape[1] == K
    require(ok, f"{at.name('lora_A')} of shape [r, {K}] with r in [1, 256]", lora_A, at.op)
    r = lora_A.shape[0]
    ok = lora_B.dim() == 2 and tuple(lora_B.shape) == (N, r)
    require(ok, f"{at.name('lora_B')} of shape [{N}, {r}]", lora_B, at.op)
    return r


def _check_devices(at: Place, of: str, x: Tensor, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.device == x.device, f"{at.name(name)} on {of}'s device {x.device}", tensor.device, at.op)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, at: Place = _ALONE) -> None:
    """The same rules where there is no adapter."""
    _check_linear_shapes(at, x, weight, bias)
    _check_linear_dtypes(at, x, weight, bias)
    _check_devices(at, "x", x, {"weight": weight, "bias": bias})


def check_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    at: Place = _ALONE,
) -> None:
    N, K = _check_linear_shapes(at, x, weight, bias)
    _check_adapters(at, N, K, lora_A, lora_B)
    _check_dtypes(at, x, weight, bias, lora_A, lora_B)
    _check_devices(at, "x", x, {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B})
    _check_dropout(at.op, x, dropout_p, seed, stream)


def check_backward(
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
    at: Place = _ALONE_BACKWARD,
) -> None:
    op, name = at.op, at.name("grad")
    require(len(mask) == 3, "mask of 3 booleans", len(mask), op)
    N, K = _check_gradient(at, grad, weight)
    r = _check_adapters(at, N, K, lora_A, lora_B)
    # x is read for lora_A's gradient alone, and s for lora_B's: whoever does not ask may pass empty tensors.
    rows = list(grad.shape[:-1])
    require(not mask[1] or list(x.shape) == [*rows, K], f"x of shape {[*rows, K]}", x, op)
    require(not mask[2] or list(s.shape) == [*rows, r], f"{at.name('s')} of shape {[*rows, r]}", s, op)
    _check_dtypes(at, grad, weight, None, lora_A, lora_B)
    require(x.dtype == grad.dtype, f"x in {name}'s dtype {dtype_name(grad.dtype)}", x.dtype, op)
    wide = torch.promote_types(grad.dtype, torch.float32)
    require(s.dtype == wide, f"{at.name('s')} in {dtype_name(wide)}", s.dtype, op)
    require(x.device == grad.device, f"x on {name}'s device {grad.device}", x.device, op)
    _check_devices(at, name, grad, {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "s": s})
    _check_dropout(op, grad, dropout_p, seed, stream)


def _check_gradient(at: Place, grad: Tensor, weight: Tensor) -> tuple[int, int]:
    """Returns (N, K)."""
    require(weight.dim() == 2, f"{at.name('weight')} of shape [N, K]", weight, at.op)
    N, K = weight.shape
    ok = grad.dim() >= 1 and grad.shape[-1] == N
    require(ok, f"{at.name('grad')} of shape [..., {N}]", grad, at.op)
    return N, K


def is_there(tensor: Tensor) -> bool:
    """Whether an entry of a group's list stands for itself: what is absent is a tensor without dimensions."""
    return tensor.dim() > 0


def check_group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    dropout_p: float,
    seeds: Sequence[Tensor],
    streams: Sequence[int],
) -> None:
    op = "lora_linear_group"
    _check_lengths(op, weights, biases, lora_As, lora_Bs, streams, seeds or streams)
    for j, (weight, bias, lora_A, lora_B) in enumerate(zip(weights, biases, lora_As, lora_Bs, strict=True)):
        at, b = Place(op, j), bias if is_there(bias) else None
        if _has_adapter(at, lora_A, lora_B):
            check_forward(x, weight, b, lora_A, lora_B, dropout_p, seeds[j] if seeds else None, streams[j], at)
        else:
            check_linear(x, weight, b, at)


def check_group_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    ss: Sequence[Tensor],
    dropout_p: float,
    seeds: Sequence[Tensor],
    streams: Sequence[int],
    dx: bool,
    dA: Sequence[bool],
    dB: Sequence[bool],
) -> None:
    op = "lora_linear_group_backward"
    _check_lengths(op, grads, weights, lora_As, lora_Bs, ss, dA, dB, streams, seeds or streams)
    given = [j for j, grad in enumerate(grads) if is_there(grad)]
    require(len(given) > 0, "a gradient of one projection at least", "none", op)
    first = given[0]
    for j in given:
        at, grad, weight = Place(op, j), grads[j], weights[j]
        N, K = _check_gradient(at, grad, weight)
        shape = [*grads[first].shape[:-1], N]
        require(list(grad.shape) == shape, f"{at.name('grad')} of shape {shape}", grad, op)
        shape = [N, weights[first].shape[1]]
        require(list(weight.shape) == shape, f"{at.name('weight')} of shape {shape}", weight, op)
        require(
            grad.dtype == grads[first].dtype, f"grads in one dtype {dtype_name(grads[first].dtype)}", grad.dtype, op
        )
        if _has_adapter(at, lora_As[j], lora_Bs[j]):
            mask, seed = (dx, dA[j], dB[j]), seeds[j] if seeds else None
            check_backward(grad, x, weight, lora_As[j], lora_Bs[j], ss[j], dropout_p, seed, streams[j], mask, at)
        else:
            require(not dA[j] and not dB[j], f"an adapter of projection {j} whose gradient is asked for", "none", op)
            _check_linear_dtypes(at, grad, weight, None)
            _check_devices(at, at.name("grad"), grad, {"weight": weight})
        _check_devices(at, Place(op, first).name("grad"), grads[first], {"grad": grad})
    # It chose the backend, wanted or not.
    _check_devices(Place(op), Place(op, first).name("grad"), grads[first], {"x": x})


def _check_lengths(op: str, *lists: Sequence[object]) -> None:
    lengths = [len(entries) for entries in lists]
    require(len(set(lengths)) == 1, "lists of equal length", lengths, op)


def _has_adapter(at: Place, lora_A: Tensor, lora_B: Tensor) -> bool:
    both = is_there(lora_A) == is_there(lora_B)
    require(both, f"{at.name('lora_A')} and {at.name('lora_B')} both given or both absent", "one of them", at.op)
    return is_there(lora_A)


def check_frozen(weight: Tensor, bias: Tensor | None, at: Place = _ALONE) -> None:
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        name = at.name("weight" if weight.requires_grad else "bias")
        require(False, f"{name} without requires_grad", "requires_grad=True", at.op)


def check_group_frozen(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            check_frozen(weight, bias, Place("lora_linear_group", j))

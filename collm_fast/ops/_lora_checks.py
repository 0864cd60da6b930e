"""The argument checks of lora_linear and its backward, for the public function, the fake, Triton and the reference.

csrc/lora_checks.h says the same sentences for the compiled kernels. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collm_fast.ops import _arguments
from collm_fast.ops._arguments import dtype_name

_OP = "lora_linear"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(ok: bool, rule: str, got: object, op: str = _OP) -> None:
    _arguments.require(ok, op, rule, got)


def _check_linear_dtypes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    served = _DTYPES[:3] if x.device.type == "cuda" else _DTYPES
    require(x.dtype in served, f"x in {', '.join(map(dtype_name, served))}", x.dtype, op)
    require(weight.dtype == x.dtype, f"weight in x's dtype {dtype_name(x.dtype)}", weight.dtype, op)
    if bias is not None:
        require(bias.dtype == x.dtype, f"bias in x's dtype {dtype_name(x.dtype)}", bias.dtype, op)


def _check_dtypes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    _check_linear_dtypes(op, x, weight, bias)
    same = lora_A.dtype == x.dtype or (lora_A.dtype == torch.float32 and x.dtype != torch.float64)
    require(same, f"lora_A in float32 or x's dtype {dtype_name(x.dtype)}", lora_A.dtype, op)
    require(lora_B.dtype == lora_A.dtype, f"lora_B in lora_A's dtype {dtype_name(lora_A.dtype)}", lora_B.dtype, op)


def check_probability(dropout_p: float, op: str = _OP) -> None:
    ok = 0.0 <= dropout_p < 1.0 and round(dropout_p * 65536) < 65536
    require(ok, "dropout_p in [0, 1) with round(dropout_p 2^16) below 2^16", dropout_p, op)


def _check_dropout(op: str, x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> None:
    check_probability(dropout_p, op)
    require(0 <= stream < 2**32, "stream in [0, 2^32)", stream, op)
    if seed is None:
        require(dropout_p == 0.0, "a seed where dropout_p > 0 in training", None, op)
        return
    require(seed.dtype == torch.int64, "seed in int64", seed.dtype, op)
    require(seed.numel() == 1, "seed of one element", seed, op)
    require(seed.device == x.device, f"seed on x's device {x.device}", seed.device, op)


def _check_linear_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Returns (N, K)."""
    require(x.dim() >= 1, "x of shape [..., K]", x)
    K = x.shape[-1]
    require(weight.dim() == 2 and weight.shape[1] == K, f"weight of shape [N, {K}]", weight)
    N = weight.shape[0]
    require(bias is None or tuple(bias.shape) == (N,), f"bias of shape [{N}]", bias)
    return N, K


def _check_devices(x: Tensor, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.device == x.device, f"{name} on x's device {x.device}", tensor.device)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The same rules where there is no adapter and torch's linear does the work."""
    _check_linear_shapes(x, weight, bias)
    _check_linear_dtypes(_OP, x, weight, bias)
    _check_devices(x, {"weight": weight, "bias": bias})


def check_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> None:
    N, K = _check_linear_shapes(x, weight, bias)
    ok = lora_A.dim() == 2 and 1 <= lora_A.shape[0] <= 256 and lora_A.shape[1] == K
    require(ok, f"lora_A of shape [r, {K}] with r in [1, 256]", lora_A)
    r = lora_A.shape[0]
    require(lora_B.dim() == 2 and tuple(lora_B.shape) == (N, r), f"lora_B of shape [{N}, {r}]", lora_B)
    _check_dtypes(_OP, x, weight, bias, lora_A, lora_B)
    _check_devices(x, {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B})
    _check_dropout(_OP, x, dropout_p, seed, stream)


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
) -> None:
    op = "lora_linear_backward"
    require(len(mask) == 3, "mask of 3 booleans", len(mask), op)
    require(weight.dim() == 2, "weight of shape [N, K]", weight, op)
    (N, K), r = weight.shape, lora_A.shape[0] if lora_A.dim() == 2 else 0
    require(grad.dim() >= 1 and grad.shape[-1] == N, f"grad of shape [..., {N}]", grad, op)
    ok = lora_A.dim() == 2 and 1 <= r <= 256 and lora_A.shape[1] == K
    require(ok, f"lora_A of shape [r, {K}] with r in [1, 256]", lora_A, op)
    require(lora_B.dim() == 2 and tuple(lora_B.shape) == (N, r), f"lora_B of shape [{N}, {r}]", lora_B, op)
    # x is read for lora_A's gradient alone, and s for lora_B's: whoever does not ask may pass empty tensors.
    rows = list(grad.shape[:-1])
    require(not mask[1] or list(x.shape) == [*rows, K], f"x of shape {[*rows, K]}", x, op)
    require(not mask[2] or list(s.shape) == [*rows, r], f"s of shape {[*rows, r]}", s, op)
    _check_dtypes(op, grad, weight, None, lora_A, lora_B)
    require(x.dtype == grad.dtype, f"x in grad's dtype {dtype_name(grad.dtype)}", x.dtype, op)
    wide = torch.promote_types(grad.dtype, torch.float32)
    require(s.dtype == wide, f"s in {dtype_name(wide)}", s.dtype, op)
    for name, tensor in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("s", s)):
        require(tensor.device == grad.device, f"{name} on grad's device {grad.device}", tensor.device, op)
    _check_dropout(op, grad, dropout_p, seed, stream)


def check_frozen(weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            require(False, f"{name} without requires_grad", "requires_grad=True")

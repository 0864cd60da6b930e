"""LoRA linears that read the same x (q, k and v; gate and up): schema, fake, autograd formula, the public function.

One op, so that backward makes a single dx and keeps x once. A list of a schema holds tensors only: what is absent (a
bias, an adapter, a gradient nobody has) is a tensor without dimensions. One projection alone is lora.py; the kernels
are csrc/cpu/lora.cpp, csrc/cuda/lora.cuh and kernels/lora_group.py. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collm_fast import _native
from collm_fast.ops._arguments import seed_tensor, without_autocast
from collm_fast.ops._autograd import register_autograd
from collm_fast.ops._device_errors import raise_device_errors
from collm_fast.ops._lora_checks import (
    Place,
    check_group_backward,
    check_group_forward,
    check_group_frozen,
    check_linear,
    check_probability,
    is_there,
    require,
)
from collm_fast.ops.lora import autocast_dtype, backward_reference, forward_reference

_OP = "lora_linear_group"
_native.LIBRARY.define(
    f"{_OP}(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_As, Tensor[] lora_Bs, float scaling, "
    "float dropout_p, Tensor[] seeds, int[] streams) -> (Tensor[], Tensor[])"
)
_native.LIBRARY.define(
    f"{_OP}_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] ss, "
    "float scaling, float dropout_p, Tensor[] seeds, int[] streams, bool dx, bool[] dA, bool[] dB) "
    "-> (Tensor, Tensor[], Tensor[])"
)

Tensors = Sequence[Tensor]
Grads = tuple[Tensor, list[Tensor], list[Tensor]]


def _forward_reference(
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scaling: float,
    dropout_p: float,
    seeds: Tensors,
    streams: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    check_group_forward(x, weights, biases, lora_As, lora_Bs, dropout_p, seeds, streams)
    ys, ss = [], []
    for j, (weight, bias, lora_A, lora_B) in enumerate(zip(weights, biases, lora_As, lora_Bs, strict=True)):
        b = bias if is_there(bias) else None
        if is_there(lora_A):
            mask = (dropout_p, seeds[j] if seeds else None, streams[j])
            y, s = forward_reference(x, weight, b, lora_A, lora_B, scaling, *mask)
        else:
            with without_autocast():
                y, s = torch.nn.functional.linear(x, weight, b), _absent(x)
        ys.append(y)
        ss.append(s)
    return ys, ss


def _backward_reference(
    grads: Tensors,
    x: Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    ss: Tensors,
    scaling: float,
    dropout_p: float,
    seeds: Tensors,
    streams: Sequence[int],
    dx: bool,
    dA: Sequence[bool],
    dB: Sequence[bool],
) -> Grads:
    check_group_backward(grads, x, weights, lora_As, lora_Bs, ss, dropout_p, seeds, streams, dx, dA, dB)
    total, dAs, dBs = None, [], []
    for j, (grad, weight, lora_A, lora_B, s) in enumerate(zip(grads, weights, lora_As, lora_Bs, ss, strict=True)):
        part, a, b = grad, lora_A.new_empty(0), lora_B.new_empty(0)
        if is_there(grad) and is_there(lora_A):
            mask, wanted = (dropout_p, seeds[j] if seeds else None, streams[j]), [dx, dA[j], dB[j]]
            part, a, b = backward_reference(grad, x, weight, lora_A, lora_B, s, scaling, *mask, wanted)
        elif is_there(grad) and dx:
            with without_autocast():
                part = grad @ weight
        if is_there(grad) and dx:
            total = part if total is None else total.add_(part)
        dAs.append(a)
        dBs.append(b)
    return x.new_empty(0) if total is None else total, dAs, dBs


def _absent(like: Tensor) -> Tensor:
    """s where there is no adapter."""
    return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))


def _forward_triton(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    from collm_fast.kernels import lora_group as kernels

    raise_device_errors()
    check_group_forward(*args[:5], *args[6:])
    with without_autocast():
        ys, ss = kernels.lora_linear_group(*args)
    return ys, ss


def _backward_triton(*args: Any) -> Grads:
    from collm_fast.kernels import lora_group as kernels

    raise_device_errors()
    check_group_backward(*args[:6], *args[7:])
    with without_autocast():
        dx, dAs, dBs = kernels.lora_linear_group_backward(*args)
    return dx, dAs, dBs


_native.register(_OP, reference=_forward_reference, triton=_forward_triton)
_native.register(f"{_OP}_backward", reference=_backward_reference, triton=_backward_triton)


@torch.library.register_fake(f"collm_fast::{_OP}", lib=_native.LIBRARY)
def _forward_fake(
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scaling: float,
    dropout_p: float,
    seeds: Tensors,
    streams: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    check_group_forward(x, weights, biases, lora_As, lora_Bs, dropout_p, seeds, streams)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[:-1]
    ys = [x.new_empty((*rows, weight.shape[0])) for weight in weights]
    ss = [x.new_empty((*rows, A.shape[0]), dtype=wide) if is_there(A) else _absent(x) for A in lora_As]
    return ys, ss


@torch.library.register_fake(f"collm_fast::{_OP}_backward", lib=_native.LIBRARY)
def _backward_fake(
    grads: Tensors,
    x: Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    ss: Tensors,
    scaling: float,
    dropout_p: float,
    seeds: Tensors,
    streams: Sequence[int],
    dx: bool,
    dA: Sequence[bool],
    dB: Sequence[bool],
) -> Grads:
    check_group_backward(grads, x, weights, lora_As, lora_Bs, ss, dropout_p, seeds, streams, dx, dA, dB)
    given = [is_there(grad) for grad in grads]
    first = given.index(True)
    rows, K = grads[first].shape[:-1], weights[first].shape[1]

    def made(factors: Tensors, wanted: Sequence[bool]) -> list[Tensor]:
        return [
            f.new_empty(f.shape if want and there else (0,))
            for f, want, there in zip(factors, wanted, given, strict=True)
        ]

    return grads[first].new_empty((*rows, K) if dx else (0,)), made(lora_As, dA), made(lora_Bs, dB)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    x, weights, biases, lora_As, lora_Bs, scaling, dropout_p, seeds, streams = inputs
    check_group_frozen(weights, biases)
    ss = output[1]
    ctx.mark_non_differentiable(*ss)
    ctx.set_materialize_grads(False)
    ctx.scaling, ctx.dropout_p, ctx.streams = scaling, dropout_p, streams
    # Frozen adapters (stage 2) keep nothing: x serves only the gradients of lora_As, and s_j only that of lora_Bs[j].
    kept_x = x if any(A.requires_grad for A in lora_As) else x.new_empty(())
    kept_ss = [s if B.requires_grad else s.new_empty(()) for s, B in zip(ss, lora_Bs, strict=True)]
    ctx.save_for_backward(kept_x, *weights, *lora_As, *lora_Bs, *kept_ss, *seeds)


def _backward(ctx: Any, grads: Sequence[Tensor | None], grad_ss: Sequence[Tensor | None]) -> tuple[Any, ...]:
    count = len(grads)
    x, *saved = ctx.saved_tensors
    weights, lora_As, lora_Bs, ss, seeds = (saved[i * count : (i + 1) * count] for i in range(5))
    nothing: list[Tensor | None] = [None] * count
    rest = None, None, [None] * len(seeds), None
    needs_x, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
    given = [grad is not None for grad in grads]
    first = next((grad for grad in grads if grad is not None), None)
    if first is None:
        return None, nothing, nothing, nothing, nothing, *rest
    # An output that nobody used costs nothing.
    dA = [need and there for need, there in zip(needs_A, given, strict=True)]
    dB = [need and there for need, there in zip(needs_B, given, strict=True)]
    there = [first.new_empty(()) if grad is None else grad for grad in grads]
    mask = ctx.dropout_p, seeds, ctx.streams
    dx, dAs, dBs = _lora_linear_group_backward(
        there, x, weights, lora_As, lora_Bs, ss, ctx.scaling, *mask, needs_x, dA, dB
    )
    found_A = [g if wanted else None for g, wanted in zip(dAs, dA, strict=True)]
    found_B = [g if wanted else None for g, wanted in zip(dBs, dB, strict=True)]
    return dx if needs_x else None, nothing, nothing, found_A, found_B, *rest


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Grads) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple[None, ...]:
    raise RuntimeError(f"{_OP}: expected a first derivative, got a request for the second")


_lora_linear_group = register_autograd(_OP, _backward, _setup_context)
_lora_linear_group_backward = register_autograd(f"{_OP}_backward", _no_second_derivative, _keep_nothing)


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
    """`lora_linear` for several projections of one x (q, k and v; gate and up), with a single dx in backward.

        y_j = x W_j^T + b_j + scaling * dropout_j(x) A_j^T B_j^T
        dx = sum_j (dy_j W_j + mask_j o (ds_j A_j)),  ds_j = scaling dy_j B_j

    Args:
        x: [..., K].
        weights, biases, lora_As, lora_Bs: lists of equal length; None where a projection has no bias or no adapter.
        seed, dropout_p, training: as in `lora_linear`; projection j draws its own mask, that of stream j.
    Returns: a list of [..., N_j]. An output that is not used costs nothing in backward; x is kept once.
    Raises: ValueError as `lora_linear`, or where the lists differ in length.
    """
    check_probability(dropout_p, _OP)
    p, count = dropout_p if training else 0.0, len(weights)
    given = seed_tensor(_OP, seed, x.device) if p > 0.0 else None
    seeds = [] if given is None else [given] * count
    return project_group(x, weights, biases, lora_As, lora_Bs, scaling, p, seeds, range(count))


def project_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scaling: float,
    dropout_p: float,
    seeds: Sequence[Tensor],
    streams: Sequence[int],
) -> list[Tensor]:
    """`lora_linear_group` in training, where projection j draws the mask of stream streams[j] of seeds[j].

    Layers that were made one by one (models/lora.py) have a seed each. seeds: [] where dropout_p is 0.
    """
    lengths = [len(weights), len(biases), len(lora_As), len(lora_Bs)]
    require(len(set(lengths)) == 1, "lists of equal length", lengths, _OP)
    if torch.is_grad_enabled():
        check_group_frozen(weights, biases)
    for name, entries in (("biases", biases), ("lora_As", lora_As), ("lora_Bs", lora_Bs)):
        for j, entry in enumerate(entries):
            # Without dimensions it would stand for one that is absent.
            require(entry is None or is_there(entry), f"{name}[{j}] of one dimension at least", entry, _OP)
    for j, (A, B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
        if (A is None) != (B is None):
            require(False, f"lora_As[{j}] and lora_Bs[{j}] both given or both None", "one of them", _OP)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    if all(A is None for A in lora_As):
        for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            check_linear(x, weight, bias, Place(_OP, j))
        return [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    absent = x.new_empty(())

    def filled(entries: Sequence[Tensor | None]) -> list[Tensor]:
        return [absent if entry is None else entry for entry in entries]

    factors = filled(lora_As), filled(lora_Bs)
    args = (x, list(weights), filled(biases), *factors, scaling, dropout_p, list(seeds), list(streams))
    ys: list[Tensor] = _lora_linear_group(*args)[0]
    return list(ys)

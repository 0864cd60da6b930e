"""Triton kernels of lora_linear and their launchers: project, expand and outer, as in csrc/cuda/lora.cuh.

project: s = scale dropout(v) F^T; expand: b + mask (s F); outer: partial sums of s^T dropout(v). The mask is drawn in
the pass that reads or writes the element. The dense products are torch's, with beta = 1. Arguments were checked by
collm_fast/ops/lora.py. Imports torch, triton and its neighbours device.py and lora_table.py only.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from collm_fast.kernels import lora_table
from collm_fast.kernels.device import on
from torch import Tensor


@triton.jit
def dropout_keep(seed, rows, first_column, stream, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_M, BLOCK_C] bool, the mask of reference.dropout_mask; first_column is a multiple of 8."""
    block = first_column // 8 + tl.arange(0, BLOCK_C // 8)
    zero = tl.zeros((BLOCK_M, BLOCK_C // 8), tl.int64)
    row = zero + rows[:, None]
    w0, w1, w2, w3 = tl.philox(
        seed,
        (zero + block[None, :]).to(tl.int32),
        row.to(tl.int32),
        (row >> 32).to(tl.int32),
        (zero + stream).to(tl.int32),
    )
    # Column 8 b + i reads half i of counter b: low and high halves of words 0 to 3, in this order.
    even = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(even, odd).to(tl.int32) >= threshold


@triton.jit
def mask_kernel(out, seed, M, C, first_row, stream, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The mask alone, [M, C] int8: for tests and for whoever wants to look at it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    column = first + tl.arange(0, BLOCK_C)
    keep = dropout_keep(tl.load(seed), row + first_row, first, stream, threshold, BLOCK_M, BLOCK_C)
    inside = (row < M)[:, None] & (column < C)[None, :]
    tl.store(out + row[:, None] * C + column[None, :], keep.to(tl.int8), mask=inside)


@triton.jit
def project_kernel(
    out,
    v,
    factor,
    seed,
    M,
    C,
    r,
    v_row,
    factor_j,
    factor_c,
    scale,
    stream,
    threshold,
    DROP: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):
    """out [M, r] = scale * (v [M, C], dropped) factor [r, C]^T. One program takes BLOCK_M rows and RANK ranks."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = (tl.program_id(1) * RANK + tl.arange(0, RANK)).to(tl.int64)
    total = tl.zeros((BLOCK_M, RANK), dtype=SUM)
    for first in range(0, C, BLOCK_C):
        column = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (row < M)[:, None] & (column < C)[None, :]
        # The interpreter computes wrongly in bfloat16: everything is widened right after the load.
        value = tl.load(v + row[:, None] * v_row + column[None, :], mask=inside, other=0).to(SUM)
        if DROP:
            keep = dropout_keep(tl.load(seed), row, first, stream, threshold, BLOCK_M, BLOCK_C)
            value = tl.where(keep, value, 0.0)
        there = (column < C)[:, None] & (rank < r)[None, :]
        f = tl.load(factor + rank[None, :] * factor_j + column[:, None] * factor_c, mask=there, other=0).to(SUM)
        total += tl.dot(value, f, input_precision="ieee", out_dtype=SUM)
    inside = (row < M)[:, None] & (rank < r)[None, :]
    tl.store(out + row[:, None] * r + rank[None, :], total * scale, mask=inside)


@triton.jit
def expand_kernel(
    out,
    s,
    factor,
    bias,
    seed,
    M,
    C,
    r,
    factor_j,
    factor_c,
    bias_column,
    scale,
    stream,
    threshold,
    DROP: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):
    """out [M, C] = bias + (scale s [M, r] factor [r, C], dropped). One program takes a tile of out."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    column = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    value = tl.zeros((BLOCK_M, BLOCK_C), dtype=SUM)
    for first_rank in range(0, r, RANK):
        rank = (first_rank + tl.arange(0, RANK)).to(tl.int64)
        there = (row < M)[:, None] & (rank < r)[None, :]
        coefficient = tl.load(s + row[:, None] * r + rank[None, :], mask=there, other=0).to(SUM) * scale
        there = (rank < r)[:, None] & (column < C)[None, :]
        f = tl.load(factor + rank[:, None] * factor_j + column[None, :] * factor_c, mask=there, other=0).to(SUM)
        value += tl.dot(coefficient, f, input_precision="ieee", out_dtype=SUM)
    if DROP:
        keep = dropout_keep(tl.load(seed), row, first, stream, threshold, BLOCK_M, BLOCK_C)
        value = tl.where(keep, value, 0.0)
    if BIAS:
        value += tl.load(bias + column * bias_column, mask=column < C, other=0).to(SUM)[None, :]
    inside = (row < M)[:, None] & (column < C)[None, :]
    tl.store(out + row[:, None] * C + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(
    partial,
    v,
    s,
    seed,
    M,
    C,
    r,
    v_row,
    rows_per_part,
    stream,
    threshold,
    DROP: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):
    """partial[p] [r, C] = s^T (v, dropped) over the rows of part p. One program takes RANK x BLOCK_C of it."""
    first = tl.program_id(0) * BLOCK_C
    part = tl.program_id(1).to(tl.int64)
    column = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    rank = (tl.program_id(2) * RANK + tl.arange(0, RANK)).to(tl.int64)
    end = tl.minimum((part + 1) * rows_per_part, M)
    total = tl.zeros((RANK, BLOCK_C), dtype=SUM)
    for start in range(0, rows_per_part, BLOCK_M):
        row = part * rows_per_part + start + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (column < C)[None, :]
        value = tl.load(v + row[:, None] * v_row + column[None, :], mask=inside, other=0).to(SUM)
        if DROP:
            keep = dropout_keep(tl.load(seed), row, first, stream, threshold, BLOCK_M, BLOCK_C)
            value = tl.where(keep, value, 0.0)
        there = (rank < r)[:, None] & (row < end)[None, :]
        coefficient = tl.load(s + row[None, :] * r + rank[:, None], mask=there, other=0).to(SUM)
        total += tl.dot(coefficient, value, input_precision="ieee", out_dtype=SUM)
    inside = (rank < r)[:, None] & (column < C)[None, :]
    tl.store(partial + (part * r + rank[:, None]) * C + column[None, :], total, mask=inside)


@functools.cache
def _capability(device: torch.device) -> int:
    """10 major + minor of an NVIDIA GPU, 0 elsewhere: AMD numbers its GPUs alike."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def blocks(r: int, kernel: str = "project", v: Tensor | None = None) -> dict[str, int]:
    """Tile sizes, warps and stages for the rows v [M, C] of a kernel, see lora_table.py; None: what serves any GPU."""
    if v is None:
        return {**vars(lora_table.launch_of(kernel, "", r, 0, 0))}
    dtype = str(v.dtype).removeprefix("torch.")
    return {**vars(lora_table.launch_of(kernel, dtype, r, v.shape[1], _capability(v.device)))}


def _sum_type(v: Tensor) -> tl.dtype:
    return tl.float64 if v.dtype == torch.float64 else tl.float32


def _rows(v: Tensor) -> Tensor:
    """[..., C] as [M, C] with contiguous rows; a view where the strides allow it."""
    M = 1
    for size in v.shape[:-1]:
        M *= size
    flat = v.reshape(M, v.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def _threshold(dropout_p: float, seed: Tensor | None) -> int:
    return 0 if seed is None else round(dropout_p * 65536)


def _project(v: Tensor, factor: Tensor, scale: float, seed: Tensor | None, stream: int, threshold: int) -> Tensor:
    """v [M, C], factor [r, C] of any strides -> [M, r]."""
    (M, C), r = v.shape, factor.shape[0]
    out = v.new_empty((M, r), dtype=torch.promote_types(v.dtype, torch.float32))
    size = blocks(r, "project", v)
    with on(v):
        project_kernel[(triton.cdiv(M, size["BLOCK_M"]), triton.cdiv(r, size["RANK"]))](
            out,
            v,
            factor,
            seed if threshold else out,
            M,
            C,
            r,
            v.stride(0),
            *factor.stride(),
            scale,
            stream,
            threshold,
            DROP=threshold > 0,
            SUM=_sum_type(v),
            **size,
        )
    return out


def _expand(
    out: Tensor,
    s: Tensor,
    factor: Tensor,
    scale: float,
    bias: Tensor | None,
    seed: Tensor | None,
    stream: int,
    threshold: int,
) -> None:
    """s [M, r], factor [r, C] of any strides -> out [M, C]."""
    (M, C), r = out.shape, factor.shape[0]
    if C == 0:
        return
    size = blocks(r, "expand", out)
    with on(out):
        expand_kernel[(triton.cdiv(M, size["BLOCK_M"]), triton.cdiv(C, size["BLOCK_C"]))](
            out,
            s,
            factor,
            out if bias is None else bias,
            seed if threshold else s,
            M,
            C,
            r,
            *factor.stride(),
            0 if bias is None else bias.stride(0),
            scale,
            stream,
            threshold,
            DROP=threshold > 0,
            BIAS=bias is not None,
            SUM=_sum_type(out),
            **size,
        )


def _outer(v: Tensor, s: Tensor, scale: float, seed: Tensor | None, stream: int, threshold: int) -> Tensor:
    """v [M, C], s [M, r] -> scale s^T v, [r, C]. The number of parts depends on the shapes alone."""
    (M, C), r = v.shape, s.shape[1]
    if M == 0 or C == 0:
        return s.new_zeros((r, C))
    size = blocks(r, "outer", v)
    fit = max(1, (64 << 20) // (r * C * s.element_size()))
    rows = triton.cdiv(M, min(triton.cdiv(M, 64), 128, fit))
    parts = triton.cdiv(M, rows)
    partial = s.new_empty((parts, r, C))
    with on(v):
        outer_kernel[(triton.cdiv(C, size["BLOCK_C"]), parts, triton.cdiv(r, size["RANK"]))](
            partial,
            v,
            s,
            seed if threshold else s,
            M,
            C,
            r,
            v.stride(0),
            rows,
            stream,
            threshold,
            DROP=threshold > 0,
            SUM=_sum_type(v),
            **size,
        )
    return partial.sum(0).mul_(scale)


def lora_linear(
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
    """x [..., K] -> y [..., N] and s [..., r] = dropout(x) lora_A^T."""
    rows, threshold = _rows(x), _threshold(dropout_p, seed)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if rows.shape[0] == 0:
        return y, x.new_empty((*x.shape[:-1], lora_A.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))
    s = _project(rows, lora_A, 65536 / (65536 - threshold), seed, stream, threshold)
    flat = y.view(rows.shape[0], weight.shape[0])
    _expand(flat, s, lora_B.T, scaling, bias, None, stream, 0)
    flat.addmm_(rows, weight.T)
    return y, s.view(*x.shape[:-1], lora_A.shape[0])


def lora_linear_backward(
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
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., K], dA [r, K] and dB [N, r]; [0] where the mask does not ask for one."""
    rows, threshold = _rows(grad), _threshold(dropout_p, seed)
    dx, dA, dB = grad.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    # scaling and the mask's 1 / (1 - q) go into ds once: dx and dA both want them.
    scale = scaling * 65536 / (65536 - threshold)
    wide = torch.promote_types(grad.dtype, torch.float32)
    some = rows.shape[0] > 0 and (mask[0] or mask[1])
    ds = _project(rows, lora_B.T, scale, None, 0, 0) if some else grad.new_empty((0, lora_A.shape[0]), dtype=wide)
    if mask[0]:
        dx = grad.new_empty((*grad.shape[:-1], weight.shape[1]))
        if rows.shape[0] > 0:
            flat = dx.view(rows.shape[0], weight.shape[1])
            _expand(flat, ds, lora_A, 1.0, None, seed, stream, threshold)
            flat.addmm_(rows, weight)
    if mask[1]:
        dA = _outer(_rows(x), ds, 1.0, seed, stream, threshold).to(lora_A.dtype)
    if mask[2]:
        dB = _outer(rows, _rows(s).contiguous(), scaling, None, 0, 0).T.to(lora_B.dtype).contiguous()
    return dx, dA, dB

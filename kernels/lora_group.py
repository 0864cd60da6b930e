"""Triton kernels of lora_linear_group and its launchers: project and expand over several projections of one x.

project_group: s_j = scale dropout_j(x) A_j^T in one launch for all; expand_group: dx = sum_j mask_j (ds_j A_j). What
one projection needs alone is lora.py's. An absent entry of a list is a tensor without dimensions. Arguments were
checked by collm_fast/ops/lora_group.py. Imports torch, triton and its neighbours only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from collm_fast.kernels import lora
from collm_fast.kernels.device import on
from collm_fast.kernels.lora import dropout_keep
from torch import Tensor

# Projections of one launch: its arguments are tuples of so many at most.
MOST = 4


@triton.jit
def pick(values, n, COUNT: tl.constexpr):
    """values[n] for an n that is known at run time alone: what is inside a loop then is there once, not COUNT times."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(n == i, values[i], value)
    return value


@triton.jit
def project_group_kernel(
    outs,
    v,
    factors,
    seeds,
    M,
    C,
    ranks,
    v_row,
    factor_js,
    factor_cs,
    scale,
    streams,
    threshold,
    tiles,
    COUNT: tl.constexpr,
    DROP: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):
    """outs[n] [M, r_n] = scale * (v [M, C], dropped by mask n) factors[n] [r_n, C]^T, for n < COUNT.

    One program takes BLOCK_M rows and RANK ranks of one projection. Those of the same rows follow each other, so that
    what the first reads of v the others find in a cache: memory is read once for all.
    """
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, begin, end = 0, 0, 0
    for i in tl.static_range(1, COUNT):
        end += tl.cdiv(ranks[i - 1], RANK)
        n = tl.where(tile >= end, i, n)
        begin = tl.where(tile >= end, end, begin)
    factor, out, r = pick(factors, n, COUNT), pick(outs, n, COUNT), pick(ranks, n, COUNT)
    factor_j, factor_c = pick(factor_js, n, COUNT), pick(factor_cs, n, COUNT)
    rank = ((tile - begin) * RANK + tl.arange(0, RANK)).to(tl.int64)
    total = tl.zeros((BLOCK_M, RANK), dtype=SUM)
    for first in range(0, C, BLOCK_C):
        column = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (row < M)[:, None] & (column < C)[None, :]
        value = tl.load(v + row[:, None] * v_row + column[None, :], mask=inside, other=0).to(SUM)
        if DROP:
            seed, stream = tl.load(pick(seeds, n, COUNT)), pick(streams, n, COUNT)
            value = tl.where(dropout_keep(seed, row, first, stream, threshold, BLOCK_M, BLOCK_C), value, 0.0)
        there = (column < C)[:, None] & (rank < r)[None, :]
        f = tl.load(factor + rank[None, :] * factor_j + column[:, None] * factor_c, mask=there, other=0).to(SUM)
        total += tl.dot(value, f, input_precision="ieee", out_dtype=SUM)
    inside = (row < M)[:, None] & (rank < r)[None, :]
    tl.store(out + row[:, None] * r + rank[None, :], total * scale, mask=inside)


@triton.jit
def expand_group_kernel(
    out,
    ss,
    factors,
    seeds,
    M,
    C,
    ranks,
    factor_js,
    factor_cs,
    streams,
    threshold,
    COUNT: tl.constexpr,
    ADD: tl.constexpr,
    DROP: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):
    """out [M, C] = (ADD: out) + sum over n < COUNT of (ss[n] [M, r_n] factors[n] [r_n, C], dropped by mask n)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    column = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    inside = (row < M)[:, None] & (column < C)[None, :]
    place = out + row[:, None] * C + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=SUM)
    if ADD:
        total += tl.load(place, mask=inside, other=0).to(SUM)
    for n in range(0, COUNT):
        s, factor, r = pick(ss, n, COUNT), pick(factors, n, COUNT), pick(ranks, n, COUNT)
        factor_j, factor_c = pick(factor_js, n, COUNT), pick(factor_cs, n, COUNT)
        value = tl.zeros((BLOCK_M, BLOCK_C), dtype=SUM)
        for first_rank in range(0, r, RANK):
            rank = (first_rank + tl.arange(0, RANK)).to(tl.int64)
            there = (row < M)[:, None] & (rank < r)[None, :]
            coefficient = tl.load(s + row[:, None] * r + rank[None, :], mask=there, other=0).to(SUM)
            there = (rank < r)[:, None] & (column < C)[None, :]
            f = tl.load(factor + rank[:, None] * factor_j + column[None, :] * factor_c, mask=there, other=0).to(SUM)
            value += tl.dot(coefficient, f, input_precision="ieee", out_dtype=SUM)
        if DROP:
            seed, stream = tl.load(pick(seeds, n, COUNT)), pick(streams, n, COUNT)
            value = tl.where(dropout_keep(seed, row, first, stream, threshold, BLOCK_M, BLOCK_C), value, 0.0)
        total += value
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


class Masks(NamedTuple):
    """Of the projections of a launch; seeds are () where nothing is dropped."""

    seeds: tuple[Tensor, ...]
    streams: tuple[int, ...]
    threshold: int

    def of(self, some: Sequence[int]) -> Masks:
        seeds = tuple(self.seeds[j] for j in some) if self.seeds else ()
        return Masks(seeds, tuple(self.streams[j] for j in some), self.threshold)


def _masks(dropout_p: float, seeds: Sequence[Tensor], streams: Sequence[int]) -> Masks:
    threshold = lora._threshold(dropout_p, seeds[0] if seeds else None)
    return Masks(tuple(seeds) if threshold else (), tuple(streams), threshold)


def _launches(adapted: Sequence[int], lora_As: Sequence[Tensor]) -> Iterator[list[int]]:
    """At most MOST projections at a time, whose factors have one dtype."""
    for dtype in dict.fromkeys(lora_As[j].dtype for j in adapted):
        same = [j for j in adapted if lora_As[j].dtype == dtype]
        yield from (same[i : i + MOST] for i in range(0, len(same), MOST))


def _project(v: Tensor, factors: list[Tensor], scale: float, masks: Masks) -> list[Tensor]:
    """v [M, C], factors [r, C] of any strides, at most MOST -> [M, r] each."""
    (M, C), ranks = v.shape, [factor.shape[0] for factor in factors]
    outs = [v.new_empty((M, r), dtype=torch.promote_types(v.dtype, torch.float32)) for r in ranks]
    size = lora.blocks(max(ranks))
    tiles = sum(triton.cdiv(r, size["RANK"]) for r in ranks)
    with on(v):
        project_group_kernel[(tiles * triton.cdiv(M, size["BLOCK_M"]),)](
            tuple(outs),
            v,
            tuple(factors),
            masks.seeds or (v,) * len(factors),
            M,
            C,
            tuple(ranks),
            v.stride(0),
            tuple(factor.stride(0) for factor in factors),
            tuple(factor.stride(1) for factor in factors),
            scale,
            masks.streams,
            masks.threshold,
            tiles,
            COUNT=len(factors),
            DROP=masks.threshold > 0,
            SUM=lora._sum_type(v),
            **size,
        )
    return outs


def _expand(
    out: Tensor,
    ss: list[Tensor],
    factors: list[Tensor],
    masks: Masks,
    add: bool,
) -> None:
    """ss [M, r] each, factors [r, C] of any strides, at most MOST -> out [M, C], or that much more."""
    (M, C), ranks = out.shape, [factor.shape[0] for factor in factors]
    if C == 0:
        return
    # Larger tiles of ranks would spill: two sums are held for each element.
    size = lora.blocks(min(max(ranks), 16))
    with on(out):
        expand_group_kernel[(triton.cdiv(M, size["BLOCK_M"]), triton.cdiv(C, size["BLOCK_C"]))](
            out,
            tuple(ss),
            tuple(factors),
            masks.seeds or (out,) * len(factors),
            M,
            C,
            tuple(ranks),
            tuple(factor.stride(0) for factor in factors),
            tuple(factor.stride(1) for factor in factors),
            masks.streams,
            masks.threshold,
            COUNT=len(factors),
            ADD=add,
            DROP=masks.threshold > 0,
            SUM=lora._sum_type(out),
            **size,
        )


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scaling: float,
    dropout_p: float,
    seeds: Sequence[Tensor],
    streams: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """x [..., K] -> each y [..., N] and s [..., r] = dropout(x) lora_A^T, where there is an adapter."""
    rows, masks = lora._rows(x), _masks(dropout_p, seeds, streams)
    wide, M = torch.promote_types(x.dtype, torch.float32), rows.shape[0]
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    flat = [y.view(M, weight.shape[0]) for y, weight in zip(ys, weights, strict=True)]
    adapted = [j for j, lora_A in enumerate(lora_As) if lora_A.dim() > 0]
    ss = {j: x.new_empty((M, lora_As[j].shape[0]), dtype=wide) for j in adapted}
    if M > 0:
        for some in _launches(adapted, lora_As):
            factors = [lora_As[j] for j in some]
            scale = 65536 / (65536 - masks.threshold)
            ss |= zip(some, _project(rows, factors, scale, masks.of(some)), strict=True)
        for j, (y, weight, bias) in enumerate(zip(flat, weights, biases, strict=True)):
            b = bias if bias.dim() > 0 else None
            if j in ss:
                lora._expand(y, ss[j], lora_Bs[j].T, scaling, b, None, 0, 0)
                y.addmm_(rows, weight.T)
            else:
                torch.mm(rows, weight.T, out=y) if b is None else torch.addmm(b, rows, weight.T, out=y)
    absent = [x.new_zeros((), dtype=wide) for _ in weights]
    return ys, [ss[j].view(*x.shape[:-1], lora_As[j].shape[0]) if j in ss else a for j, a in enumerate(absent)]


def lora_linear_group_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    ss: Sequence[Tensor],
    scaling: float,
    dropout_p: float,
    seeds: Sequence[Tensor],
    streams: Sequence[int],
    wants_dx: bool,
    wants_dA: Sequence[bool],
    wants_dB: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx [..., K], each dA [r, K] and dB [N, r]; [0] where one is not asked for."""
    given = [j for j, grad in enumerate(grads) if grad.dim() > 0]
    first, masks = grads[given[0]], _masks(dropout_p, seeds, streams)
    rows = {j: lora._rows(grads[j]) for j in given}
    M, K = rows[given[0]].shape[0], weights[given[0]].shape[1]
    adapted = [j for j in given if lora_As[j].dim() > 0]
    dAs, dBs = [A.new_empty(0) for A in lora_As], [B.new_empty(0) for B in lora_Bs]
    # scaling and the mask's 1 / (1 - q) go into ds once: dx and dA both want them.
    scale, wide = scaling * 65536 / (65536 - masks.threshold), torch.promote_types(first.dtype, torch.float32)
    ds, inputs = {}, lora._rows(x) if any(wants_dA) else x
    for j in adapted:
        ds[j] = first.new_empty((0, lora_As[j].shape[0]), dtype=wide)
        if M > 0 and (wants_dx or wants_dA[j]):
            ds[j] = lora._project(rows[j], lora_Bs[j].T, scale, None, 0, 0)
        if wants_dA[j]:
            mask = (masks.seeds[j] if masks.seeds else None, streams[j], masks.threshold)
            dAs[j] = lora._outer(inputs, ds[j], 1.0, *mask).to(lora_As[j].dtype)
        if wants_dB[j]:
            s = lora._rows(ss[j]).contiguous()
            dBs[j] = lora._outer(rows[j], s, scaling, None, 0, 0).T.to(lora_Bs[j].dtype).contiguous()
    if not wants_dx:
        return first.new_empty(0), dAs, dBs
    dx = first.new_empty((*first.shape[:-1], K))
    if M > 0:
        flat, begun = dx.view(M, K), False
        for some in _launches(adapted, lora_As):
            _expand(flat, [ds[j] for j in some], [lora_As[j] for j in some], masks.of(some), begun)
            begun = True
        for j in given:
            flat.addmm_(rows[j], weights[j], beta=1 if begun else 0)
            begun = True
    return dx, dAs, dBs

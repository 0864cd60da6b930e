"""Triton kernel of lightgcn_layer and its launcher: one layer over a rectangular block of the graph.

All layers of a whole graph are propagate.py. Shapes and dtypes were checked by collm_fast/ops/layer.py; values out of
range are guarded here and reported in `records` ([4, 3] int64 for rows, crow, col and slot: raised, value, limit).
Imports torch, triton and its neighbour device.py only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from collm_fast.kernels.device import on, report
from torch import Tensor


@triton.jit
def block_layer_kernel(
    out, table, x, crow, col, inv_sqrt_degree, rows, slot, records, n, M, R, nnz, D, x_row, x_column, mean,
    GATHER: tl.constexpr, RESULT: tl.constexpr, ROWS: tl.constexpr, SLOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_D columns of one row of `out`, BLOCK_E edges at a time, in one fixed order."""
    position = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    row = position
    if ROWS:
        row = tl.load(rows + position)
        if (row < 0) | (row >= n):
            report(records, row, n)
    valid = (row >= 0) & (row < n)
    s = tl.load(inv_sqrt_degree + row, mask=valid, other=0.0).to(SUM)
    # A scalar condition becomes the number of columns that may be read: masks stay comparisons of one block.
    width = tl.where(valid, D, 0)
    value = tl.load(x + row * x_row + column * x_column, mask=column < width, other=0.0).to(SUM)
    if GATHER:
        begin = tl.load(crow + row, mask=valid, other=0)
        end = tl.load(crow + row + 1, mask=valid, other=0)
        if (begin < 0) | (end < begin) | (end > nnz):
            report(records + 3, tl.where(begin < 0, begin, end), nnz)
            end = begin
        total = tl.zeros((BLOCK_D,), dtype=SUM)
        for first in range(begin, end, BLOCK_E):
            edge = first + tl.arange(0, BLOCK_E)
            inside = edge < end
            source = tl.load(col + edge, mask=inside, other=0).to(tl.int64)
            known = (source >= 0) & (source < M)
            worst = tl.max(tl.where(inside & (source >= M), source, -1), axis=0)
            lowest = tl.min(tl.where(inside & (source < 0), source, 0), axis=0)
            if worst >= 0:
                report(records + 6, worst, M)
            if lowest < 0:
                report(records + 6, lowest, M)
            keep = inside & known
            if SLOT:
                source = tl.load(slot + source, mask=keep, other=-1).to(tl.int64)
                highest = tl.max(tl.where(source >= R, source, -1), axis=0)
                if highest >= 0:
                    report(records + 9, highest, R)
                keep = keep & (source >= 0) & (source < R)
            values = tl.load(
                table + source[:, None] * D + column[None, :],
                mask=keep[:, None] & (column < D)[None, :],
                other=0.0,
            )
            total += tl.sum(values.to(SUM), axis=0)
        value += total * s
    value = value * (mean if RESULT else s)
    tl.store(out + position * D + column, value.to(out.dtype.element_ty), mask=column < D)


def layer(
    out: Tensor,
    table: Tensor | None,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    inv_sqrt_degree: Tensor,
    mean: float | None,
    rows: Tensor | None,
    slot: Tensor | None,
    records: Tensor,
) -> None:
    """Writes `out` ([n, D], or [B, D] with rows [B]) from the table of the layer before and x [n, D].

    The table is [M, D], or [R, D] with slot [M].
    """
    if out.numel() == 0:
        return
    D = x.shape[1]
    block = min(128, max(16, triton.next_power_of_2(D)))
    # Absent tensors point anywhere.
    with on(x):
        block_layer_kernel[(out.shape[0], triton.cdiv(D, block))](
            out,
            x if table is None else table,
            x,
            crow,
            col,
            inv_sqrt_degree,
            crow if rows is None else rows,
            col if slot is None else slot,
            records,
            x.shape[0],
            0 if table is None else table.shape[0] if slot is None else slot.shape[0],
            0 if table is None else table.shape[0],
            col.shape[0],
            D,
            *x.stride(),
            0.0 if mean is None else mean,
            GATHER=table is not None,
            RESULT=mean is not None,
            ROWS=rows is not None,
            SLOT=slot is not None,
            BLOCK_E=16,
            BLOCK_D=block,
            SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
        )

"""Triton kernels of the inject family and their launchers: embed_inject, gather_rows, scatter_rows.

Shapes and dtypes were checked by collm_fast/ops/inject.py; values out of range are guarded here and reported through
`record` ([3] int64: raised, value, limit). Imports torch, triton and its neighbour device.py only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from collm_fast.kernels.device import on, report
from torch import Tensor

# A copy knows no number format: rows move as integers of their size, so that every dtype is one kernel.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# scatter_rows sums the places of a row in runs of this many, and then the runs; csrc/inject.h has the same number.
_RUN = tl.constexpr(64)


@triton.jit
def embed_inject_kernel(
    out,
    token_ids,
    table,
    rows,
    row_index,
    H,
    V,
    S,
    table_row,
    table_column,
    rows_row,
    rows_column,
    token_record,
    row_record,
    BLOCK_H: tl.constexpr,
):
    """One program copies BLOCK_H columns of one place."""
    place = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    row = tl.load(row_index + place).to(tl.int64)
    token = tl.load(token_ids + place)
    bad_row = (row < -1) | (row >= S)
    bad_token = (row == -1) & ((token < 0) | (token >= V))
    if bad_row:
        report(row_record, row, S)
    if bad_token:
        report(token_record, token, V)
    # A scalar condition becomes the number of columns that may be read: masks stay comparisons of one block.
    from_rows = tl.where((row >= 0) & (row < S), H, 0)
    from_table = tl.where((row == -1) & (token >= 0) & (token < V), H, 0)
    injected = tl.load(rows + row * rows_row + column * rows_column, mask=column < from_rows, other=0)
    text = tl.load(table + token * table_row + column * table_column, mask=column < from_table, other=0)
    tl.store(out + place * H + column, tl.where(column < from_rows, injected, text), mask=column < H)


@triton.jit
def gather_rows_kernel(out, table, index, H, V, table_row, table_column, record, BLOCK_H: tl.constexpr):
    """One program copies BLOCK_H columns of one place, or zeros."""
    place = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    row = tl.load(index + place).to(tl.int64)
    bad = (row < -1) | (row >= V)
    if bad:
        report(record, row, V)
    there = tl.where((row >= 0) & (row < V), H, 0)
    value = tl.load(table + row * table_row + column * table_column, mask=column < there, other=0)
    tl.store(out + place * H + column, value, mask=column < H)


@triton.jit
def scatter_rows_kernel(
    out,
    grad,
    order,
    ordered_index,
    begin,
    num_places,
    num_rows,
    H,
    split,
    outer,
    inner,
    column_stride,
    record,
    BLOCK_H: tl.constexpr,
    SUM: tl.constexpr,
):
    """One program sums BLOCK_H columns of one output row over its places, in order: nothing depends on timing."""
    row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    if row == 0:
        lowest = tl.load(ordered_index).to(tl.int64)
        highest = tl.load(ordered_index + num_places - 1).to(tl.int64)
        if lowest < -1:
            report(record, lowest, num_rows)
        if highest >= num_rows:
            report(record, highest, num_rows)
    inside = column < tl.where(row < num_rows, H, 0)
    total = tl.zeros((BLOCK_H,), dtype=SUM)
    first = tl.load(begin + row)
    last = tl.load(begin + row + 1)
    for start in range(first, last, _RUN):
        run = tl.zeros((BLOCK_H,), dtype=SUM)
        for k in range(start, tl.minimum(start + _RUN, last)):
            place = tl.load(order + k)
            base = (place // split) * outer + (place % split) * inner
            run += tl.load(grad + base + column * column_stride, mask=inside, other=0).to(SUM)
        total += run
    tl.store(out + row * H + column, total.to(out.dtype.element_ty), mask=inside)


def _block(columns: int) -> int:
    return min(1024, max(16, triton.next_power_of_2(columns)))


def embed_inject(
    token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor, token_record: Tensor, row_record: Tensor
) -> Tensor:
    """token_ids, row_index [...]; table [V, H]; rows [S, H] -> [..., H]."""
    (V, H), S = table.shape, rows.shape[0]
    out = table.new_empty((*token_ids.shape, H))
    if out.numel() == 0:
        return out
    bits, block = _BITS[table.element_size()], _block(H)
    with on(table):
        embed_inject_kernel[(token_ids.numel(), triton.cdiv(H, block))](
            out.view(bits),
            token_ids.contiguous(),
            table.view(bits),
            rows.view(bits),
            row_index.contiguous(),
            H,
            V,
            S,
            *table.stride(),
            *rows.stride(),
            token_record,
            row_record,
            BLOCK_H=block,
        )
    return out


def gather_rows(table: Tensor, index: Tensor, record: Tensor) -> Tensor:
    """table [V, H], index [...] -> [..., H]."""
    V, H = table.shape
    out = table.new_empty((*index.shape, H))
    if out.numel() == 0:
        return out
    bits, block = _BITS[table.element_size()], _block(H)
    with on(table):
        gather_rows_kernel[(index.numel(), triton.cdiv(H, block))](
            out.view(bits), table.view(bits), index.contiguous(), H, V, *table.stride(), record, BLOCK_H=block
        )
    return out


def _two_strides(grad: Tensor) -> tuple[Tensor, int, int, int]:
    """The tensor and (split, outer, inner): row i begins at i // split * outer + i % split * inner.

    A contiguous copy only where the leading dimensions do not merge into two.
    """
    merged: list[tuple[int, int]] = []
    for size, stride in zip(grad.shape[:-1], grad.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        grad = grad.contiguous()
        merged = [(grad.numel() // grad.shape[-1], grad.shape[-1])]
    if len(merged) < 2:
        return grad, 1, merged[0][1] if merged else 0, 0
    return grad, merged[1][0], merged[0][1], merged[1][1]


def scatter_rows(grad: Tensor, index: Tensor, num_rows: int, record: Tensor) -> Tensor:
    """grad [..., H], index [...] -> [num_rows, H], sums in float32 (float64 in float64)."""
    H, places = grad.shape[-1], index.numel()
    if places == 0 or H == 0:
        return grad.new_zeros((num_rows, H))
    out = grad.new_empty((num_rows, H))
    # A stable sort keeps the order of a row's places, and with it the bits of its sum.
    ordered, order = torch.sort(index.reshape(-1), stable=True)
    bounds = torch.arange(max(num_rows, 1) + 1, dtype=index.dtype, device=index.device)
    begin = torch.searchsorted(ordered, bounds)
    grad, split, outer, inner = _two_strides(grad)
    block = _block(H)
    with on(grad):
        scatter_rows_kernel[(max(num_rows, 1), triton.cdiv(H, block))](
            out,
            grad,
            order,
            ordered,
            begin,
            places,
            num_rows,
            H,
            split,
            outer,
            inner,
            grad.stride(-1),
            record,
            BLOCK_H=block,
            SUM=tl.float64 if grad.dtype == torch.float64 else tl.float32,
        )
    return out

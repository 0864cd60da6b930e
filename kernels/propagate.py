"""Triton kernels of lightgcn_propagate and their launchers.

The same recurrence as csrc/cpu/propagate.cpp: h_k = x + S A S h_{k-1}, so a layer gathers rows of g = S h and writes
the next g, and the last one writes the result; no layer mean is ever stored. Shapes and dtypes were checked by
collm_fast/ops/propagate.py; values out of range are guarded here and reported in `records` ([3, 3] int64 for rows, crow
and col: raised, value, limit). Imports torch, triton and its neighbour device.py only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from collm_fast.kernels.device import on, report
from torch import Tensor


@triton.jit
def sum_edges(
    table, col, slot, seed, node, begin, end, column, N, D, threshold, bad_col,
    SLOT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D]: the sum of table rows over the edges [begin, end) of a node, BLOCK_E at a time, in one fixed order."""
    total = tl.zeros((BLOCK_D,), dtype=SUM)
    for first in range(begin, end, BLOCK_E):
        edge = first + tl.arange(0, BLOCK_E)
        inside = edge < end
        neighbour = tl.load(col + edge, mask=inside, other=0).to(tl.int64)
        known = (neighbour >= 0) & (neighbour < N)
        worst = tl.max(tl.where(inside & (neighbour >= N), neighbour, -1), axis=0)
        lowest = tl.min(tl.where(inside & (neighbour < 0), neighbour, 0), axis=0)
        if worst >= 0:
            report(bad_col, worst, N)
        if lowest < 0:
            report(bad_col, lowest, N)
        keep = inside & known
        if DROPOUT:
            # The smaller node first, so that both directions of an edge draw the same word.
            low = tl.minimum(neighbour, node).to(tl.int32)
            high = tl.maximum(neighbour, node).to(tl.int32)
            zero = tl.zeros((BLOCK_E,), dtype=tl.int32)
            word, _1, _2, _3 = tl.philox(tl.load(seed), low, high, zero, zero + 0x45444745)
            keep = keep & (word.to(tl.int64) >= threshold)
        row = neighbour
        if SLOT:
            row = tl.load(slot + neighbour, mask=keep, other=-1).to(tl.int64)
            keep = keep & (row >= 0)
        values = tl.load(
            table + row[:, None] * D + column[None, :], mask=keep[:, None] & (column < D)[None, :], other=0.0
        )
        total += tl.sum(values.to(SUM), axis=0)
    return total


@triton.jit
def layer_kernel(
    out, table, x, crow, col, inv_sqrt_degree, rows, rows_stride, slot, x_slot, seed, records,
    N, nnz, D, x_row, x_column, mean, keep_scale, threshold,
    GATHER: tl.constexpr, RESULT: tl.constexpr, ROWS: tl.constexpr, SLOT: tl.constexpr, X_SLOT: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_D columns of one row of the next table, or of the result.

    GATHER: false for layer 0, which only scales x. SLOT: the table holds the rows of a sparse gradient, `slot` maps
    nodes to them. X_SLOT: x does. ROWS: the row of a position is named by `rows`.
    """
    position = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    node = position
    if ROWS:
        node = tl.load(rows + position * rows_stride)
        if (node < 0) | (node >= N):
            report(records, node, N)
    valid = (node >= 0) & (node < N)
    s = tl.load(inv_sqrt_degree + node, mask=valid, other=0.0).to(SUM)
    # A scalar condition becomes the number of columns that may be read: masks stay comparisons of one block.
    width = tl.where(valid, D, 0)
    x_at = node
    if X_SLOT:
        x_at = tl.load(x_slot + node, mask=valid, other=-1).to(tl.int64)
        width = tl.where(x_at >= 0, width, 0)
    own = tl.load(x + x_at * x_row + column * x_column, mask=column < width, other=0.0).to(SUM)
    value = own
    if GATHER:
        begin = tl.load(crow + node, mask=valid, other=0)
        end = tl.load(crow + node + 1, mask=valid, other=0)
        if (begin < 0) | (end < begin) | (end > nnz):
            report(records + 3, tl.where(begin < 0, begin, end), nnz)
            end = begin
        # The two ends that no row sees, by the first row alone.
        if position == 0:
            first = tl.load(crow)
            last = tl.load(crow + N)
            if (first != 0) | (last != nnz):
                report(records + 3, tl.where(first != 0, first, last), nnz)
        total = sum_edges(
            table, col, slot, seed, node, begin, end, column, N, D, threshold, records + 6,
            SLOT, DROPOUT, BLOCK_E, BLOCK_D, SUM,
        )  # fmt: skip
        value += total * s * keep_scale
    if RESULT:
        value = value * mean
    else:
        value = value * s
    tl.store(out + position * D + column, value.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def sparse_gradient_kernel(
    sums, scaled, slot, grad, sorted_rows, order, ends, inv_sqrt_degree, records, N, D, grad_row, grad_column,
    BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Sums the gradient of each distinct row over its places, in order; works at the first place of the row."""
    place = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    node = tl.load(sorted_rows + place)
    before = tl.load(sorted_rows + place - 1, mask=place > 0, other=-1)
    valid = (node >= 0) & (node < N)
    if (node < 0) | (node >= N):
        report(records, node, N)
    if valid & ((place == 0) | (before != node)):
        total = tl.zeros((BLOCK_D,), dtype=SUM)
        for at in range(place, tl.load(ends + place)):
            row = tl.load(order + at)
            total += tl.load(grad + row * grad_row + column * grad_column, mask=column < D, other=0.0).to(SUM)
        tl.store(sums + place * D + column, total, mask=column < D)
        tl.store(scaled + place * D + column, total * tl.load(inv_sqrt_degree + node).to(SUM), mask=column < D)
        tl.store(slot + node, place.to(tl.int32))


def _block(D: int) -> int:
    return min(128, max(16, triton.next_power_of_2(D)))


class _Call:
    """What every layer of one call shares."""

    def __init__(
        self, graph: Sequence[Tensor], D: int, K: int, dropout_p: float, seed: Tensor | None, records: Tensor
    ) -> None:
        self.crow, self.col, self.inv = graph
        self.N, self.D, self.records = self.inv.shape[0], D, records
        self.seed = seed if dropout_p > 0.0 else None
        self.mean = 1.0 / (K + 1)
        self.keep_scale = 1.0 / (1.0 - dropout_p)
        self.threshold = int(dropout_p * 2**32)

    def layer(
        self,
        out: Tensor,
        table: Tensor | None,
        x: Tensor,
        *,
        result: bool,
        rows: Tensor | None = None,
        slot: Tensor | None = None,
        x_slot: Tensor | None = None,
    ) -> None:
        """out = the next table or the result, from `table` (None: layer 0) and x. Absent tensors point anywhere."""
        if out.numel() == 0:
            return
        any_tensor = self.crow
        block = _block(self.D)
        double = x.dtype == torch.float64
        layer_kernel[(out.shape[0], triton.cdiv(self.D, block))](
            out,
            x if table is None else table,
            x,
            self.crow,
            self.col,
            self.inv,
            any_tensor if rows is None else rows,
            0 if rows is None else rows.stride(0),
            any_tensor if slot is None else slot,
            any_tensor if x_slot is None else x_slot,
            any_tensor if self.seed is None else self.seed,
            self.records,
            self.N,
            self.col.shape[0],
            self.D,
            *x.stride(),
            self.mean,
            self.keep_scale,
            self.threshold,
            GATHER=table is not None,
            RESULT=result,
            ROWS=rows is not None,
            SLOT=slot is not None,
            X_SLOT=x_slot is not None,
            DROPOUT=self.seed is not None,
            BLOCK_E=16,
            BLOCK_D=block,
            SUM=tl.float64 if double else tl.float32,
        )

    def layers(
        self, table: Tensor, x: Tensor, count: int, out: Tensor, rows: Tensor | None, x_slot: Tensor | None
    ) -> Tensor:
        """The last `count` layers, from the table of the layer before to the result."""
        spare = torch.empty_like(table) if count > 1 else table
        for _ in range(count - 1):
            self.layer(spare, table, x, result=False, x_slot=x_slot)
            table, spare = spare, table
        self.layer(out, table, x, result=True, rows=rows, x_slot=x_slot)
        return out


def _storage(x: Tensor, storage_dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32) if storage_dtype is None else storage_dtype


def propagate(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    inv_sqrt_degree: Tensor,
    num_layers: int,
    storage_dtype: torch.dtype | None,
    rows: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    records: Tensor,
) -> Tensor:
    """x [N, D] -> [N, D], or [B, D] with rows [B]."""
    N, D = x.shape
    out = x.new_empty(N if rows is None else rows.shape[0], D)
    call = _Call((crow, col, inv_sqrt_degree), D, num_layers, dropout_p, seed, records)
    with on(x):
        if num_layers == 0:
            call.layer(out, None, x, result=True, rows=rows)
            return out
        table = x.new_empty(N, D, dtype=_storage(x, storage_dtype))
        call.layer(table, None, x, result=False)
        return call.layers(table, x, num_layers, out, rows, None)


def propagate_backward(
    grad: Tensor,
    crow: Tensor,
    col: Tensor,
    inv_sqrt_degree: Tensor,
    num_layers: int,
    storage_dtype: torch.dtype | None,
    rows: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    records: Tensor,
) -> Tensor:
    """grad [B, D] of the rows form -> [N, D]; the first layer runs over the edges of those rows alone."""
    B, D = grad.shape
    N = inv_sqrt_degree.shape[0]
    wide = torch.promote_types(grad.dtype, torch.float32)
    out = grad.new_empty(N, D)
    if out.numel() == 0:
        return out
    sums, scaled = grad.new_empty(max(B, 1), D, dtype=wide), grad.new_empty(max(B, 1), D, dtype=wide)
    slot = torch.full((N,), -1, dtype=torch.int32, device=grad.device)
    call = _Call((crow, col, inv_sqrt_degree), D, num_layers, dropout_p, seed, records)
    with on(grad):
        if B > 0:
            # A stable sort keeps the order of a row's places, and with it the bits of its sum.
            ordered, order = torch.sort(rows, stable=True)
            ends = torch.searchsorted(ordered, ordered, right=True)
            block = _block(D)
            sparse_gradient_kernel[(B, triton.cdiv(D, block))](
                sums, scaled, slot, grad, ordered, order, ends, inv_sqrt_degree, records, N, D, *grad.stride(),
                BLOCK_D=block, SUM=tl.float64 if wide == torch.float64 else tl.float32,
            )  # fmt: skip
        if num_layers == 0:
            call.layer(out, None, sums, result=True, x_slot=slot)
            return out
        table = out if num_layers == 1 else grad.new_empty(N, D, dtype=_storage(grad, storage_dtype))
        call.layer(table, scaled, sums, result=num_layers == 1, slot=slot, x_slot=slot)
        return out if num_layers == 1 else call.layers(table, sums, num_layers - 1, out, None, slot)

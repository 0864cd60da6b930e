"""Triton kernels of lightgcn_propagate and their launchers.

The same recurrence as csrc/cpu/propagate.cpp: h_k = x + S A S h_{k-1}, so a layer gathers rows of g = S h and writes
the next g, and the last one writes the result; no layer mean is ever stored. One program sums a row, BLOCK_E edges at a
time; a row of 2 PIECE edges and more is summed by one program a piece, and its own program adds the pieces up in their
order: nothing is atomic, so bits repeat. Shapes and dtypes were checked by
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

# Edges of a piece, the last one of a row up to twice as many less one. The sums take nnz / PIECE rows of float32.
PIECE = 256
# Elements of the table that a program of 4 warps holds at a time: 8 a thread, and as many sums.
_BLOCK = 1024


@triton.jit
def sum_edges(
    table, col, slot, seed, node, begin, end, column, N, D, threshold, bad_col,
    SLOT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D]: the sum of table rows over the edges [begin, end) of a node, BLOCK_E at a time, in one fixed order."""
    # Added up across warps once, not at every step.
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype=SUM)
    for first in range(begin, end, BLOCK_E):
        edge = first + tl.arange(0, BLOCK_E)
        inside = edge < end
        neighbour = tl.load(col + edge, mask=inside, other=0, eviction_policy="evict_first").to(tl.int64)
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
        total += values.to(SUM)
    return tl.sum(total, axis=0)


@triton.jit
def pieces_kernel(
    partial, table, crow, col, requested, slot, seed, bad_col, N, nnz, D, threshold,
    REQUESTED: tl.constexpr, SLOT: tl.constexpr, DROPOUT: tl.constexpr, PIECE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """partial[p] = the sum of piece p: number p - crow[row] // PIECE of the last row that begins before (p + 1) PIECE.

    No two pieces share a number, because a row's last piece is its longest. REQUESTED: of the nodes marked there only.
    """
    piece = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    low = piece * 0
    high = low + N
    while low < high:
        middle = (low + high) // 2
        before = tl.load(crow + middle) < (piece + 1) * PIECE
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    node = low - 1
    begin = tl.load(crow + node, mask=node >= 0, other=0)
    end = tl.load(crow + node + 1, mask=node >= 0, other=0)
    if (begin >= 0) & (end <= nnz):
        at = piece - begin // PIECE
        pieces = (end - begin) // PIECE
        mine = (pieces >= 2) & (at >= 0) & (at < pieces)
        if REQUESTED:
            mine = mine & (tl.load(requested + node, mask=mine, other=0) != 0)
        if mine:
            first = begin + at * PIECE
            last = tl.where(at + 1 < pieces, first + PIECE, end)
            total = sum_edges(
                table, col, slot, seed, node, first, last, column, N, D, threshold, bad_col,
                SLOT, DROPOUT, BLOCK_E, BLOCK_D, SUM,
            )  # fmt: skip
            tl.store(partial + piece * D + column, total, mask=column < D)


@triton.jit
def sum_pieces(
    partial, piece, pieces, column, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    """[BLOCK_D]: the sum of `pieces` rows of partial from `piece` on, in one fixed order."""
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype=SUM)
    for first in range(0, pieces, BLOCK_E):
        at = first + tl.arange(0, BLOCK_E)
        mask = (at < pieces)[:, None] & (column < D)[None, :]
        total += tl.load(partial + (piece + at)[:, None] * D + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def layer_kernel(
    out, table, partial, x, crow, col, inv_sqrt_degree, rows, rows_stride, slot, x_slot, seed, records,
    N, nnz, D, x_row, x_column, mean, keep_scale, threshold,
    GATHER: tl.constexpr, SPLIT: tl.constexpr, RESULT: tl.constexpr, ROWS: tl.constexpr, SLOT: tl.constexpr,
    X_SLOT: tl.constexpr, DROPOUT: tl.constexpr, PIECE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_D columns of one row of the next table, or of the result.

    GATHER: false for layer 0, which only scales x. SPLIT: rows of 2 PIECE edges and more are in `partial`. SLOT: the
    table holds the rows of a sparse gradient, `slot` maps nodes to them. X_SLOT: x does. ROWS: the row of a position
    is named by `rows`.
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
        total = tl.zeros((BLOCK_D,), dtype=SUM)
        if SPLIT:
            pieces = (end - begin) // PIECE
            if pieces >= 2:
                total += sum_pieces(partial, begin // PIECE, pieces, column, D, BLOCK_E, BLOCK_D, SUM)
                end = begin
        total += sum_edges(
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
        self,
        graph: Sequence[Tensor],
        like: Tensor,
        K: int,
        dropout_p: float,
        seed: Tensor | None,
        records: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        self.crow, self.col, self.inv = graph
        self.N, self.D, self.records = self.inv.shape[0], like.shape[1], records
        self.nnz, self.rows = self.col.shape[0], rows
        self.block = _block(self.D)
        double = like.dtype == torch.float64
        self.sum = tl.float64 if double else tl.float32
        # Without 2 PIECE edges there is no row to split.
        self.pieces = self.nnz // PIECE if self.nnz >= 2 * PIECE and self.D else 0
        self.partial = like.new_empty(self.pieces, self.D, dtype=torch.float64 if double else torch.float32)
        self.requested: Tensor | None = None
        if rows is not None and self.pieces and self.N:
            # A row that names no node is reported by layer_kernel.
            self.requested = torch.zeros(self.N, dtype=torch.uint8, device=like.device)
            self.requested.index_fill_(0, rows.clamp(0, self.N - 1), 1)
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
        by_rows: bool = False,
        slot: Tensor | None = None,
        x_slot: Tensor | None = None,
    ) -> None:
        """out = the next table or the result, from `table` (None: layer 0) and x. Absent tensors point anywhere."""
        if out.numel() == 0:
            return
        absent = self.crow
        split = table is not None and self.pieces > 0
        seed = absent if self.seed is None else self.seed
        columns = triton.cdiv(self.D, self.block)
        options = {
            "SLOT": slot is not None,
            "DROPOUT": self.seed is not None,
            "PIECE": PIECE,
            "BLOCK_E": min(64, _BLOCK // self.block),
            "BLOCK_D": self.block,
            "SUM": self.sum,
        }
        if split:
            requested = self.requested if by_rows else None
            pieces_kernel[(self.pieces, columns)](
                self.partial,
                table,
                self.crow,
                self.col,
                absent if requested is None else requested,
                absent if slot is None else slot,
                seed,
                self.records[2],
                self.N,
                self.nnz,
                self.D,
                self.threshold,
                REQUESTED=requested is not None,
                **options,
            )
        rows = self.rows if by_rows else None
        layer_kernel[(out.shape[0], columns)](
            out,
            x if table is None else table,
            self.partial if split else x,
            x,
            self.crow,
            self.col,
            self.inv,
            absent if rows is None else rows,
            0 if rows is None else rows.stride(0),
            absent if slot is None else slot,
            absent if x_slot is None else x_slot,
            seed,
            self.records,
            self.N,
            self.nnz,
            self.D,
            *x.stride(),
            self.mean,
            self.keep_scale,
            self.threshold,
            GATHER=table is not None,
            SPLIT=split,
            RESULT=result,
            ROWS=rows is not None,
            X_SLOT=x_slot is not None,
            **options,
        )

    def layers(self, tables: tuple[Tensor, Tensor], x: Tensor, count: int, out: Tensor, x_slot: Tensor | None) -> None:
        """The last `count` layers, from the table of the layer before to the result."""
        table, spare = tables
        for _ in range(count - 1):
            self.layer(spare, table, x, result=False, x_slot=x_slot)
            table, spare = spare, table
        self.layer(out, table, x, result=True, by_rows=self.rows is not None, x_slot=x_slot)


def _tables(out: Tensor, N: int, dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
    """The tables that `count` layers alternate between. The result is one where it fits: its layer reads the other."""
    own = out.new_empty(N, out.shape[1], dtype=dtype)
    if count == 1:
        return own, own
    other = out if out.shape == own.shape and out.dtype == dtype else torch.empty_like(own)
    return (own, other) if count % 2 else (other, own)


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
    with on(x):
        call = _Call((crow, col, inv_sqrt_degree), x, num_layers, dropout_p, seed, records, rows)
        if num_layers == 0:
            call.layer(out, None, x, result=True, by_rows=rows is not None)
            return out
        tables = _tables(out, N, _storage(x, storage_dtype), num_layers)
        call.layer(tables[0], None, x, result=False)
        call.layers(tables, x, num_layers, out, None)
        return out


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
    with on(grad):
        call = _Call((crow, col, inv_sqrt_degree), grad, num_layers, dropout_p, seed, records)
        if B > 0:
            # A stable sort keeps the order of a row's places, and with it the bits of its sum.
            ordered, order = torch.sort(rows, stable=True)
            ends = torch.searchsorted(ordered, ordered, right=True)
            sparse_gradient_kernel[(B, triton.cdiv(D, call.block))](
                sums, scaled, slot, grad, ordered, order, ends, inv_sqrt_degree, records, N, D, *grad.stride(),
                BLOCK_D=call.block, SUM=call.sum,
            )  # fmt: skip
        if num_layers == 0:
            call.layer(out, None, sums, result=True, x_slot=slot)
            return out
        if num_layers == 1:
            call.layer(out, scaled, sums, result=True, slot=slot, x_slot=slot)
            return out
        tables = _tables(out, N, _storage(grad, storage_dtype), num_layers - 1)
        call.layer(tables[0], scaled, sums, result=False, slot=slot, x_slot=slot)
        call.layers(tables, sums, num_layers - 1, out, slot)
        return out

"""One layer of LightGCN over a rectangular block of the graph: schema, fake, registration and the Python call.

What `collm_fast.distributed` is built from: a rank sums its own rows over a table of its rows and of those it received.
The kernels live in csrc/cpu/layer.cpp and kernels/layer.py. All layers of a whole graph: propagate.py. Floor F1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collm_fast import _native
from collm_fast.ops._arguments import require
from collm_fast.ops._device_errors import error_records, raise_device_errors

_OP = "lightgcn_layer"
_LOW = (torch.float32, torch.bfloat16, torch.float16)
# What a Triton kernel may find wrong, in the order of its records.
_RULES = (
    f"{_OP}: expected rows in [0, ",
    f"{_OP}: expected crow to rise from 0 to nnz (",
    f"{_OP}: expected col in [0, ",
    f"{_OP}: expected slot in [-1, ",
)

# The schema has no result: a layer is written where the caller wants it, beside rows that others send.
_native.LIBRARY.define(
    f"{_OP}(Tensor(a!) out, Tensor? table, Tensor x, Tensor crow, Tensor col, Tensor inv_sqrt_degree, float? mean, "
    "Tensor? rows, Tensor? slot) -> ()"
)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    require(tuple(tensor.shape) == shape, _OP, f"{name} of shape {list(shape)}", tensor)
    require(tensor.is_contiguous(), _OP, f"{name} contiguous", "a strided one")
    require(tensor.device == x.device, _OP, f"{name} on the device of x", "another")


def _check(
    out: Tensor,
    table: Tensor | None,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    inv_sqrt_degree: Tensor,
    mean: float | None,
    rows: Tensor | None,
    slot: Tensor | None,
) -> None:
    require(x.dim() == 2, _OP, "x of shape [n, D]", x)
    count, width = x.shape
    wide = x.dtype == torch.float64
    require(x.dtype in _LOW or (wide and not x.is_cuda), _OP, "x in float32, bfloat16, float16 or float64", x.dtype)
    served = (torch.float64,) if wide else _LOW
    for name, tensor in (("out", out), ("table", table)):
        if tensor is not None:
            rule = f"{name} in float64 where x is" if wide else f"{name} in float32, bfloat16 or float16"
            require(tensor.dtype in served, _OP, rule, tensor.dtype)
    if table is not None:
        require(table.dim() == 2, _OP, "table of shape [M, D]", table)
        _check_tensor("table", table, (table.shape[0], width), x)
        require(table.shape[0] < 2**31, _OP, "fewer than 2^31 rows of table", table.shape[0])
    _check_tensor("crow", crow, (count + 1,), x)
    require(crow.dtype == torch.int64, _OP, "crow in int64", crow.dtype)
    _check_tensor("col", col, (col.numel(),), x)
    require(col.dtype == torch.int32, _OP, "col in int32", col.dtype)
    _check_tensor("inv_sqrt_degree", inv_sqrt_degree, (count,), x)
    require(inv_sqrt_degree.dtype == torch.float32, _OP, "inv_sqrt_degree in float32", inv_sqrt_degree.dtype)
    if rows is not None:
        _check_tensor("rows", rows, (rows.numel(),), x)
        require(rows.dtype == torch.int64, _OP, "rows in int64", rows.dtype)
    if slot is not None:
        require(table is not None, _OP, "a table where there are slots", None)
        _check_tensor("slot", slot, (slot.numel(),), x)
        require(slot.dtype == torch.int32, _OP, "slot in int32", slot.dtype)
        require(slot.numel() < 2**31, _OP, "fewer than 2^31 slots", slot.numel())
    _check_tensor("out", out, (count if rows is None else rows.numel(), width), x)


def _check_values(table: Tensor | None, crow: Tensor, col: Tensor, rows: Tensor | None, slot: Tensor | None) -> None:
    """What only the values show; on a GPU this waits for the device."""
    limits: list[tuple[str, Tensor | None, int, int]] = [("rows", rows, 0, crow.numel() - 1)]
    if table is not None:
        limits.append(("col", col, 0, len(table) if slot is None else slot.numel()))
        limits.append(("slot", slot, -1, len(table)))
    for name, ids, low, high in limits:
        if ids is not None and ids.numel():
            outside = (ids < low) | (ids >= high)
            at = int(outside.long().argmax())
            require(not bool(outside[at]), _OP, f"{name} in [{low}, {high})", f"{int(ids[at])} at position {at}")
    rises = bool((crow.diff() >= 0).all()) and int(crow[0]) == 0 and int(crow[-1]) == col.numel()
    require(rises, _OP, f"crow to rise from 0 to nnz ({col.numel()})", f"{int(crow[0])} .. {int(crow[-1])}")


def _reference(
    out: Tensor,
    table: Tensor | None,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    inv_sqrt_degree: Tensor,
    mean: float | None,
    rows: Tensor | None,
    slot: Tensor | None,
) -> None:
    _check(out, table, x, crow, col, inv_sqrt_degree, mean, rows, slot)
    _check_values(table, crow, col, rows, slot)
    wide = torch.promote_types(x.dtype, torch.float32)
    s, total = inv_sqrt_degree.to(wide)[:, None], x.to(wide)
    if table is not None:
        node = torch.repeat_interleave(torch.arange(len(x), device=x.device), crow.diff())
        # Slot -1 is the last row.
        table = table if slot is None else torch.cat((table, table.new_zeros(1, table.shape[1])))[slot.long()]
        total = total + s * torch.zeros_like(total).index_add(0, node, table[col.long()].to(wide))
    total = total * (s if mean is None else mean)
    out.copy_(total if rows is None else total[rows])


def _triton(*args: Any) -> None:
    from collm_fast.kernels import layer as kernels

    raise_device_errors()
    _check(*args)
    _, table, x, crow, col, *_, rows, slot = args
    if not x.is_cuda:
        _check_values(table, crow, col, rows, slot)
    kernels.layer(*args, error_records(_RULES, x.device))


_native.register(_OP, reference=_reference, triton=_triton)


@torch.library.register_fake(f"collm_fast::{_OP}", lib=_native.LIBRARY)
def _fake(*args: Any) -> None:
    _check(*args)


def lightgcn_layer(
    out: Tensor,
    table: Tensor | None,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    inv_sqrt_degree: Tensor,
    *,
    mean: float | None = None,
    rows: Tensor | None = None,
    slot: Tensor | None = None,
) -> None:
    """One step of h = x + S A g over a block of the graph, written into `out`.

        h[i] = x[i] + s[i] sum_{e in row i} table[col[e]];   out[i] = mean h[i], or s[i] h[i]: the next table

    Args:
        out: [n, D], contiguous; shares no memory with `table` or `x`.
        table: [M, D] rows of g = S h of the layer before, contiguous, in the storage dtype; None: no sum (layer 0).
        x: [n, D] float32, bfloat16 or float16 (float64 on the CPU, then `table` and `out` too), any strides.
        crow, col: [n+1] int64 and [nnz] int32, the neighbours of each row as positions in `table` (or in `slot`).
        inv_sqrt_degree: [n] float32, s.
        mean: the factor of the result, 1 / (K + 1) after K layers; None: the next table is wanted.
        rows: [B] int64 in [0, n): write h of these rows only; `out` is [B, D].
        slot: [*] int32, where the table lacks rows of zeros: the table's row of each position, -1 for zeros.
    Raises: ValueError `lightgcn_layer: expected <rule>, got <value>`.
    Not differentiable: `collm_fast.distributed` knows the gradient of all layers.
    Source: He et al., LightGCN (arXiv 2002.02126), equation 7.
    """
    torch.ops.collm_fast.lightgcn_layer(out, table, x, crow, col, inv_sqrt_degree, mean, rows, slot)

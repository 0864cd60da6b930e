"""Injection of rows into token embeddings, and its two halves: schema, fake, autograd, registration, public functions.

The kernels live in csrc/cpu/inject.cpp, csrc/cuda/inject.cuh and kernels/inject.py; the specification in reference.py.
Floor F1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.ops._arguments import dtype_name, require
from collm_fast.ops._autograd import register_autograd
from collm_fast.ops._device_errors import error_record, raise_device_errors

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDICES = (torch.int32, torch.int64)

_native.LIBRARY.define("embed_inject(Tensor token_ids, Tensor table, Tensor rows, Tensor row_index) -> Tensor")
_native.LIBRARY.define("gather_rows(Tensor table, Tensor index) -> Tensor")
_native.LIBRARY.define("scatter_rows(Tensor grad, Tensor index, SymInt num_rows) -> Tensor")


# --- checks: the twin of csrc/inject.h, the same sentences in the same order -------------------------------------
def _check_float(op: str, name: str, tensor: Tensor) -> None:
    require(tensor.dtype in _FLOATS, op, f"{name} of dtype float32, bfloat16, float16 or float64", tensor.dtype)


def _check_device(op: str, name: str, tensor: Tensor, first: str, device: torch.device) -> None:
    require(tensor.device == device, op, f"{name} on {first}'s device {device}", tensor.device)


def _check_embed_inject(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> None:
    op = "embed_inject"
    require(token_ids.dtype == torch.int64, op, "token_ids of dtype int64", token_ids.dtype)
    require(row_index.dtype == torch.int32, op, "row_index of dtype int32", row_index.dtype)
    rule = f"row_index of token_ids' shape {list(token_ids.shape)}"
    require(row_index.shape == token_ids.shape, op, rule, row_index)
    require(table.dim() == 2, op, "table of shape [V, H]", table)
    require(rows.dim() == 2, op, "rows of shape [S, H]", rows)
    require(rows.shape[1] == table.shape[1], op, f"rows of the table's {table.shape[1]} columns", rows.shape[1])
    _check_float(op, "table", table)
    require(rows.dtype == table.dtype, op, f"rows of the table's dtype {dtype_name(table.dtype)}", rows.dtype)
    for name, tensor in (("token_ids", token_ids), ("rows", rows), ("row_index", row_index)):
        _check_device(op, name, tensor, "table", table.device)


def _check_gather_rows(table: Tensor, index: Tensor) -> None:
    op = "gather_rows"
    require(index.dtype in _INDICES, op, "index of dtype int32 or int64", index.dtype)
    require(table.dim() == 2, op, "table of shape [V, H]", table)
    _check_float(op, "table", table)
    _check_device(op, "index", index, "table", table.device)


def _check_scatter_rows(grad: Tensor, index: Tensor, num_rows: int) -> None:
    op = "scatter_rows"
    require(index.dtype in _INDICES, op, "index of dtype int32 or int64", index.dtype)
    same = grad.dim() == index.dim() + 1 and grad.shape[:-1] == index.shape
    require(same, op, f"grad of index's shape {list(index.shape)} and one more dimension", grad)
    _check_float(op, "grad", grad)
    require(0 <= num_rows < 2**31, op, "num_rows in [0, 2^31)", num_rows)
    _check_device(op, "index", index, "grad", grad.device)


def _check_values(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    bad = (values < low) | (values >= high)
    if bool(bad.any()):
        require(False, op, f"{name} in [{low}, {high})", int(values[bad][0]))


def _check_embed_inject_values(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> None:
    _check_values("embed_inject", "row_index", row_index, -1, rows.shape[0])
    # An injected place's token id is a placeholder: it may be anything.
    _check_values("embed_inject", "token_ids", token_ids[row_index < 0], 0, table.shape[0])


# --- implementations in Python: the reference, and Triton --------------------------------------------------------
def _embed_inject_reference(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
    _check_embed_inject(token_ids, table, rows, row_index)
    _check_embed_inject_values(token_ids, table, rows, row_index)
    return reference.embed_inject(token_ids, table, rows, row_index).contiguous()


def _gather_rows_reference(table: Tensor, index: Tensor) -> Tensor:
    _check_gather_rows(table, index)
    _check_values("gather_rows", "index", index, -1, table.shape[0])
    return reference.gather_rows(table, index).contiguous()


def _scatter_rows_reference(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    _check_scatter_rows(grad, index, num_rows)
    _check_values("scatter_rows", "index", index, -1, num_rows)
    return reference.scatter_rows(grad, index, num_rows)


def _record(rule: str, tensor: Tensor) -> Tensor:
    return error_record(rule, tensor.device)


# On a GPU the values are guarded in the kernel and reported later; in the interpreter they can be looked at now.
def _embed_inject_triton(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
    from collm_fast.kernels import inject

    raise_device_errors()
    _check_embed_inject(token_ids, table, rows, row_index)
    if not table.is_cuda:
        _check_embed_inject_values(token_ids, table, rows, row_index)
    token_record = _record("embed_inject: expected token_ids in [0, ", table)
    row_record = _record("embed_inject: expected row_index in [-1, ", table)
    result: Tensor = inject.embed_inject(token_ids, table, rows, row_index, token_record, row_record)
    return result


def _gather_rows_triton(table: Tensor, index: Tensor) -> Tensor:
    from collm_fast.kernels import inject

    raise_device_errors()
    _check_gather_rows(table, index)
    if not table.is_cuda:
        _check_values("gather_rows", "index", index, -1, table.shape[0])
    result: Tensor = inject.gather_rows(table, index, _record("gather_rows: expected index in [-1, ", table))
    return result


def _scatter_rows_triton(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    from collm_fast.kernels import inject

    raise_device_errors()
    _check_scatter_rows(grad, index, num_rows)
    if not grad.is_cuda:
        _check_values("scatter_rows", "index", index, -1, num_rows)
    result: Tensor = inject.scatter_rows(grad, index, num_rows, _record("scatter_rows: expected index in [-1, ", grad))
    return result


_native.register("embed_inject", reference=_embed_inject_reference, triton=_embed_inject_triton)
_native.register("gather_rows", reference=_gather_rows_reference, triton=_gather_rows_triton)
_native.register("scatter_rows", reference=_scatter_rows_reference, triton=_scatter_rows_triton)


# --- fakes and autograd ------------------------------------------------------------------------------------------
@torch.library.register_fake("collm_fast::embed_inject", lib=_native.LIBRARY)
def _embed_inject_fake(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
    _check_embed_inject(token_ids, table, rows, row_index)
    return table.new_empty((*token_ids.shape, table.shape[1]))


@torch.library.register_fake("collm_fast::gather_rows", lib=_native.LIBRARY)
def _gather_rows_fake(table: Tensor, index: Tensor) -> Tensor:
    _check_gather_rows(table, index)
    return table.new_empty((*index.shape, table.shape[1]))


@torch.library.register_fake("collm_fast::scatter_rows", lib=_native.LIBRARY)
def _scatter_rows_fake(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    _check_scatter_rows(grad, index, num_rows)
    return grad.new_empty((num_rows, grad.shape[-1]))


def _embed_inject_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    token_ids, table, rows, row_index = inputs
    ctx.save_for_backward(token_ids, row_index)
    ctx.num_tokens, ctx.num_rows = table.shape[0], rows.shape[0]


def _embed_inject_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
    token_ids, row_index = ctx.saved_tensors
    for_table = for_rows = None
    if ctx.needs_input_grad[1]:
        text = token_ids.masked_fill(row_index >= 0, -1)
        for_table = _scatter_rows(grad, text, ctx.num_tokens)
    if ctx.needs_input_grad[2]:
        for_rows = _scatter_rows(grad, row_index, ctx.num_rows)
    return None, for_table, for_rows, None


def _gather_rows_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    table, index = inputs
    ctx.save_for_backward(index)
    ctx.num_rows = table.shape[0]


def _gather_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return _scatter_rows(grad, index, ctx.num_rows), None


def _scatter_rows_setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return _gather_rows(grad, index), None, None


_embed_inject: Callable[..., Tensor] = register_autograd("embed_inject", _embed_inject_backward, _embed_inject_setup)
_gather_rows: Callable[..., Tensor] = register_autograd("gather_rows", _gather_rows_backward, _gather_rows_setup)
_scatter_rows: Callable[..., Tensor] = register_autograd("scatter_rows", _scatter_rows_backward, _scatter_rows_setup)


# --- public functions --------------------------------------------------------------------------------------------
def embed_inject(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
    """Token embeddings with rows of another source at marked places, in one pass over the output.

        out[t] = rows[row_index[t]] if row_index[t] >= 0 else table[token_ids[t]]

    Args:
        token_ids: [...] int64 in [0, V); at a place with row_index >= 0 it is a placeholder and may be anything.
        table:     [V, H] float32, bfloat16, float16 or float64, of any strides.
        rows:      [S, H] of the table's dtype (under autocast: cast to it).
        row_index: [...] int32 in [-1, S); -1 marks a text token.
    Returns: [..., H]. Gradients: rows (each sums over all its places, in order, in float32) and, if it requires one,
        table; the same inputs give the same bits.
    Raises: ValueError for other shapes, dtypes or devices and for values out of range; on a GPU the values are
        reported by the next op or by `check_device_errors`, such a place is zero, and where the result has no
        elements no value is looked at.
    Source: CoLLM (arXiv 2310.19488), section 4.2: the hybrid encoding of the prompt.
    """
    if rows.dtype != table.dtype:
        device = table.device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            rows = rows.to(table.dtype)  # the mapper's output; casting the table instead would copy the vocabulary
    return _embed_inject(token_ids, table, rows, row_index)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, zero where the index is -1.

        out[i] = table[index[i]] if index[i] >= 0 else 0

    Args:
        table: [V, H] float32, bfloat16, float16 or float64, of any strides.
        index: [...] int32 or int64 in [-1, V).
    Returns: [..., H]. The gradient is `scatter_rows`: deterministic, float32 accumulation.
    Raises: ValueError for other shapes, dtypes or devices and for an index out of range (see `embed_inject`).
    """
    return _gather_rows(table, index)


def scatter_rows(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sums of rows by their index; -1 is skipped.

        out[s] = sum of grad[i] over all i with index[i] == s, in the order of i

    Args:
        grad:  [..., H] float32, bfloat16, float16 or float64, of any strides.
        index: [...] int32 or int64 in [-1, num_rows).
        num_rows: in [0, 2^31).
    Returns: [num_rows, H] of grad's dtype, accumulated in float32 (float64 in float64), without atomics: the same
        inputs give the same bits for any number of threads.
    Raises: ValueError for other shapes, dtypes or devices and for an index out of range (see `embed_inject`).
    """
    return _scatter_rows(grad, index, num_rows)

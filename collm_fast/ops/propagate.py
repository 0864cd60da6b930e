"""LightGCN propagation: schema, fake, autograd formula, registration and the public function.

The kernels live in csrc/cpu/propagate.cpp, csrc/cuda/propagate.cuh and kernels/propagate.py; the specification in
reference.py; the graph in graph.py. Floor F1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.graph import BipartiteGraph
from collm_fast.ops._arguments import dtype_name, require, seed_tensor, without_autocast
from collm_fast.ops._device_errors import error_records, raise_device_errors

_OP = "lightgcn_propagate"
_BACKWARD = "lightgcn_propagate_backward"
_LOW = (torch.float32, torch.bfloat16, torch.float16)
# What a Triton kernel may find wrong, in the order of its records.
_RULES = (
    f"{_OP}: expected rows in [0, ",
    f"{_OP}: expected crow to rise from 0 to nnz (",
    f"{_OP}: expected col in [0, ",
)

_native.LIBRARY.define(
    f"{_OP}(Tensor x, Tensor crow, Tensor col, Tensor inv_sqrt_degree, int num_layers, ScalarType? storage_dtype, "
    "Tensor? rows, float dropout_p, Tensor? seed) -> Tensor"
)
_native.LIBRARY.define(
    f"{_BACKWARD}(Tensor grad, Tensor crow, Tensor col, Tensor inv_sqrt_degree, int num_layers, "
    "ScalarType? storage_dtype, Tensor rows, float dropout_p, Tensor? seed) -> Tensor"
)


def _check_graph(op: str, x: Tensor, crow: Tensor, col: Tensor, inv: Tensor, nodes: int) -> None:
    require(crow.dim() == 1 and crow.shape[0] == nodes + 1, op, f"crow of shape [{nodes + 1}]", crow)
    require(crow.dtype == torch.int64, op, "crow in int64", crow.dtype)
    require(col.dim() == 1, op, "col of shape [nnz]", col)
    require(col.dtype == torch.int32, op, "col in int32", col.dtype)
    require(inv.dim() == 1 and inv.shape[0] == nodes, op, f"inv_sqrt_degree of shape [{nodes}]", inv)
    require(inv.dtype == torch.float32, op, "inv_sqrt_degree in float32", inv.dtype)
    require(nodes < 2**31, op, "fewer than 2^31 nodes", nodes)
    contiguous = crow.is_contiguous() and col.is_contiguous() and inv.is_contiguous()
    require(contiguous, op, "contiguous crow, col and inv_sqrt_degree", "strided ones")
    for what, tensor in (("crow", crow), ("col", col), ("inv_sqrt_degree", inv)):
        require(tensor.device == x.device, op, f"{what} on the device of x", "another")


def _check_options(
    op: str,
    x_name: str,
    x: Tensor,
    num_layers: int,
    storage_dtype: torch.dtype | None,
    rows: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    float64 = x.device.type != "cuda"
    served = (*_LOW, torch.float64) if float64 else _LOW
    require(x.dtype in served, op, f"{x_name} in {', '.join(map(dtype_name, served))}", x.dtype)
    require(num_layers >= 0, op, "num_layers >= 0", num_layers)
    if storage_dtype is not None:
        wide = x.dtype == torch.float64
        rule = "float64 where x is float64" if wide else "one of float32, bfloat16, float16"
        ok = storage_dtype == torch.float64 if wide else storage_dtype in _LOW
        require(ok, op, f"storage_dtype None or {rule}", storage_dtype)
    if rows is not None:
        require(rows.dim() == 1, op, "rows of shape [B]", rows)
        require(rows.dtype == torch.int64, op, "rows in int64", rows.dtype)
        require(rows.device == x.device, op, "rows on the device of x", "another")
    require(0.0 <= dropout_p < 1.0, op, "dropout_p in [0, 1)", dropout_p)
    require(dropout_p == 0.0 or seed is not None, op, "a seed where dropout_p > 0", None)
    if seed is not None:
        require(seed.dtype == torch.int64, op, "seed in int64", seed.dtype)
        require(seed.numel() == 1, op, "seed of one element", seed)
        require(seed.device == x.device, op, "seed on the device of x", "another")


def _check_forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    inv: Tensor,
    num_layers: int,
    storage_dtype: torch.dtype | None,
    rows: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    require(x.dim() == 2, _OP, "x of shape [N, D]", x)
    _check_graph(_OP, x, crow, col, inv, x.shape[0])
    _check_options(_OP, "x", x, num_layers, storage_dtype, rows, dropout_p, seed)


def _check_backward(
    grad: Tensor,
    crow: Tensor,
    col: Tensor,
    inv: Tensor,
    num_layers: int,
    storage_dtype: torch.dtype | None,
    rows: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    require(grad.dim() == 2, _BACKWARD, "grad of shape [B, D]", grad)
    require(crow.dim() == 1 and crow.numel() >= 1, _BACKWARD, "crow of shape [N + 1]", crow)
    _check_graph(_BACKWARD, grad, crow, col, inv, crow.shape[0] - 1)
    _check_options(_BACKWARD, "grad", grad, num_layers, storage_dtype, rows, dropout_p, seed)
    require(rows.numel() == grad.shape[0], _BACKWARD, f"rows of shape [{grad.shape[0]}]", rows)


def _check_values(op: str, crow: Tensor, col: Tensor, rows: Tensor | None) -> None:
    """What only the values show; on a GPU this waits for the device."""
    nodes, nnz = crow.numel() - 1, col.numel()
    if rows is not None and rows.numel():
        outside = (rows < 0) | (rows >= nodes)
        if bool(outside.any()):
            at = int(outside.long().argmax())
            require(False, op, f"rows in [0, {nodes})", f"{int(rows[at])} at position {at}")
    falls = crow.diff() < 0
    first, last = int(crow[0]), int(crow[-1])
    rule = f"crow to rise from 0 to nnz ({nnz})"
    if bool(falls.any()):
        require(False, op, rule, int(crow[1:][falls][0]))
    require(first == 0 and last == nnz, op, rule, first if first != 0 else last)
    outside = (col < 0) | (col >= nodes)
    if bool(outside.any()):
        at = int(outside.long().argmax())
        require(False, op, f"col in [0, {nodes})", f"{int(col[at])} at edge {at}")


def _graph_of(crow: Tensor, col: Tensor, inv: Tensor) -> BipartiteGraph:
    # The reference reads the three tensors only; how the nodes divide into users and items does not matter to it.
    return BipartiteGraph(crow, col, inv, num_users=crow.numel() - 1, num_items=0)


def _forward_reference(*args: Any) -> Tensor:
    x, crow, col, inv, num_layers, storage_dtype, rows, dropout_p, seed = args
    _check_forward(*args)
    _check_values(_OP, crow, col, rows)
    graph = _graph_of(crow, col, inv)
    out = reference.lightgcn_propagate(
        x, graph, num_layers, storage_dtype=storage_dtype, rows=rows, dropout_p=dropout_p, seed=seed
    )
    return out.clone(memory_format=torch.contiguous_format) if out.data_ptr() == x.data_ptr() else out.contiguous()


def _backward_reference(*args: Any) -> Tensor:
    grad, crow, col, inv, num_layers, storage_dtype, rows, dropout_p, seed = args
    _check_backward(*args)
    _check_values(_BACKWARD, crow, col, rows)
    wide = torch.promote_types(grad.dtype, torch.float32)
    spread = torch.zeros(crow.numel() - 1, grad.shape[1], dtype=wide, device=grad.device)
    spread = spread.index_add(0, rows, grad.to(wide))
    graph = _graph_of(crow, col, inv)
    out = reference.lightgcn_propagate(
        spread, graph, num_layers, storage_dtype=storage_dtype, dropout_p=dropout_p, seed=seed
    )
    return out.to(grad.dtype).contiguous()


def _forward_triton(*args: Any) -> Tensor:
    from collm_fast.kernels import propagate as kernels

    raise_device_errors()
    _check_forward(*args)
    if not args[0].is_cuda:
        _check_values(_OP, args[1], args[2], args[6])
    out: Tensor = kernels.propagate(*args, error_records(_RULES, args[0].device))
    return out


def _backward_triton(*args: Any) -> Tensor:
    from collm_fast.kernels import propagate as kernels

    raise_device_errors()
    _check_backward(*args)
    if not args[0].is_cuda:
        _check_values(_BACKWARD, args[1], args[2], args[6])
    out: Tensor = kernels.propagate_backward(*args, error_records(_RULES, args[0].device))
    return out


_native.register(_OP, reference=_forward_reference, triton=_forward_triton)
_native.register(_BACKWARD, reference=_backward_reference, triton=_backward_triton)


@torch.library.register_fake(f"collm_fast::{_OP}", lib=_native.LIBRARY)
def _forward_fake(*args: Any) -> Tensor:
    x: Tensor = args[0]
    rows: Tensor | None = args[6]
    _check_forward(*args)
    return x.new_empty(x.shape[0] if rows is None else rows.shape[0], x.shape[1])


@torch.library.register_fake(f"collm_fast::{_BACKWARD}", lib=_native.LIBRARY)
def _backward_fake(*args: Any) -> Tensor:
    grad: Tensor = args[0]
    crow: Tensor = args[1]
    _check_backward(*args)
    return grad.new_empty(crow.shape[0] - 1, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, crow, col, inv, num_layers, storage_dtype, rows, dropout_p, seed = inputs
    ctx.save_for_backward(crow, col, inv, rows, seed)
    ctx.options = (num_layers, storage_dtype, dropout_p)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The operator is self-adjoint: the gradient is the same call. With `rows` it starts from a few rows only.
    crow, col, inv, rows, seed = ctx.saved_tensors
    num_layers, storage_dtype, dropout_p = ctx.options
    args = (grad, crow, col, inv, num_layers, storage_dtype, rows, dropout_p, seed)
    op = torch.ops.collm_fast.lightgcn_propagate if rows is None else torch.ops.collm_fast.lightgcn_propagate_backward
    # The forward's autocast has chosen the dtype; another around .backward() must not round the gradient.
    with without_autocast():
        return (op(*args), *(None,) * 8)


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    crow, col, inv, rows, seed = ctx.saved_tensors
    num_layers, storage_dtype, dropout_p = ctx.options
    args = (grad, crow, col, inv, num_layers, storage_dtype, rows, dropout_p, seed)
    with without_autocast():
        return (torch.ops.collm_fast.lightgcn_propagate(*args), *(None,) * 8)


torch.library.register_autograd(
    f"collm_fast::{_OP}", _forward_backward, setup_context=_setup_context, lib=_native.LIBRARY
)
torch.library.register_autograd(
    f"collm_fast::{_BACKWARD}", _backward_backward, setup_context=_setup_context, lib=_native.LIBRARY
)


def _register_autocast(device: str, key: str) -> None:
    # torch.library.register_autocast would cast every floating tensor, inv_sqrt_degree too.
    def kernel(x: Tensor, *args: Any) -> Tensor:
        with without_autocast():
            if x.device.type == device and x.dtype in _LOW:
                x = x.to(torch.get_autocast_dtype(device))
            result: Tensor = torch.ops.collm_fast.lightgcn_propagate(x, *args)
            return result

    _native.LIBRARY.impl(_OP, kernel, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


def lightgcn_propagate(
    x: Tensor,
    graph: BipartiteGraph,
    num_layers: int,
    *,
    storage_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """The mean of the layers of LightGCN, or some rows of it.

        out = 1/(K+1) sum_{k=0..K} (D^-1/2 A D^-1/2)^k x

    Args:
        x: [N, D] float32, bfloat16 or float16 (float64 on the CPU), any strides; users before items.
        graph: `BipartiteGraph` of N nodes on x's device. A node without edges propagates zero.
        num_layers: K >= 0.
        storage_dtype: what intermediate layers are stored in; None: the dtype of accumulation, float32 (float64 for
            float64). bfloat16 halves the traffic at a relative error of about 4e-4.
        rows: [B] int64 in [0, N), repeats allowed: return out[rows] only, without the work for other rows in the last
            layer, nor in the first one backwards.
        dropout_p: the probability in [0, 1) to drop an undirected edge; kept edges are scaled by 1 / (1 - p).
        seed: the seed of the dropped edges, an int or an int64 tensor of one element on x's device. Under
            torch.compile pass a tensor: an int is a constant of the compiled graph.
    Returns: [N, D], or [B, D] with `rows`, in x's dtype. Differentiable in x, twice if need be; deterministic.
    Raises: ValueError `lightgcn_propagate: expected <rule>, got <value>`. On CUDA a bad value inside crow, col or rows
        is raised at the next synchronisation (`check_device_errors`), where a kernel has read it; on the CPU every
        value is checked, read or not.
    Source: He et al., LightGCN (arXiv 2002.02126), equations 7 and 8.
    """
    seed = seed_tensor(_OP, seed, x.device)
    result: Tensor = torch.ops.collm_fast.lightgcn_propagate(
        x, graph.crow, graph.col, graph.inv_sqrt_degree, num_layers, storage_dtype, rows, dropout_p, seed
    )
    return result

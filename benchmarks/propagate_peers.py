"""The other ways to compute LightGCN's layers: what `lightgcn_propagate` is timed against, and checked against.

All take x [N, D] and return the layer mean [N, D]. Every matrix, normalised, is built before the clock runs. Not here:
cuSPARSE (`cusparse.py`), the graphs (`graphs.py`) and the cases (`bench_propagate.py`).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collm_fast import BipartiteGraph

Propagate = Callable[[Tensor], Tensor]


def values(graph: BipartiteGraph) -> Tensor:
    """[nnz] float32: (deg_i deg_j)^-1/2 of every stored edge."""
    node = torch.repeat_interleave(torch.arange(graph.num_nodes, device=graph.col.device), graph.crow.diff())
    return graph.inv_sqrt_degree[node] * graph.inv_sqrt_degree[graph.col.long()]


def running_mean(multiply: Propagate, K: int, x: Tensor) -> Tensor:
    """The layers one by one, added up: no stack."""
    total = layer = x
    for _ in range(K):
        layer = multiply(layer)
        total = total + layer
    return total / (K + 1)


def stacked_mean(matrix: Tensor, K: int, x: Tensor) -> Tensor:
    """LightGCN-PyTorch's formulation (`LightGCN.computer` in its model.py): K + 1 tables stacked, their mean."""
    layers = [x]
    for _ in range(K):
        layers.append(torch.sparse.mm(matrix, layers[-1]))
    return torch.stack(layers, dim=1).mean(dim=1)


class Bags:
    """A layer as `embedding_bag` of the neighbours' rows, scaled before and after: torch's fastest kernel for it.

    Nobody publishes LightGCN this way; it shows what plain torch could reach.
    """

    def __init__(self, graph: BipartiteGraph, dtype: torch.dtype, device: torch.device) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.dtype = dtype
        self.scale = graph.inv_sqrt_degree.to(device, wide)[:, None]
        # int32 serves FBGEMM's kernel, unless there are too many edges for an offset.
        narrow = torch.int32 if graph.col.numel() < 2**31 else torch.int64
        self.index = graph.col.to(device, narrow)
        self.offsets = graph.crow.to(device, narrow)

    def multiply(self, x: Tensor) -> Tensor:
        table = (self.scale * x).to(self.dtype)
        sums = torch.nn.functional.embedding_bag(self.index, table, self.offsets, mode="sum", include_last_offset=True)
        return self.scale * sums


def self_adjoint(multiply: Propagate, K: int) -> Propagate:
    """The running mean of a symmetric product, with its gradient: the same call."""

    def mean(x: Tensor) -> Tensor:
        result: Tensor = _SelfAdjoint.apply(partial(running_mean, multiply, K), x)
        return result

    return mean


class _SelfAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Propagate, x: Tensor) -> Tensor:
        ctx.fn = fn
        return fn(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.fn(grad)


def exact(graph: BipartiteGraph, K: int, x: Tensor) -> Tensor:
    """The layer mean in float64, on x's device, by torch's kernels alone."""
    with torch.no_grad():
        return running_mean(Bags(graph, torch.float64, x.device).multiply, K, x.double())


def differentiable(graph: BipartiteGraph, K: int, device: torch.device) -> dict[str, Propagate]:
    """torch.sparse in three forms, and `embedding_bag`."""
    size, value = (graph.num_nodes, graph.num_nodes), values(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta
        csr = torch.sparse_csr_tensor(graph.crow, graph.col.long(), value, size).to(device)
        narrow = torch.sparse_csr_tensor(graph.crow.int(), graph.col, value, size).to(device)
        coo = csr.to_sparse_coo().coalesce()
    return {
        "naive": partial(stacked_mean, coo, K),
        "torch_csr": partial(running_mean, csr.__matmul__, K),
        "torch_csr_int32": partial(running_mean, narrow.__matmul__, K),
        "embedding_bag": self_adjoint(Bags(graph, torch.float32, device).multiply, K),
    }


def pyg(graph: BipartiteGraph, K: int, device: torch.device) -> Propagate:
    """PyTorch Geometric's own model, `torch_geometric.nn.models.LightGCN.get_embedding`: LGConv on an edge list.

    Raises: ImportError where torch_geometric is not installed.
    """
    if importlib.util.find_spec("torch_geometric") is None:
        raise ImportError("needs torch_geometric, which is not installed")
    from torch_geometric.nn import LGConv

    node = torch.repeat_interleave(torch.arange(graph.num_nodes), graph.crow.diff())
    edges = torch.stack((graph.col.long(), node)).to(device)
    layer = LGConv()

    def mean(x: Tensor) -> Tensor:
        alpha = 1.0 / (K + 1)
        out = x * alpha
        for _ in range(K):
            x = layer(x, edges)
            out = out + x * alpha
        return out

    return mean


def scipy_csr(graph: BipartiteGraph, K: int, x: Tensor) -> Callable[[], Tensor]:
    """A call that multiplies with a SciPy CSR matrix and keeps a running sum; forward only, on the CPU."""
    import scipy.sparse  # not at the top: a GPU needs none of it

    parts = (values(graph).numpy(), graph.col.numpy(), graph.crow.numpy())
    matrix = scipy.sparse.csr_array(parts, shape=(graph.num_nodes, graph.num_nodes))
    first: np.ndarray = x.numpy()

    def mean() -> Tensor:
        total = layer = first
        for _ in range(K):
            layer = matrix @ layer
            total = total + layer
        return torch.from_numpy(total / np.float32(K + 1))

    return mean

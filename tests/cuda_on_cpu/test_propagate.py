"""The CUDA kernels of lightgcn_propagate, run on the host under AddressSanitizer, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import emulation
import pytest
import torch
from conftest import requires
from torch import Tensor

from collm_fast import reference
from collm_fast.graph import BipartiteGraph

pytestmark = requires("compiler")

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def graph_with_hub() -> BipartiteGraph:
    """40 users and 700 items: user 0 likes 650 of them (more than kHubEdges), user 39 and the last items like none."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(1, 39, (300,), generator=generator)
    items = torch.randint(0, 650, (300,), generator=generator)
    hub = torch.arange(650)
    return BipartiteGraph.from_interactions(
        torch.cat((users, torch.zeros_like(hub), users[:5])), torch.cat((items, hub, items[:5])), 40, 700
    )


@dataclass
class Emulated:
    out: Tensor
    errors: Tensor  # [3, 3]: raised, value, limit of rows, crow, col


def run(
    x: Tensor,
    graph: BipartiteGraph,
    num_layers: int,
    *,
    storage: torch.dtype = torch.float32,
    rows: Tensor | None = None,
    backward: bool = False,
    dropout_p: float = 0.0,
    seed: int | None = None,
    order: int = 0,
) -> Emulated:
    nodes = graph.crow.numel() - 1
    count = nodes if rows is None else rows.numel()
    stored = x if x.is_contiguous() else x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    by_row = None if rows is None else torch.sort(rows, stable=True)
    inputs = {
        "x": stored,
        "crow": graph.crow,
        "col": graph.col,
        "inv_sqrt_degree": graph.inv_sqrt_degree,
        "rows": rows,
        "sorted": None if by_row is None else by_row.values,
        "sort_order": None if by_row is None else by_row.indices,
        "seed": None if seed is None else torch.tensor([seed]),
    }
    out_rows = nodes if backward or rows is None else count
    result = emulation.run(
        emulation.build("propagate_main.cpp"),
        inputs,
        {"out": ((out_rows, x.shape[1]), x.dtype), "errors": ((3, 3), torch.int64)},
        num_layers=num_layers,
        D=x.shape[1],
        count=count,
        backward=int(backward),
        has_rows=int(rows is not None),
        type=TYPES[x.dtype],
        storage=TYPES[storage],
        row_stride=x.stride(0),
        column_stride=x.stride(1),
        dropout_p=dropout_p,
        order=order,
    )
    return Emulated(result["out"], result["errors"])


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("D", "num_layers"), [(1, 1), (7, 2), (64, 3), (130, 2), (5, 0)])
def test_forward(D: int, num_layers: int) -> None:
    graph = graph_with_hub()
    x = torch.randn(graph.num_nodes, D)
    result = run(x, graph, num_layers)
    assert error(result.out, reference.lightgcn_propagate(x.double(), graph, num_layers)) <= 1e-6
    assert not result.errors[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    graph = graph_with_hub()
    x = torch.randn(graph.num_nodes, 33).to(dtype)
    expected = reference.lightgcn_propagate(x.double(), graph, 2)
    torchs_own = error(reference.lightgcn_propagate(x, graph, 2), expected)
    assert error(run(x, graph, 2).out, expected) <= 2 * torchs_own
    stored = error(run(x.float(), graph, 2, storage=dtype).out, expected)
    assert stored <= 2 * error(reference.lightgcn_propagate(x.float(), graph, 2, storage_dtype=dtype), expected)


def test_strided_x_rows_and_dropout_match_the_reference() -> None:
    graph = graph_with_hub()
    x = torch.randn(20, graph.num_nodes).T
    rows = torch.tensor([0, 739, 5, 5, 41, 39])
    result = run(x, graph, 3, rows=rows, dropout_p=0.3, seed=-5)
    expected = reference.lightgcn_propagate(x.double(), graph, 3, rows=rows, dropout_p=0.3, seed=-5)
    assert error(result.out, expected) <= 1e-6


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_backward_of_rows(num_layers: int) -> None:
    graph = graph_with_hub()
    rows = torch.tensor([3, 700, 0, 3, 3, 45, 0])
    x = torch.randn(graph.num_nodes, 20, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 40)[:, ::2]
    out = reference.lightgcn_propagate(x, graph, num_layers, rows=rows, dropout_p=0.2, seed=9)
    (expected,) = torch.autograd.grad(out, x, grad.double())
    result = run(grad, graph, num_layers, rows=rows, backward=True, dropout_p=0.2, seed=9)
    assert error(result.out, expected) <= 1e-6


def test_the_order_of_threads_changes_no_bit() -> None:
    graph = graph_with_hub()
    x = torch.randn(graph.num_nodes, 40)
    assert torch.equal(run(x, graph, 2, order=0).out, run(x, graph, 2, order=1).out)


def test_bad_values_are_reported_and_read_nothing() -> None:
    graph = graph_with_hub()
    x = torch.randn(graph.num_nodes, 8)
    col = graph.col.clone()
    col[7] = 5000
    bad = BipartiteGraph(graph.crow, col, graph.inv_sqrt_degree, 40, 700)
    assert run(x, bad, 1).errors[2].tolist() == [1, 5000, 740]
    assert run(x, graph, 1, rows=torch.tensor([2, -3])).errors[0].tolist() == [1, -3, 740]
    crow = graph.crow.clone()
    crow[3] = 10**6
    bad = BipartiteGraph(crow, graph.col, graph.inv_sqrt_degree, 40, 700)
    assert run(x, bad, 1).errors[1, 0] == 1
    # Every row lies inside [0, nnz), but the first or the last number is another: seen by the first position alone.
    for at, number in ((0, 1), (740, graph.col.numel() - 1)):
        crow = graph.crow.clone()
        crow[at] = number
        bad = BipartiteGraph(crow, graph.col, graph.inv_sqrt_degree, 40, 700)
        assert run(x, bad, 1).errors[1].tolist() == [1, number, graph.col.numel()]
        assert run(x, bad, 1, rows=torch.tensor([9])).errors[1].tolist() == [1, number, graph.col.numel()]
    assert run(x[:2], graph, 2, rows=torch.tensor([2, 740]), backward=True).errors[0].tolist() == [1, 740, 740]


def test_empty_graph() -> None:
    graph = BipartiteGraph.from_interactions([], [], 3, 2)
    x = torch.randn(5, 4)
    assert torch.equal(run(x, graph, 1).out, x / 2)

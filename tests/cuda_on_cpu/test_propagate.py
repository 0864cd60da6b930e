"""The CUDA kernels of lightgcn_propagate, run on the host under AddressSanitizer, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
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


PIECE = 128  # kPieceEdges: a row of twice as many edges is a hub
GROUP = 64  # kGroup: pieces that are added up at a time
DEGREES = (0, 1, 31, 32, 33, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1, 3 * PIECE - 1, 3 * PIECE, 0, 0, 7)
LARGE = ((GROUP + 1) * PIECE - 1, (GROUP + 1) * PIECE)  # the second needs two levels of sums


def graph_with_hub() -> BipartiteGraph:
    """20 users and 360 items: user 0 likes 330 of them, user 19 and the last items like none."""
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randint(1, 19, (2, 200), generator=generator)
    hub = torch.arange(330)
    return BipartiteGraph.from_interactions(
        torch.cat((users, torch.zeros_like(hub), users[:5])), torch.cat((items * 7, hub, items[:5])), 20, 360
    )


def graph_of(degrees: Sequence[int], nodes: int) -> BipartiteGraph:
    """Rows of these degrees, then empty ones. The neighbours are any: neither symmetric nor distinct."""
    degree = torch.zeros(nodes, dtype=torch.int64)
    degree[: len(degrees)] = torch.tensor(degrees)
    crow = torch.cat((torch.zeros(1, dtype=torch.int64), degree.cumsum(0)))
    generator = torch.Generator().manual_seed(1)
    col = torch.randint(0, nodes, (int(crow[-1]),), generator=generator, dtype=torch.int32)
    return BipartiteGraph(crow, col, degree.clamp_min(1).float().rsqrt(), nodes, 0)


def small_graph() -> BipartiteGraph:
    return graph_of((5, 0, 33, 2 * PIECE + 1, 40), 24)


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
    l2_bytes: int = 50 << 20,
    warps: int = 8,
    together: bool = False,
    grid: int = 3,
    x_offset: int = 0,
) -> Emulated:
    nodes = graph.crow.numel() - 1
    count = nodes if rows is None else rows.numel()
    stored = x if x.is_contiguous() else x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    if x_offset:
        stored = torch.cat((torch.empty(x_offset // x.element_size(), dtype=x.dtype), stored.flatten()))
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
        l2_bytes=l2_bytes,
        warps=warps,
        together=int(together),
        grid=grid,
        x_offset=x_offset,
    )
    return Emulated(result["out"], result["errors"])


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("D", [1, 3, 4, 32, 63, 64, 65, 128, 256, 1000])
def test_every_width_and_dtype(D: int, dtype: torch.dtype) -> None:
    graph = small_graph()
    x = torch.randn(24, D).to(dtype)
    expected = reference.lightgcn_propagate(x.double(), graph, 2)
    if dtype == torch.float32:
        assert error(run(x, graph, 2).out, expected) <= 1e-6
        return
    # x and the result in this dtype, or what lies between them.
    torchs_own = error(reference.lightgcn_propagate(x, graph, 2), expected)
    assert error(run(x, graph, 2).out, expected) <= 2 * torchs_own
    allowed = error(reference.lightgcn_propagate(x.float(), graph, 2, storage_dtype=dtype), expected)
    assert error(run(x.float(), graph, 2, storage=dtype).out, expected) <= 2 * allowed


@pytest.mark.parametrize("num_layers", [0, 1, 3, 4])
def test_layers_in_one_launch_and_in_many(num_layers: int) -> None:
    graph = graph_with_hub()
    x = torch.randn(graph.num_nodes, 20)
    result = run(x, graph, num_layers)
    assert error(result.out, reference.lightgcn_propagate(x.double(), graph, num_layers)) <= 1e-6
    assert not result.errors[:, 0].any()
    assert torch.equal(run(x, graph, num_layers, together=True, grid=2).out, result.out)


@pytest.mark.parametrize(("D", "storage"), [(8, torch.float32), (64, torch.bfloat16), (3, torch.float32)])
def test_rows_around_every_threshold(D: int, storage: torch.dtype) -> None:
    graph = graph_of(DEGREES + LARGE if D == 8 else DEGREES, 160)
    x = torch.randn(160, D)
    expected = reference.lightgcn_propagate(x.double(), graph, 1)
    rounded = reference.lightgcn_propagate(x, graph, 1, storage_dtype=storage)
    allowed = 1e-6 if storage == torch.float32 else 2 * error(rounded, expected)
    full = run(x, graph, 1, storage=storage)
    assert error(full.out, expected) <= allowed
    # Each row by itself: an error in a short row must not hide behind the long ones.
    by_row = (full.out.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(by_row.max()) <= (1e-6 if storage == torch.float32 else 1e-2)
    rows = torch.tensor([14, 3, 13, 14, 159, 7, 5, 6])
    assert torch.equal(run(x, graph, 1, storage=storage, rows=rows).out, full.out[rows])


def test_neither_grid_nor_windows_nor_the_order_of_threads_change_a_bit() -> None:
    graph = graph_of(DEGREES + LARGE[1:], 120)
    x = torch.randn(120, 40)
    rows = torch.tensor([13, 6, 0, 13, 119, 8])
    full, some = run(x, graph, 1).out, run(x, graph, 1, rows=rows).out
    assert torch.equal(some, full[rows])
    assert torch.equal(run(x, graph, 1, order=1, warps=10**6, grid=2).out, full)
    assert torch.equal(run(x, graph, 1, rows=rows, order=1, warps=1, together=True, grid=1).out, some)


@pytest.mark.parametrize(("D", "l2_bytes"), [(256, 2 * 24 * 8 * 16), (1000, 2 * 24 * 16 * 16), (64, 1)])
def test_tables_beyond_the_cache_are_gathered_in_tiles(D: int, l2_bytes: int) -> None:
    graph = small_graph()
    x = torch.randn(graph.num_nodes, D)
    out = run(x, graph, 1, l2_bytes=l2_bytes).out
    assert error(out, reference.lightgcn_propagate(x.double(), graph, 1)) <= 1e-6
    rows = torch.tensor([3, 23, 1])
    assert torch.equal(run(x, graph, 1, l2_bytes=l2_bytes, rows=rows).out, out[rows])
    back = run(x[:3], graph, 2, l2_bytes=l2_bytes, rows=rows, backward=True, storage=torch.bfloat16).out
    spread = torch.zeros_like(x).index_add(0, rows, x[:3])
    assert error(back, reference.lightgcn_propagate(spread.double(), graph, 2)) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_of_any_strides_and_alignment(dtype: torch.dtype) -> None:
    graph = graph_with_hub()
    rows = torch.tensor([0, 379, 5, 5, 21, 19])
    for x, offset in (
        (torch.randn(64, graph.num_nodes).T, 0),
        (torch.randn(graph.num_nodes, 65)[:, :64], 0),
        (torch.randn(graph.num_nodes, 64), 4),
        (torch.randn(graph.num_nodes, 136)[:, ::2][:, :64], 0),
    ):
        x = x.to(dtype)
        result = run(x, graph, 1, rows=rows, x_offset=offset, storage=dtype)
        expected = reference.lightgcn_propagate(x.double(), graph, 1, rows=rows)
        assert error(result.out, expected) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("together", [False, True])
def test_rows_and_dropout(together: bool) -> None:
    graph = graph_with_hub()
    x = torch.randn(graph.num_nodes, 20)
    rows = torch.tensor([0, 379, 5, 5, 21, 19, 0])
    result = run(x, graph, 3, rows=rows, dropout_p=0.3, seed=-5, together=together, grid=2)
    expected = reference.lightgcn_propagate(x.double(), graph, 3, rows=rows, dropout_p=0.3, seed=-5)
    assert error(result.out, expected) <= 1e-6


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_backward_of_rows(num_layers: int) -> None:
    graph = graph_with_hub()
    rows = torch.tensor([3, 350, 0, 3, 3, 45, 0])
    x = torch.randn(graph.num_nodes, 20, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 40)[:, ::2]
    out = reference.lightgcn_propagate(x, graph, num_layers, rows=rows, dropout_p=0.2, seed=9)
    (expected,) = torch.autograd.grad(out, x, grad.double())
    for together in {False, num_layers == 3}:
        result = run(grad, graph, num_layers, rows=rows, backward=True, dropout_p=0.2, seed=9, together=together)
        assert error(result.out, expected) <= 1e-6


def test_bad_values_are_reported_and_read_nothing() -> None:
    graph = small_graph()
    nodes, nnz = graph.num_nodes, graph.col.numel()
    x = torch.randn(nodes, 8)

    def damaged(at: int, number: int) -> BipartiteGraph:
        crow = graph.crow.clone()
        crow[at] = number
        return BipartiteGraph(crow, graph.col, graph.inv_sqrt_degree, 24, 0)

    col = graph.col.clone()
    col[7] = 5000
    bad = BipartiteGraph(graph.crow, col, graph.inv_sqrt_degree, 24, 0)
    assert run(x, bad, 1).errors[2].tolist() == [1, 5000, nodes]
    assert run(x, graph, 1, rows=torch.tensor([2, -3])).errors[0].tolist() == [1, -3, nodes]
    assert run(x, graph, 0, rows=torch.tensor([nodes])).errors[0].tolist() == [1, nodes, nodes]
    rows = torch.tensor([9, 3, 2])
    for at, number in ((1, 10**6), (3, -1), (4, 2**63 - 1), (12, -(2**63))):
        assert run(x, damaged(at, number), 2).errors[1, 0] == 1
        assert run(x, damaged(at, number), 1, rows=rows).errors[1, 0] == 1
    assert run(x[:3], damaged(4, -1), 2, rows=rows, backward=True).errors[1, 0] == 1
    # Every row lies inside [0, nnz), but the first or the last number is another: seen by the first row alone.
    for at, number in ((0, 1), (nodes, nnz - 1)):
        assert run(x, damaged(at, number), 1).errors[1].tolist() == [1, number, nnz]
        assert run(x, damaged(at, number), 1, rows=rows).errors[1].tolist() == [1, number, nnz]
    assert run(x[:2], graph, 2, rows=torch.tensor([2, nodes]), backward=True).errors[0].tolist() == [1, nodes, nodes]


def test_random_offsets_are_reported_and_read_nothing() -> None:
    """What a damaged file may hold: rows that overlap, hubs in wrong places, windows without order."""
    generator = torch.Generator().manual_seed(3)
    for seed in range(4):
        crow = torch.randint(-10, 2000, (41,), generator=generator)
        col = torch.randint(-3, 44, (1990,), generator=generator, dtype=torch.int32)
        graph = BipartiteGraph(crow, col, torch.ones(40), 40, 0)
        rows = torch.randint(0, 40, (9,), generator=generator)
        result = run(torch.randn(40, 4), graph, 2, rows=None if seed % 2 else rows, warps=2)
        assert result.errors[1, 0] == 1 and result.errors[2, 0] == 1


def test_empty_graph() -> None:
    graph = BipartiteGraph.from_interactions([], [], 3, 2)
    x = torch.randn(5, 4)
    assert torch.equal(run(x, graph, 1).out, x / 2)
    assert torch.equal(run(x, graph, 3, rows=torch.tensor([4, 0]), together=True).out, x[[4, 0]] / 4)
    assert not run(x[:0], graph, 2, rows=torch.zeros(0, dtype=torch.int64), backward=True).out.any()
    none = BipartiteGraph.from_interactions([], [], 0, 0)
    result = run(torch.empty(0, 4), none, 2, rows=torch.tensor([3]))
    assert result.errors[0].tolist() == [1, 3, 0] and not result.out.any()

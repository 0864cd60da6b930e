"""lightgcn_propagate against the reference in float64: values, gradients, errors, bits, torch.compile and autocast.

The same tests run again in children with the Triton kernels in the interpreter and with the reference backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from backends import in_child, run_with_backend
from conftest import ROOT, requires
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.graph import BipartiteGraph
from collm_fast.ops import _device_errors, check_device_errors, lightgcn_propagate
from collm_fast.ops._device_errors import error_record

TRITON = os.environ.get("COLLM_FAST_BACKEND") == "triton"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OP = torch.ops.collm_fast.lightgcn_propagate


def pairs(seed: int, num_users: int, num_items: int, edges: int) -> BipartiteGraph:
    """Random pairs with skewed items and repeats."""
    rng = np.random.default_rng(seed)
    items = np.minimum(rng.zipf(1.4, edges) - 1, num_items - 1)
    return BipartiteGraph.from_interactions(rng.integers(0, num_users, edges), items, num_users, num_items)


def hub(users: int = 9000) -> BipartiteGraph:
    """One item that every user likes: more edges than are summed in one piece, twice over."""
    return BipartiteGraph.from_interactions(np.arange(users), np.zeros(users, dtype=np.int64), users, 3)


def small() -> BipartiteGraph:
    """Seven nodes; user 3 has no edge; the pair (0, 1) occurs twice."""
    return BipartiteGraph.from_interactions([0, 1, 2, 0, 0], [0, 1, 1, 2, 2], 4, 3)


def error(out: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    return float((out.double() - expected).norm() / (norm if norm > 0 else 1.0))


def allowed(x: Tensor, graph: BipartiteGraph, expected: Tensor, num_layers: int, **options: Any) -> float:
    if x.dtype == torch.float64:
        return 1e-13
    if x.dtype == torch.float32 and options.get("storage_dtype") in (None, torch.float32):
        return 1e-6
    return 2 * error(reference.lightgcn_propagate(x, graph, num_layers, **options), expected)


def check(x: Tensor, graph: BipartiteGraph, num_layers: int, **options: Any) -> Tensor:
    """The op's result, compared with the exact one."""
    exact = {name: value for name, value in options.items() if name != "storage_dtype"}
    expected = reference.lightgcn_propagate(x.double(), graph, num_layers, **exact)
    out = lightgcn_propagate(x, graph, num_layers, **options)
    assert out.shape == expected.shape and out.dtype == x.dtype and out.is_contiguous()
    assert error(out, expected) <= allowed(x, graph, expected, num_layers, **options)
    return out


def leave_nan_behind(*like: tuple[int, ...]) -> None:
    """Frees blocks full of NaN, so that an output element that is never written shows."""
    blocks = [torch.full(shape, float("nan")) for shape in like for _ in range(4)]
    del blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3, 4])
def test_forward(dtype: torch.dtype, num_layers: int) -> None:
    if TRITON and dtype == torch.bfloat16:
        return  # Triton's interpreter is wrong for bfloat16
    graph = small() if TRITON else pairs(num_layers, 60, 37, 700)
    for D in (3, 20) if TRITON else (1, 7, 16, 17, 31, 64, 100, 129, 300):
        leave_nan_behind((graph.num_nodes, D))
        check(torch.randn(graph.num_nodes, D).to(dtype), graph, num_layers)


def test_forward_of_every_width() -> None:
    graph = small()
    for D in (140,) if TRITON else (*range(1, 301), 511, 512, 700, 1001, 1024):
        check(torch.randn(7, D), graph, 2)
    # bfloat16 tables hold their columns in pairs, where there are vectors enough.
    for D in () if TRITON else (*range(1, 140), 255, 256, 300, 1001):
        x = torch.randn(7, D)
        exact = reference.lightgcn_propagate(x.double(), graph, 3)
        assert error(lightgcn_propagate(x, graph, 3, storage_dtype=torch.bfloat16), exact) < 5e-3


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_with_storage_dtype(storage: torch.dtype) -> None:
    if TRITON and storage == torch.bfloat16:
        return
    graph = small() if TRITON else pairs(1, 300, 200, 6000)
    x = torch.randn(graph.num_nodes, 6 if TRITON else 67)
    out = check(x, graph, 3, storage_dtype=storage)
    # The promise of the documentation for bfloat16.
    assert error(out, reference.lightgcn_propagate(x.double(), graph, 3)) < 1e-3
    if not TRITON:
        check(x.half(), graph, 3, storage_dtype=storage)


def test_forward_of_isolated_nodes_and_empty_graphs() -> None:
    x = torch.randn(5, 4)
    empty = BipartiteGraph.from_interactions([], [], 3, 2)
    for num_layers in (0, 1, 3):
        assert error(lightgcn_propagate(x, empty, num_layers), x.double() / (num_layers + 1)) <= 1e-7
    nothing = BipartiteGraph.from_interactions([], [], 0, 0)
    assert lightgcn_propagate(torch.empty(0, 4), nothing, 2).shape == (0, 4)
    one = BipartiteGraph.from_interactions([0], [0], 1, 1)
    check(torch.randn(2, 3), one, 2)
    assert lightgcn_propagate(torch.empty(7, 0), small(), 2).shape == (7, 0)
    assert lightgcn_propagate(torch.randn(7, 2), small(), 2, rows=torch.empty(0, dtype=torch.int64)).shape == (0, 2)


def test_forward_of_a_hub() -> None:
    if TRITON:
        return
    graph = hub()
    assert int(graph.crow.diff().max()) == 9000
    for D in (5, 64):
        check(torch.randn(graph.num_nodes, D), graph, 3)
        check(torch.randn(graph.num_nodes, D), graph, 2, dropout_p=0.4, seed=3)


@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "expanded", "offset"])
def test_forward_of_strided_x(view: str) -> None:
    graph = small()
    x = {
        "transposed": torch.randn(5, 7).T,
        "columns": torch.randn(7, 10)[:, ::2],
        "rows": torch.randn(21, 5)[::3],
        "expanded": torch.randn(1, 5).expand(7, 5),
        "offset": torch.randn(9, 6)[1:8, 1:],
    }[view]
    for num_layers in (0, 2):
        assert torch.equal(
            lightgcn_propagate(x, graph, num_layers), lightgcn_propagate(x.contiguous(), graph, num_layers)
        )


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_forward_of_rows_has_the_same_bits(num_layers: int) -> None:
    graph = small() if TRITON else pairs(2, 60, 37, 700)
    x = torch.randn(graph.num_nodes, 9)
    rows = torch.tensor([5, 0, 5, 3, 6])
    for options in ({}, {"dropout_p": 0.25, "seed": 11}):
        full = lightgcn_propagate(x, graph, num_layers, **options)
        assert torch.equal(lightgcn_propagate(x, graph, num_layers, rows=rows, **options), full[rows])
    strided = torch.stack((rows, rows), dim=1)[:, 0]
    full = lightgcn_propagate(x, graph, num_layers)
    assert torch.equal(lightgcn_propagate(x, graph, num_layers, rows=strided), full[rows])


def test_forward_of_rows_of_a_hub() -> None:
    if TRITON:
        return
    graph = hub()
    x = torch.randn(graph.num_nodes, 8)
    rows = torch.tensor([9000, 4, 9000, 9002])
    assert torch.equal(lightgcn_propagate(x, graph, 2, rows=rows), lightgcn_propagate(x, graph, 2)[rows])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_forward_with_dropout(p: float) -> None:
    graph = small() if TRITON else pairs(3, 60, 37, 700)
    x = torch.randn(graph.num_nodes, 5)
    for seed in (0, -1, 2**62 + 12345):
        out = check(x, graph, 2, dropout_p=p, seed=seed)
        assert torch.equal(out, lightgcn_propagate(x, graph, 2, dropout_p=p, seed=torch.tensor([seed])))


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 7}])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_gradients(num_layers: int, with_rows: bool, options: dict[str, Any]) -> None:
    graph = small()
    rows = torch.tensor([5, 0, 5, 6]) if with_rows else None
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)

    def call(t: Tensor) -> Tensor:
        return lightgcn_propagate(t, graph, num_layers, rows=rows, **options)

    if not TRITON:
        assert torch.autograd.gradcheck(call, (x,))
        assert torch.autograd.gradgradcheck(call, (x,))
    out = call(x)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(reference.lightgcn_propagate(x, graph, num_layers, rows=rows, **options), x, grad)
    assert error(torch.autograd.grad(out, x, grad)[0], expected) <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_rows", [False, True])
def test_gradients_of_every_dtype(dtype: torch.dtype, with_rows: bool) -> None:
    if TRITON and dtype == torch.bfloat16:
        return
    graph = small() if TRITON else pairs(4, 60, 37, 700)
    rows = torch.tensor([5, 0, 5, 6, 1]) if with_rows else None
    x = torch.randn(graph.num_nodes, 19).to(dtype).requires_grad_()
    out = lightgcn_propagate(x, graph, 3, rows=rows)
    grad = torch.randn(out.shape).to(dtype)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.lightgcn_propagate(exact, graph, 3, rows=rows), exact, grad.double())
    (got,) = torch.autograd.grad(out, x, grad)
    assert got.dtype == dtype
    again = x.detach().requires_grad_()
    (torchs,) = torch.autograd.grad(reference.lightgcn_propagate(again, graph, 3, rows=rows), again, grad)
    limit = {torch.float32: 1e-6, torch.float64: 1e-13}.get(dtype, 2 * error(torchs, expected))
    assert error(got, expected) <= limit


def test_gradients_of_rows_have_the_bits_of_the_full_backward() -> None:
    graph = small() if TRITON else hub()
    x = torch.randn(graph.num_nodes, 6, requires_grad=True)
    rows = torch.arange(graph.num_nodes - 3, graph.num_nodes)
    grad = torch.randn(3, 6)
    (trimmed,) = torch.autograd.grad(lightgcn_propagate(x, graph, 2, rows=rows), x, grad)
    (full,) = torch.autograd.grad(lightgcn_propagate(x, graph, 2)[rows], x, grad)
    assert error(trimmed, full.double()) <= 1e-7


def test_gradients_of_storage_dtype_and_of_expanded_gradients() -> None:
    graph = small()
    rows = torch.tensor([2, 6, 2])
    for options in ({}, {"rows": rows}):
        x = torch.randn(7, 8, requires_grad=True)
        lightgcn_propagate(x, graph, 3, storage_dtype=torch.float16, **options).sum().backward()
        exact = x.detach().double().requires_grad_()
        reference.lightgcn_propagate(exact, graph, 3, **options).sum().backward()
        assert x.grad is not None and exact.grad is not None
        assert error(x.grad, exact.grad) < 1e-3
    empty = torch.empty(0, dtype=torch.int64)
    x = torch.randn(7, 8, requires_grad=True)
    lightgcn_propagate(x, graph, 2, rows=empty).sum().backward()
    assert x.grad is not None and not x.grad.any()


def arguments(**changes: Any) -> list[Any]:
    graph = small()
    values: dict[str, Any] = {
        "x": torch.randn(7, 4),
        "crow": graph.crow,
        "col": graph.col,
        "inv": graph.inv_sqrt_degree,
        "num_layers": 2,
        "storage_dtype": None,
        "rows": None,
        "dropout_p": 0.0,
        "seed": None,
    }
    assert set(changes) <= set(values)
    return list({**values, **changes}.values())


GRAPH = small()
LAST_BAD = torch.cat((GRAPH.col[:-1], torch.tensor([9], dtype=torch.int32)))
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.randn(7)}, r"x of shape \[N, D\], got \[7\]"),
    ({"x": torch.ones(7, 4, dtype=torch.int64)}, "x in float32, bfloat16, float16, float64, got int64"),
    ({"x": torch.randn(6, 4)}, r"crow of shape \[7\], got \[8\]"),
    ({"crow": GRAPH.crow.int()}, "crow in int64, got int32"),
    ({"col": GRAPH.col.long()}, "col in int32, got int64"),
    ({"col": GRAPH.col[None]}, r"col of shape \[nnz\], got \[1, 8\]"),
    ({"inv": GRAPH.inv_sqrt_degree[:6]}, r"inv_sqrt_degree of shape \[7\], got \[6\]"),
    ({"inv": GRAPH.inv_sqrt_degree.double()}, "inv_sqrt_degree in float32, got float64"),
    ({"col": torch.stack((GRAPH.col, GRAPH.col), 1)[:, 0]}, "contiguous crow, col and inv_sqrt_degree, got strided"),
    ({"num_layers": -1}, "num_layers >= 0, got -1"),
    ({"storage_dtype": torch.int32}, "storage_dtype None or one of float32, bfloat16, float16, got int32"),
    ({"x": torch.ones(7, 4).double(), "storage_dtype": torch.bfloat16}, "float64 where x is float64, got bfloat16"),
    ({"rows": torch.zeros(1, 1, dtype=torch.int64)}, r"rows of shape \[B\], got \[1, 1\]"),
    ({"rows": torch.zeros(1, dtype=torch.int32)}, "rows in int64, got int32"),
    ({"rows": torch.tensor([1, 7])}, r"rows in \[0, 7\), got 7 at position 1"),
    ({"rows": torch.tensor([-1])}, r"rows in \[0, 7\), got -1 at position 0"),
    ({"dropout_p": 1.0}, r"dropout_p in \[0, 1\), got 1\.0$"),
    ({"dropout_p": -1e-5}, r"dropout_p in \[0, 1\), got -1e-05$"),
    ({"dropout_p": -0.0001}, r"dropout_p in \[0, 1\), got -0\.0001$"),
    ({"dropout_p": float("inf")}, r"dropout_p in \[0, 1\), got inf$"),
    ({"x": torch.ones(7, 4, dtype=torch.complex64)}, "x in float32, bfloat16, float16, float64, got complex64"),
    ({"dropout_p": float("nan")}, r"dropout_p in \[0, 1\), got nan"),
    ({"dropout_p": 0.5}, "a seed where dropout_p > 0, got None"),
    ({"dropout_p": 0.5, "seed": torch.tensor([1], dtype=torch.int32)}, "seed in int64, got int32"),
    ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, r"seed of one element, got \[2\]"),
    ({"crow": torch.tensor([0, 3, 2, 4, 4, 5, 7, 8])}, r"crow to rise from 0 to nnz \(8\), got 2$"),
    ({"crow": torch.tensor([0, 2, 3, 4, 4, 5, 7, 9])}, r"crow to rise from 0 to nnz \(8\), got 9$"),
    ({"crow": torch.tensor([1, 2, 3, 4, 4, 5, 7, 8])}, r"crow to rise from 0 to nnz \(8\), got 1$"),
    ({"col": GRAPH.col + 10}, r"col in \[0, 7\), got 14 at edge 0"),
    ({"col": GRAPH.col - 100}, r"col in \[0, 7\), got -96 at edge 0"),
    ({"col": GRAPH.col + 10, "rows": torch.tensor([0]), "num_layers": 1}, r"col in \[0, 7\), got 14 at edge 0"),
    # What no layer reads is checked too.
    ({"col": LAST_BAD, "rows": torch.tensor([0]), "num_layers": 1}, r"col in \[0, 7\), got 9 at edge 7"),
    ({"col": LAST_BAD, "num_layers": 0}, r"col in \[0, 7\), got 9 at edge 7"),
    ({"col": LAST_BAD, "rows": torch.tensor([0]), "num_layers": 0}, r"col in \[0, 7\), got 9 at edge 7"),
    # Whether dropout keeps the edge decides nothing, nor do the edges that it drops change the number.
    *(
        ({"col": LAST_BAD, "dropout_p": 0.7, "seed": torch.tensor([seed])}, r"col in \[0, 7\), got 9 at edge 7")
        for seed in range(8)
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), ERRORS)
def test_error_of_forward(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^lightgcn_propagate: expected .*{sentence}"):
        OP(*arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": torch.randn(2)}, r"grad of shape \[B, D\], got \[2\]"),
        ({"x": torch.randn(3, 4)}, r"rows of shape \[3\], got \[2\]"),
        ({"crow": torch.zeros(2, 2)}, r"crow of shape \[N \+ 1\], got \[2, 2\]"),
        ({"x": torch.ones(2, 4, dtype=torch.bool)}, "grad in float32, bfloat16, float16, float64, got bool"),
        ({"rows": torch.tensor([1, 9])}, r"rows in \[0, 7\), got 9 at position 1"),
        ({"rows": torch.zeros(2)}, "rows in int64, got float32"),
        ({"col": LAST_BAD}, r"col in \[0, 7\), got 9 at edge 7"),
        ({"col": LAST_BAD, "num_layers": 0}, r"col in \[0, 7\), got 9 at edge 7"),
        ({"col": LAST_BAD, "dropout_p": 0.7, "seed": torch.tensor([0])}, r"col in \[0, 7\), got 9 at edge 7"),
        ({"crow": torch.tensor([0, 3, 2, 4, 4, 5, 7, 8])}, r"crow to rise from 0 to nnz \(8\), got 2$"),
    ],
)
def test_error_of_backward(changes: dict[str, Any], sentence: str) -> None:
    values = arguments(**{"x": torch.randn(2, 4), "rows": torch.tensor([1, 2]), **changes})
    with pytest.raises(ValueError, match=f"^lightgcn_propagate_backward: expected {sentence}"):
        torch.ops.collm_fast.lightgcn_propagate_backward(*values)


def test_error_of_an_int_seed_too_large() -> None:
    with pytest.raises(ValueError, match=r"lightgcn_propagate: expected seed in \[-2\^63, 2\^63\)"):
        lightgcn_propagate(torch.randn(7, 2), small(), 1, dropout_p=0.1, seed=2**63)


def test_error_of_a_column_inside_a_hub() -> None:
    if TRITON:
        return
    graph = hub()
    col = graph.col.clone()
    col[-1] = 9003
    with pytest.raises(ValueError, match=r"col in \[0, 9003\), got 9003 at edge 17999"):
        OP(torch.randn(9003, 3), graph.crow, col, graph.inv_sqrt_degree, 2, None, None, 0.0, None)


@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck(with_rows: bool) -> None:
    if in_child():
        return
    graph, rows = small(), torch.tensor([5, 0, 5]) if with_rows else None
    x = torch.randn(7, 3, requires_grad=True)
    tail = (graph.crow, graph.col, graph.inv_sqrt_degree, 2, torch.bfloat16, rows, 0.2, torch.tensor([4]))
    torch.library.opcheck(OP, (x, *tail))
    if rows is not None:
        grad = torch.randn(3, 3, requires_grad=True)
        torch.library.opcheck(torch.ops.collm_fast.lightgcn_propagate_backward, (grad, *tail))


def test_compile_keeps_one_graph_for_every_seed() -> None:
    if in_child():
        return
    torch._dynamo.reset()
    graph, rows, frames = small(), torch.tensor([5, 0, 5]), []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        frames.append(module)
        return module.forward

    def step(x: Tensor, seed: Tensor) -> Tensor:
        return lightgcn_propagate(x, graph, 2, rows=rows, dropout_p=0.3, seed=seed).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(12):
        x = torch.randn(7, 3, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        a, b = compiled(x, torch.tensor([seed])), step(y, torch.tensor([seed]))
        a.backward()
        b.backward()
        assert torch.equal(a, b) and x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert len(frames) == 1
    traced = torch.compile(lambda t: lightgcn_propagate(t, graph, 2), fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 3, requires_grad=True)
    traced(x).sum().backward()
    assert x.grad is not None


def test_autocast_casts_x_alone() -> None:
    graph = small()
    x = torch.randn(7, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lightgcn_propagate(x, graph, 2)
        double = lightgcn_propagate(x.double(), graph, 2)
    assert out.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert torch.equal(out, lightgcn_propagate(x.bfloat16(), graph, 2))
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [None, torch.tensor([5, 0])])
def test_gradients_do_not_see_an_autocast_around_backward(rows: Tensor | None) -> None:
    x = torch.randn(7, 3, requires_grad=True)
    grads = []
    for enabled in (False, True):
        out = lightgcn_propagate(x, small(), 2, rows=rows)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(out, x, grad, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), grad)
        grads.append((first.detach(), second))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_numpy_seeds_are_ints() -> None:
    x, graph = torch.randn(7, 3), small()
    expected = lightgcn_propagate(x, graph, 2, dropout_p=0.5, seed=3)
    for seed in (np.int64(3), np.uint32(3), torch.tensor(3)):
        assert torch.equal(lightgcn_propagate(x, graph, 2, dropout_p=0.5, seed=seed), expected)
    with pytest.raises(ValueError, match=r"^lightgcn_propagate: expected seed None, an int .*, got '3'$"):
        lightgcn_propagate(x, graph, 2, dropout_p=0.5, seed="3")  # type: ignore[arg-type]


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    graph = hub()
    x = torch.randn(graph.num_nodes, 24, requires_grad=True)
    rows = torch.randint(0, graph.num_nodes, (500,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = lightgcn_propagate(x, graph, 3, dropout_p=0.1, seed=1)
            part = lightgcn_propagate(x, graph, 3, rows=rows)
            grads = torch.autograd.grad((out.sum(), part.sum()), x)
            results.append((out, part, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


SIMD = """
import sys, torch
from collm_fast.graph import BipartiteGraph
from collm_fast.ops import lightgcn_propagate
from collm_fast.ops.layer import lightgcn_layer
graph = BipartiteGraph.from_interactions([0, 1, 2, 0, 2], [0, 1, 1, 2, 3], 4, 5)
torch.manual_seed(0)
dense = BipartiteGraph.from_interactions(torch.randint(0, 60, (900,)), torch.randint(0, 37, (900,)), 60, 37)
rows = torch.randint(0, 97, (30,))
out = []
for D in (1, 5, 8, 21, 64, 150, 403):
    for storage in (None, torch.bfloat16, torch.float16):
        for options in ({}, {"dropout_p": 0.3, "seed": 2**40 + 5}, {"rows": rows}):
            x = torch.randn(97, D, requires_grad=True)
            out.append(lightgcn_propagate(x, dense, 3, storage_dtype=storage, **options))
            out += torch.autograd.grad(out[-1].square().sum(), x)
            out.append(lightgcn_propagate(x.to(storage or torch.float64), dense, 2, **options))
# What a rank sends to another, whose processor may be of another kind.
for D in (8, 16, 31, 32, 64, 100, 403):
    out.append(torch.empty(97, D, dtype=torch.bfloat16))
    lightgcn_layer(out[-1], None, torch.randn(97, D), dense.crow, dense.col, dense.inv_sqrt_degree)
out = [t.detach() for t in out]
# Subnormal in float16, and sums of 0: nothing of it may depend on what the processor does with subnormal float32.
small = 2.0 ** torch.arange(-24.0, -8).repeat(9, 10)
small[0, :4] = torch.tensor([65504.0, float("inf"), float("-inf"), float("nan")])
halves = [[], []]
for flush in (False, True):
    torch.set_flush_denormal(flush)
    halves[flush] = [lightgcn_propagate(x, graph, 3, storage_dtype=torch.float16) for x in (small, -small)]
torch.set_flush_denormal(False)
for a, b in zip(*halves):
    assert a.isnan().sum() < 40 and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (a - b).abs().max()
torch.save(out, sys.argv[1])
"""


@requires("native")
def test_every_instruction_set_gives_the_same_result(tmp_path: Any) -> None:
    if in_child():
        return
    results = []
    for simd in ("", "avx2", "baseline"):
        path = tmp_path / f"simd_{simd}.pt"
        environment = {**os.environ, "COLLM_FAST_SIMD": simd}
        subprocess.run([sys.executable, "-c", SIMD, str(path)], env=environment, cwd=ROOT, check=True)
        results.append(torch.load(path))
    # One order for every sum and no fused multiply-add: not even a bit may differ.
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_device_errors_are_raised_once_with_the_sentence() -> None:
    rule = "test_propagate: expected value in [0, "
    record = error_record(rule, torch.device("cpu"))
    check_device_errors(synchronize=True)
    other = error_record("test_propagate: expected another in [0, ", torch.device("cpu"))
    record.copy_(torch.tensor([1, 9, 5]))
    other.copy_(torch.tensor([1, 8, 2]))
    with pytest.raises(ValueError, match=r"^test_propagate: expected value in \[0, 5\), got 9$"):
        check_device_errors()
    # One fault may fill several records; it is raised once.
    check_device_errors()
    assert not record.any() and not other.any()
    assert error_record(rule, torch.device("cpu")).data_ptr() == record.data_ptr()


def test_device_errors_wait_before_a_record_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the same fault are still under way when the first report is seen: they must not raise again."""
    table = torch.zeros(32, 3, dtype=torch.int64)
    monkeypatch.setitem(_device_errors._records, "cuda", table)
    monkeypatch.setattr(_device_errors, "_RULES", ["op: expected a in [0, ", "op: expected b in [0, "])
    monkeypatch.setattr(_device_errors, "_devices", {1, 3})
    waited = []

    def synchronize(device: int) -> None:
        waited.append(device)
        table[0] = torch.tensor([1, 7, 4])
        table[1] = torch.tensor([1, 6, 3])

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    check_device_errors()
    assert waited == []
    table[0, 0] = 1  # the flag of a report whose number has not arrived
    with pytest.raises(ValueError, match=r"^op: expected a in \[0, 4\), got 7$"):
        check_device_errors()
    assert waited == [1, 3] and not table.any()
    check_device_errors()
    assert waited == [1, 3]


def test_device_errors_do_not_initialise_cuda() -> None:
    before = torch.cuda.is_initialized()
    check_device_errors()
    check_device_errors(synchronize=True)
    assert torch.cuda.is_initialized() == before


@requires("triton")
def test_triton_interpreter() -> None:
    if not in_child():
        assert (
            run_with_backend("triton", __file__, "forward or gradients or error or backend or records or numpy") >= 90
        )


def test_reference_backend() -> None:
    if not in_child():
        # torch's own sum over a hub is not within 1e-6.
        keyword = "(forward or gradients or error or autocast) and not every_width and not hub"
        assert run_with_backend("reference", __file__, keyword) >= 80


def test_the_backend_is_the_one_asked_for() -> None:
    asked, served = _native.BACKEND, _native.backends["lightgcn_propagate"]["cpu"]
    assert served == asked if asked != "auto" else served in ("native", "reference")


@requires("triton")
def test_triton_records_values_out_of_range() -> None:
    if not TRITON:
        return
    from collm_fast.kernels import propagate as kernels

    graph, records = small(), torch.zeros(3, 3, dtype=torch.int64)
    x = torch.randn(7, 2)

    def call(crow: Tensor, col: Tensor, rows: Tensor | None) -> list[int]:
        records.zero_()
        out = kernels.propagate(x, crow, col, graph.inv_sqrt_degree, 1, None, rows, 0.0, None, records)
        assert out.isfinite().all()
        return records.flatten().tolist()

    assert call(graph.crow, graph.col, torch.tensor([2, 7]))[:3] == [1, 7, 7]
    assert call(torch.tensor([0, 2, 3, 4, 4, 5, 7, 99]), graph.col, None)[3:6] == [1, 99, 8]
    assert call(torch.tensor([0, 2, 3, 4, 4, 5, 7, 7]), graph.col, None)[3:6] == [1, 7, 8]
    assert call(torch.tensor([1, 2, 3, 4, 4, 5, 7, 8]), graph.col, None)[3:6] == [1, 1, 8]
    assert call(torch.tensor([1, 2, 3, 4, 4, 5, 7, 8]), graph.col, torch.tensor([4]))[3:6] == [1, 1, 8]
    assert call(torch.tensor([0, 2, -3, 4, 4, 5, 7, 8]), graph.col, torch.tensor([2]))[3:6] == [1, -3, 8]
    # Several programs find a bad column; any of them is a true report.
    raised, value, limit = call(graph.crow, graph.col + 3, None)[6:]
    assert raised == 1 and value in (7, 8, 9) and limit == 7
    raised, value, limit = call(graph.crow, graph.col - 5, None)[6:]
    assert raised == 1 and -5 <= value < 0 and limit == 7
    records.zero_()
    kernels.propagate_backward(
        x[:2], graph.crow, graph.col, graph.inv_sqrt_degree, 1, None, torch.tensor([1, -2]), 0.0, None, records
    )
    assert records[0].tolist() == [1, -2, 7]


@requires("triton")
@pytest.mark.parametrize("D", [3, 20])
def test_triton_forward_and_gradients_with_rows_in_pieces(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Degrees around one, two and many pieces of 4 edges; each row by itself, and damaged offsets."""
    if not TRITON:
        return
    from collm_fast.kernels import propagate as kernels

    monkeypatch.setattr(kernels, "PIECE", 4)
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    degree = torch.tensor([0, 1, 7, 8, 11, 12, 0, 33])
    crow = torch.cat((torch.zeros(1, dtype=torch.int64), degree.cumsum(0)))
    col = torch.randint(0, 8, (int(crow[-1]),), dtype=torch.int32)
    graph = BipartiteGraph(crow, col, degree.clamp_min(1).float().rsqrt(), 8, 0)
    seed, rows, records = torch.tensor([5]), torch.tensor([7, 3, 0, 7, 2]), torch.zeros(3, 3, dtype=torch.int64)
    tensors = (graph.crow, graph.col, graph.inv_sqrt_degree)
    x, grad = torch.randn(8, D), torch.randn(5, D)
    spread = torch.zeros(8, D, dtype=torch.float64).index_add(0, rows, grad.double())
    for layers, p in ((1, 0.0), (2, 0.3)):
        expected = reference.lightgcn_propagate(x.double(), graph, layers, dropout_p=p, seed=seed)
        full = kernels.propagate(x, *tensors, layers, None, None, p, seed, records)
        assert float(((full - expected).norm(dim=1) / expected.norm(dim=1)).max()) <= 1e-6
        assert torch.equal(kernels.propagate(x, *tensors, layers, None, rows, p, seed, records), full[rows])
        back = kernels.propagate_backward(grad, *tensors, layers, None, rows, p, seed, records)
        assert error(back, reference.lightgcn_propagate(spread, graph, layers, dropout_p=p, seed=seed)) <= 1e-6
    assert not records.any()
    crow[3], crow[6] = 150, -3
    kernels.propagate(x, *tensors, 2, None, None, 0.0, None, records)
    assert records[1, 0] == 1


@requires("triton")
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flags", ["layer", "rows+dropout", "slot", "scale"])
def test_triton_compiles_for_hopper(stored: str, flags: str) -> None:
    if in_child():
        return
    import triton.language as tl
    from collm_fast.kernels import propagate as kernels
    from triton_aot import compile_for_hopper

    shared: dict[str, Any] = {"SLOT": flags == "slot", "DROPOUT": flags == "rows+dropout", "PIECE": kernels.PIECE}
    shared |= {"BLOCK_E": 16, "BLOCK_D": 64, "SUM": tl.float32}
    by_rows = flags == "rows+dropout"
    layer = {"GATHER": flags != "scale", "SPLIT": flags != "scale", "RESULT": by_rows, "ROWS": by_rows}
    layer["X_SLOT"] = flags == "slot"
    for kernel, constants in (
        (kernels.layer_kernel, layer | shared),
        (kernels.pieces_kernel, {"REQUESTED": by_rows} | shared),
    ):
        kinds = {name: "i64" for name in kernel.arg_names if name not in constants}
        types = dict.fromkeys(("crow", "rows", "seed", "records", "bad_col"), "*i64")
        types |= dict.fromkeys(("col", "slot", "x_slot"), "*i32") | {"requested": "*u8"}
        types |= dict.fromkeys(("inv_sqrt_degree", "partial", "x"), "*fp32")
        types |= dict.fromkeys(("out", "table"), f"*{stored}") | dict.fromkeys(("mean", "keep_scale"), "fp32")
        kinds |= {name: kind for name, kind in types.items() if name in kinds}
        # An A100 and what came between: the other GPUs that this twin is for.
        for capability in (90,) if stored == "fp16" else (80, 90):
            code = compile_for_hopper(kernel, kinds, constants, capability=capability)
            assert code.spills == 0 and code.registers <= 128


@requires("triton")
def test_triton_compiles_the_sparse_gradient_for_hopper() -> None:
    if in_child():
        return
    import triton.language as tl
    from collm_fast.kernels import propagate as kernels
    from triton_aot import compile_for_hopper

    kinds = dict.fromkeys(("sums", "scaled", "inv_sqrt_degree"), "*fp32") | {"grad": "*bf16", "slot": "*i32"}
    kinds |= dict.fromkeys(("sorted_rows", "order", "ends", "records"), "*i64")
    kinds |= dict.fromkeys(("N", "D", "grad_row", "grad_column"), "i64")
    code = compile_for_hopper(kernels.sparse_gradient_kernel, kinds, {"BLOCK_D": 64, "SUM": tl.float32})
    assert code.spills == 0


@requires("cuda")
def test_cuda_matches_the_reference() -> None:
    graph = pairs(5, 500, 300, 9000)
    on_gpu = graph.to("cuda")
    rows = torch.randint(0, graph.num_nodes, (64,))
    for dtype in DTYPES[:3]:
        for options in ({}, {"rows": rows}, {"dropout_p": 0.2, "seed": 3}, {"storage_dtype": torch.bfloat16}):
            moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
            exact = {k: v for k, v in options.items() if k != "storage_dtype"}
            x = torch.randn(graph.num_nodes, 65).to(dtype)
            expected = reference.lightgcn_propagate(x.double(), graph, 3, **exact)
            out = lightgcn_propagate(x.cuda(), on_gpu, 3, **moved)
            assert error(out.cpu(), expected) <= allowed(x, graph, expected, 3, **options)
            assert torch.equal(out, lightgcn_propagate(x.cuda(), on_gpu, 3, **moved))
            a, b = x.double().requires_grad_(), x.cuda().requires_grad_()
            reference.lightgcn_propagate(a, graph, 3, **exact).sum().backward()
            lightgcn_propagate(b, on_gpu, 3, **moved).sum().backward()
            assert a.grad is not None and b.grad is not None
            is_exact = dtype == torch.float32 and "storage_dtype" not in options
            assert error(b.grad.cpu(), a.grad) <= (1e-6 if is_exact else 1e-2)
    lightgcn_propagate(torch.randn(graph.num_nodes, 4).cuda(), on_gpu, 1, rows=torch.tensor([10**6]).cuda())
    with pytest.raises(ValueError, match=r"lightgcn_propagate: expected rows in \[0, 800\), got 1000000"):
        check_device_errors(synchronize=True)

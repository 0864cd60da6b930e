"""BipartiteGraph: the native builder against its NumPy twin and against scipy, errors, save and load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from backends import in_child, run_with_backend
from conftest import requires
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from collm_fast import BipartiteGraph, _native
from collm_fast.graph import build_graph_numpy


@st.composite
def interactions(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    num_users, num_items = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    pairs = draw(st.lists(st.tuples(st.integers(0, num_users - 1), st.integers(0, num_items - 1)), max_size=60))
    return [u for u, _ in pairs], [i for _, i in pairs], num_users, num_items


@settings(deadline=None)
@given(interactions())
def test_graph_is_the_symmetric_adjacency(case: tuple[list[int], list[int], int, int]) -> None:
    users, items, num_users, num_items = case
    graph = BipartiteGraph.from_interactions(users, items, num_users, num_items)
    N = num_users + num_items
    dense = np.zeros((N, N), dtype=np.int64)
    dense[users, [num_users + i for i in items]] = 1
    dense[[num_users + i for i in items], users] = 1
    expected = scipy.sparse.csr_array(dense)
    expected.sort_indices()
    assert graph.crow.dtype == torch.int64 and graph.crow.tolist() == expected.indptr.tolist()
    assert graph.col.dtype == torch.int32 and graph.col.tolist() == expected.indices.tolist()
    degree = dense.sum(1)
    inverse = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1)), 0).astype(np.float32)
    assert graph.inv_sqrt_degree.dtype == torch.float32 and graph.inv_sqrt_degree.tolist() == inverse.tolist()
    assert graph.num_nodes == N and graph.num_edges == len(set(zip(users, items, strict=True)))


@requires("native")
@settings(deadline=None)
@given(interactions())
def test_native_builder_equals_its_twin(case: tuple[list[int], list[int], int, int]) -> None:
    native = _native.C()
    if native is None:
        return  # a child on the reference backend
    users, items = (np.array(ids, dtype=np.int64) for ids in case[:2])
    crow, col = native.build_graph(users, items, *case[2:])
    twin_crow, twin_col = build_graph_numpy(users, items, *case[2:])
    assert np.array_equal(crow, twin_crow) and np.array_equal(col, twin_col)
    assert crow.dtype == twin_crow.dtype and col.dtype == twin_col.dtype


@requires("native")
def test_native_builder_equals_its_twin_on_a_large_skewed_graph() -> None:
    native = _native.C()
    if native is None:
        return
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 3000, 50_000), np.minimum(rng.zipf(1.2, 50_000), 1999)
    for built, twin in zip(
        native.build_graph(users, items, 3000, 2000), build_graph_numpy(users, items, 3000, 2000), strict=True
    ):
        assert np.array_equal(built, twin)


@requires("native")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0, 5], [0, 0], 5, 3), r"users in \[0, 5\), got 5 at row 1"),
        (([0, 0], [0, -1], 5, 3), r"items in \[0, 3\), got -1 at row 1"),
        (([0], [0, 1], 5, 3), "users and items of one equal length, got 1 and 2"),
        (([], [], 2**31, 3), r"num_users \+ num_items in \[0, 2\^31\), got 2147483648 and 3"),
    ],
)
def test_native_builder_checks_for_itself(arguments: tuple[Any, ...], sentence: str) -> None:
    native = _native.C()
    if native is None:
        return
    users, items = (np.array(ids, dtype=np.int64) for ids in arguments[:2])
    with pytest.raises(ValueError, match=f"^build_graph: expected {sentence}"):
        native.build_graph(users, items, *arguments[2:])


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.uint64])
def test_every_integer_dtype_and_container(dtype: type) -> None:
    users, items = np.array([2, 0, 2, 1], dtype=dtype), np.array([0, 1, 0, 1], dtype=dtype)
    expected = BipartiteGraph.from_interactions([0, 1, 2], [1, 1, 0], 3, 2)
    strided = np.stack((users, items), axis=1)
    for a, b in ((users, items), (strided[:, 0], strided[:, 1]), (list(map(int, users)), list(map(int, items)))):
        graph = BipartiteGraph.from_interactions(a, b, 3, 2)
        assert torch.equal(graph.crow, expected.crow) and torch.equal(graph.col, expected.col)
    if dtype not in (np.uint32, np.uint64):
        graph = BipartiteGraph.from_interactions(torch.from_numpy(users), torch.from_numpy(items), 3, 2)
        assert torch.equal(graph.col, expected.col)


@pytest.mark.parametrize(
    ("users", "items", "sentence"),
    [
        ([0, 9], [0, 0], r"users in \[0, 4\), got 9 at row 1"),
        ([0, 1], [0, 3], r"items in \[0, 3\), got 3 at row 1"),
        ([0, -1], [0, 0], r"users in \[0, 4\), got -1 at row 1"),
        ([0.5], [0], r"users of an integer dtype, got float64 \(row 0 is .*0.5"),
        (torch.tensor([1.0]), [0], r"users of an integer dtype, got torch.float32 \(row 0 is \[1.0\]\)"),
        ([True], [0], "users of an integer dtype, got bool"),
        (["a"], [0], "users of an integer dtype"),
        ([[0]], [0], r"users of shape \[E\], got \[1, 1\]"),
        ([0, 1], [0], "users and items of equal length, got 2 and 1"),
    ],
)
def test_bad_ids(users: Any, items: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^BipartiteGraph: expected {sentence}"):
        BipartiteGraph.from_interactions(users, items, 4, 3)


@pytest.mark.parametrize(("num_users", "num_items"), [(-1, 3), (3, -1), (2**31, 0), (2**30, 2**30)])
def test_bad_sizes(num_users: int, num_items: int) -> None:
    with pytest.raises(ValueError, match="^BipartiteGraph: expected num_users >= 0 and num_items >= 0"):
        BipartiteGraph.from_interactions([], [], num_users, num_items)


def test_to_moves_and_keeps() -> None:
    graph = BipartiteGraph.from_interactions([0, 1], [0, 0], 2, 1)
    assert graph.to("cpu") is graph
    moved = graph.to("meta")
    assert moved.col.device.type == "meta" and moved.num_nodes == 3 and moved.inv_sqrt_degree.device.type == "meta"


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    for users, items in (([0, 1, 1], [2, 0, 2]), ([], [])):
        graph = BipartiteGraph.from_interactions(users, items, 2, 3)
        graph.save(path)
        loaded = BipartiteGraph.load(str(path))
        for name in ("crow", "col", "inv_sqrt_degree"):
            assert torch.equal(getattr(graph, name), getattr(loaded, name))
        assert (loaded.num_users, loaded.num_items) == (2, 3)
    assert os.listdir(tmp_path) == ["graph.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.safetensors"
    BipartiteGraph.from_interactions([0], [0], 1, 1).save(path)
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        BipartiteGraph.from_interactions([0, 1], [0, 1], 2, 2).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["graph.safetensors"]


GOOD = {
    "crow": torch.tensor([0, 1, 2]),
    "col": torch.tensor([1, 0], dtype=torch.int32),
    "inv_sqrt_degree": torch.ones(2),
}
SIZES = {"num_users": 1, "num_items": 1}


@pytest.mark.parametrize(
    ("changes", "sizes", "sentence"),
    [
        ({"crow": torch.tensor([0, 1])}, SIZES, r"crow int64 \[N\+1\], col int32"),
        ({"crow": torch.tensor([0, 1, 2], dtype=torch.int32)}, SIZES, r"crow int64 \[N\+1\], col int32"),
        ({"crow": torch.tensor([0, 3, 2])}, SIZES, "crow to rise from 0 to nnz"),
        ({"crow": torch.tensor([0, 1, 9])}, SIZES, "crow to rise from 0 to nnz"),
        ({"col": torch.tensor([1, 7], dtype=torch.int32)}, SIZES, r"col in \[0, 2\), got 1 .. 7"),
        ({"more": torch.ones(1)}, SIZES, "a file with"),
        ({}, {}, "a file with"),
    ],
)
def test_damaged_files(tmp_path: Path, changes: Any, sizes: Any, sentence: str) -> None:
    path = tmp_path / "graph.safetensors"
    save_file({**GOOD, **changes}, path, metadata={"collm_fast": json.dumps(sizes)})
    with pytest.raises(ValueError, match=f"^BipartiteGraph: expected {sentence}"):
        BipartiteGraph.load(path)


def test_another_file(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    path.write_text("not a graph")
    with pytest.raises(ValueError, match="BipartiteGraph: expected a graph file"):
        BipartiteGraph.load(path)
    with pytest.raises(FileNotFoundError):
        BipartiteGraph.load(tmp_path / "absent")


def test_without_the_compiled_module() -> None:
    if not in_child():
        assert run_with_backend("reference", __file__, "adjacency or bad or dtype") >= 15

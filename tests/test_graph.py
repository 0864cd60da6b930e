"""BipartiteGraph: the native builder against its NumPy twin and against scipy, errors, save and load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
from collm_fast.ops import lightgcn_propagate


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


def built(users: Any, items: Any, num_users: int, num_items: int, threads: int = 2) -> Any:
    """The native builder's arrays; the twin's in a child on the reference backend."""
    native = _native.C()
    if native is None:
        return build_graph_numpy(users, items, num_users, num_items)
    return native.build_graph(users, items, num_users, num_items, threads)


def assert_equal(arrays: Any, others: Any) -> None:
    for array, other in zip(arrays, others, strict=True):
        assert array.dtype == other.dtype and np.array_equal(array, other)


@requires("native")
@settings(deadline=None)
@given(interactions())
def test_native_builder_equals_its_twin(case: tuple[list[int], list[int], int, int]) -> None:
    users, items = (np.array(ids, dtype=np.int64) for ids in case[:2])
    assert_equal(built(users, items, *case[2:]), build_graph_numpy(users, items, *case[2:]))


# Pairs, users, items, and what is special: several ranges and threads need more than 2^15 pairs, an in-place sort more
# than 2^18 of one range.
LARGE = {
    "ranges of skewed users and items": (200_000, 30_000, 20_000),
    "few ids, nearly all pairs are duplicates": (200_000, 7, 5),
    "one pair, many times": (300_000, 1, 1),
    "a hub of a user": (300_000, 1, 400_000),
    "a hub of an item": (300_000, 400_000, 1),
    "two hubs and large ids": (600_000, 2, 2_000_000),
    "nodes without edges": (70_000, 3_000_000, 2_000_000),
}


@requires("native")
@pytest.mark.parametrize("name", LARGE)
def test_any_number_of_threads_gives_the_bits_of_the_twin(name: str) -> None:
    pairs, num_users, num_items = LARGE[name]
    rng = np.random.default_rng(0)
    users = (num_users * rng.random(pairs) ** 2).astype(np.int64)
    items = (num_items * rng.random(pairs) ** 4).astype(np.int32)
    twin = build_graph_numpy(users, items, num_users, num_items)
    for threads in (1, 2, 3, 8):
        assert_equal(built(users, items, num_users, num_items, threads), twin)
    turned = np.argsort(rng.random(pairs))
    both = np.stack((users[turned], items[turned]), axis=1)
    assert_equal(built(both[:, 0], both[::1, 1], num_users, num_items), twin)
    assert_equal(built(both[::-1, 0], both[::-1, 1], num_users, num_items), twin)


@requires("native")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "value", "rows"),
    [("users", 700, (199_999, 123_457)), ("items", -3, (250_000, 249_999, 2)), ("items", 500, [7])],
)
def test_the_first_bad_row_is_named(name: str, value: int, rows: list[int], threads: int) -> None:
    ids = {"users": np.arange(300_000) % 700, "items": (np.arange(300_000) % 500).astype(np.int32)}
    ids[name][list(rows)] = value
    with pytest.raises(ValueError, match=rf"^BipartiteGraph: expected {name} in .*, got {value} at row {min(rows)}$"):
        built(ids["users"], ids["items"], 700, 500, threads)


@requires("native")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0, 5], [0, 0], 5, 3), r"users in \[0, 5\), got 5 at row 1"),
        (([0, 0], [0, -1], 5, 3), r"items in \[0, 3\), got -1 at row 1"),
        (([0], [0, 1], 5, 3), "users and items of equal length, got 1 and 2"),
        (([[0]], [0], 5, 3), "users of one dimension, got 2"),
        (([0.5], [0], 5, 3), "users of an integer dtype in native byte order, got float64"),
        (([0], np.array([0], dtype=">i4"), 5, 3), "items of an integer dtype in native byte order, got >i4"),
        (([0], [0], 2**31, 3), r"num_users >= 0 .* below 2\^31, got 2147483648 and 3"),
        (([0], [0], 3, 0), r"items in \[0, 0\), got 0 at row 0"),
        (([0], [0], 0, 3), r"users in \[0, 0\), got 0 at row 0"),
    ],
)
def test_native_builder_checks_for_itself(arguments: tuple[Any, ...], sentence: str) -> None:
    native = _native.C()
    if native is None:
        return
    with pytest.raises(ValueError, match=f"^BipartiteGraph: expected {sentence}$"):
        native.build_graph(*map(np.asarray, arguments[:2]), *arguments[2:], 2)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.uint64])
def test_every_integer_dtype_and_container(dtype: type) -> None:
    users, items = np.array([2, 0, 2, 1], dtype=dtype), np.array([0, 1, 0, 1], dtype=dtype)
    expected = BipartiteGraph.from_interactions([0, 1, 2], [1, 1, 0], 3, 2)
    strided = np.stack((users, items), axis=1)
    packed = np.rec.fromarrays((users, np.ones(4, np.int8), items), names="user,between,item")
    swapped = users.astype(users.dtype.newbyteorder()), items.astype(items.dtype.newbyteorder())
    lists = list(map(int, users)), list(map(int, items))
    records = packed["user"], packed["item"]
    for a, b in (
        (users, items),
        (strided[:, 0], strided[:, 1]),
        (strided[::-1, 0], strided[::-1, 1]),
        lists,
        records,
        swapped,
    ):
        graph = BipartiteGraph.from_interactions(a, b, 3, 2)
        assert torch.equal(graph.crow, expected.crow) and torch.equal(graph.col, expected.col)
    if dtype not in (np.uint32, np.uint64):
        for a, b in ((users, items), (strided[:, 0], strided[:, 1])):
            graph = BipartiteGraph.from_interactions(torch.from_numpy(a), torch.from_numpy(b), 3, 2)
            assert torch.equal(graph.col, expected.col)


@pytest.mark.parametrize(
    ("users", "items", "sentence"),
    [
        ([0, 9], [0, 0], r"users in \[0, 4\), got 9 at row 1"),
        ([0, 1], [0, 3], r"items in \[0, 3\), got 3 at row 1"),
        ([0, -1], [0, 0], r"users in \[0, 4\), got -1 at row 1"),
        (np.array([0, 2**64 - 1], dtype=np.uint64), [0, 0], r"users in \[0, 4\), got 18446744073709551615 at row 1"),
        (np.array([300], dtype=np.uint16), [0], r"users in \[0, 4\), got 300 at row 0"),
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


def test_a_loaded_graph_needs_its_file_no_more(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    graph = BipartiteGraph.from_interactions([0, 1, 1], [2, 0, 2], 2, 3)
    graph.save(path)
    loaded = BipartiteGraph.load(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name in ("crow", "col", "inv_sqrt_degree"):
        assert torch.equal(getattr(graph, name), getattr(loaded, name))


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
        ({"col": torch.tensor([-1, 0], dtype=torch.int32)}, SIZES, r"col in \[0, 2\), got -1 .. 0"),
        ({"col": torch.zeros(1, 2, dtype=torch.int32)}, SIZES, r"crow int64 \[N\+1\], col int32"),
        ({}, {"num_users": 2, "num_items": 1}, r"crow int64 \[N\+1\], col int32"),
        ({"more": torch.ones(1)}, SIZES, "a file with"),
        ({}, {}, "a file with"),
        ({}, [1, 1], "a file with"),
        ({}, {"num_users": "1", "num_items": 1}, "a file with"),
        ({}, {"num_users": 3, "num_items": -1}, "a file with"),
    ],
)
def test_damaged_files(tmp_path: Path, changes: Any, sizes: Any, sentence: str) -> None:
    path = tmp_path / "graph.safetensors"
    save_file({**GOOD, **changes}, path, metadata={"collm_fast": json.dumps(sizes)})
    with pytest.raises(ValueError, match=f"^BipartiteGraph: expected {sentence}"):
        BipartiteGraph.load(path)


def test_a_mapped_graph_is_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    graph = BipartiteGraph.from_interactions([0, 1, 1], [2, 0, 2], 2, 3)
    graph.save(path)
    mapped = BipartiteGraph.load(path, mmap=True)
    mapped.validate()
    for name in ("crow", "col", "inv_sqrt_degree"):
        assert torch.equal(getattr(graph, name), getattr(mapped, name))
    x = torch.randn(5, 4)
    assert torch.equal(lightgcn_propagate(x, mapped, 3), lightgcn_propagate(x, graph, 3))
    # Saving a mapped graph over its own file replaces the file; the map keeps the old one.
    mapped.save(path)
    assert torch.equal(mapped.col, graph.col) and torch.equal(BipartiteGraph.load(path).col, graph.col)


def test_a_mapped_graph_checks_its_columns_where_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    bad = {**GOOD, "col": torch.tensor([1, 7], dtype=torch.int32)}
    save_file(bad, path, metadata={"collm_fast": json.dumps(SIZES)})
    graph = BipartiteGraph.load(path, mmap=True)
    with pytest.raises(ValueError, match=r"^BipartiteGraph: expected col in \[0, 2\), got 1 .. 7$"):
        graph.validate()
    for storage_dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match=r"lightgcn_propagate: expected col in \[0, 2\), got 7"):
            lightgcn_propagate(torch.zeros(2, 3), graph, 2, storage_dtype=storage_dtype)
    save_file({**GOOD, "crow": torch.tensor([0, 3, 2])}, path, metadata={"collm_fast": json.dumps(SIZES)})
    with pytest.raises(ValueError, match="^BipartiteGraph: expected crow to rise"):
        BipartiteGraph.load(path, mmap=True)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    BipartiteGraph.from_interactions([0, 1, 1], [2, 0, 2], 2, 3).save(path)
    whole = path.read_bytes()
    for size in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        for mmap in (False, True):
            with pytest.raises(ValueError, match="^BipartiteGraph: expected a graph file, got "):
                BipartiteGraph.load(path, mmap=mmap)


MEMORY = """
import sys, numpy as np, torch
from collm_fast import BipartiteGraph

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

rng = np.random.default_rng(0)
E, path = 2_000_000, sys.argv[1]
users, items = rng.integers(0, E // 25, E), (E // 40 * rng.random(E) ** 5).astype(np.int32)
BipartiteGraph.from_interactions(users[:100], items[:100], E // 25, E // 40)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts again from here
before = resident("VmRSS")
graph = BipartiteGraph.from_interactions(users, items, E // 25, E // 40)
peak = resident("VmHWM") - before
size = graph.crow.nbytes + graph.col.nbytes + graph.inv_sqrt_degree.nbytes
graph.save(path)
BipartiteGraph.from_interactions([0], [0], 1, 1).save(path + ".small")
BipartiteGraph.load(path + ".small", mmap=True)  # what the first load imports
before = resident("VmRSS")
mapped = BipartiteGraph.load(path, mmap=True)
opened = resident("VmRSS") - before
assert torch.equal(mapped.col, graph.col)
print(peak, size, opened, graph.col.nbytes)
"""


@requires("native", "peak")
def test_memory_of_building_and_of_opening(tmp_path: Path) -> None:
    """Building needs under three times the graph above the ids; opening a mapped file reads no columns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "graph.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peak, size, opened, columns = map(int, done.stdout.split())
    # About 2x is needed: the graph, 8 bytes a pair, and some MB of threads and scratch.
    assert size < peak < 3 * size, (peak, size)
    assert opened < columns // 4, (opened, columns)


def test_another_file(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    path.write_text("not a graph")
    with pytest.raises(ValueError, match="BipartiteGraph: expected a graph file"):
        BipartiteGraph.load(path)
    with pytest.raises(FileNotFoundError):
        BipartiteGraph.load(tmp_path / "absent")


def test_without_the_compiled_module() -> None:
    if not in_child():
        assert run_with_backend("reference", __file__, "adjacency or bad or dtype or mapped") >= 25

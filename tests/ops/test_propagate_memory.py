"""What lightgcn_propagate takes beside its input and output on the CPU, measured: two tables at any number of layers.

The resident memory's high-water mark is read by benchmarks/machine.py, which a test of its own checks here. It is read
in a fresh process: in this one the allocator may serve a table from a hole that an earlier test left, and keep it.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT, requires
from torch import Tensor

from collm_fast import BipartiteGraph
from collm_fast.ops import lightgcn_propagate

NODES, D = 48_000, 64
TABLE = NODES * D * 4
# The kernel counts resident pages in batches (64 pages a core), and large buffers begin and end on 2 MiB pages.
SLACK = 5 << 20

Peak = Callable[..., int]


@cache
def graph() -> BipartiteGraph:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, NODES // 2, (2, 300_000))
    return BipartiteGraph.from_interactions(users, items, NODES // 2, NODES // 2)


def known() -> Callable[[], Tensor]:
    def call() -> Tensor:
        kept = torch.ones(TABLE // 4)
        torch.ones(TABLE // 4)
        return kept + torch.ones(TABLE // 4)

    return call


def forward(layers: int, **options: object) -> Callable[[], Tensor]:
    x = torch.randn(NODES, D)
    return lambda: lightgcn_propagate(x, graph(), layers, **options)  # type: ignore[arg-type]


def backward(layers: int, **options: object) -> Callable[[], Tensor]:
    x = torch.randn(NODES, D, requires_grad=True)
    out = lightgcn_propagate(x, graph(), layers, **options)  # type: ignore[arg-type]
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


def without_layers(nodes: int) -> Callable[[], Tensor]:
    nothing = BipartiteGraph.from_interactions([], [], nodes, 0)
    x = torch.randn(nodes, 2)
    return lambda: lightgcn_propagate(x, nothing, 0)


def measured(make: Callable[..., Callable[[], Tensor]], *args: object, **options: object) -> int:
    """Bytes at the highest point of one call, its result included; the smaller of two, after one that warms up."""
    machine = importlib.import_module("machine")
    fn = make(*args, **options)
    fn()
    return min(machine.peak_bytes(fn, torch.device("cpu")) for _ in range(2))


@pytest.fixture(scope="module")
def peak() -> Iterator[Peak]:
    with pytest.MonkeyPatch.context() as patch:
        # Every table is then mapped for itself; glibc otherwise raises this limit to what was freed.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        patch.syspath_prepend(str(ROOT / "benchmarks"))  # the new process takes the path over
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            yield lambda *args, **options: fresh.submit(measured, *args, **options).result()


@requires("peak")
def test_the_mark_is_right(peak: Peak) -> None:
    """Of memory that is kept and of memory that is freed within the call."""
    assert abs(peak(known) - 3 * TABLE) < 1 << 20


@requires("native", "peak")
@pytest.mark.parametrize("direction", [forward, backward])
def test_two_tables_at_any_number_of_layers(peak: Peak, direction: Callable[..., Callable[[], Tensor]]) -> None:
    peaks = {layers: peak(direction, layers) for layers in range(1, 7)}
    assert all(needed - TABLE <= 2 * TABLE + SLACK for needed in peaks.values()), peaks
    # From the third layer on nothing is added; one more table would be as large as TABLE.
    assert max(peaks.values()) - peaks[3] < SLACK < TABLE, peaks


@requires("native", "peak")
def test_nothing_a_row_without_layers(peak: Peak) -> None:
    nodes = 2_000_000
    assert peak(without_layers, nodes) - 8 * nodes <= SLACK < 8 * nodes


@requires("native", "peak")
@pytest.mark.parametrize("direction", [forward, backward])
def test_less_with_bfloat16_storage_and_rows(peak: Peak, direction: Callable[..., Callable[[], Tensor]]) -> None:
    stored = peak(direction, 4, storage_dtype=torch.bfloat16)
    assert stored - TABLE <= TABLE + SLACK
    rows = torch.arange(0, NODES, 97)
    output = TABLE if direction is backward else len(rows) * D * 4
    assert peak(direction, 4, rows=rows) - output <= 2 * TABLE + SLACK

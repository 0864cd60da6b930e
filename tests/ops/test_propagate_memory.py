"""What lightgcn_propagate takes beside its input and output on the CPU, measured: two tables at any number of layers.

The resident memory's high-water mark is read by benchmarks/machine.py, which a test of its own checks here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

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
M_MMAP_THRESHOLD = -3


@pytest.fixture(scope="module")
def graph() -> BipartiteGraph:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, NODES // 2, (2, 300_000))
    return BipartiteGraph.from_interactions(users, items, NODES // 2, NODES // 2)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    # glibc serves what is smaller than the largest buffer freed so far from its heap, where one live object between two
    # tables keeps the freed one resident: the mark would depend on what ran before. A fixed limit ends that.
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import machine

    yield machine
    sys.modules.pop("machine", None)


def peak(machine: ModuleType, fn: Callable[[], object]) -> int:
    """Bytes at the highest point of one call, its result included; the smaller of two, after one that warms up."""
    fn()
    return min(machine.peak_bytes(fn, torch.device("cpu")) for _ in range(2))


def forward(graph: BipartiteGraph, layers: int, **options: object) -> Callable[[], Tensor]:
    x = torch.randn(NODES, D)
    return lambda: lightgcn_propagate(x, graph, layers, **options)  # type: ignore[arg-type]


def backward(graph: BipartiteGraph, layers: int, **options: object) -> Callable[[], Tensor]:
    x = torch.randn(NODES, D, requires_grad=True)
    out = lightgcn_propagate(x, graph, layers, **options)  # type: ignore[arg-type]
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


@requires("peak")
def test_the_mark_is_right(machine: ModuleType) -> None:
    """Of memory that is kept and of memory that is freed within the call."""

    def call() -> Tensor:
        kept = torch.ones(TABLE // 4)
        torch.ones(TABLE // 4)
        return kept + torch.ones(TABLE // 4)

    assert abs(peak(machine, call) - 3 * TABLE) < 1 << 20


@requires("native", "peak")
@pytest.mark.parametrize("direction", [forward, backward])
def test_two_tables_at_any_number_of_layers(
    machine: ModuleType, graph: BipartiteGraph, direction: Callable[..., Callable[[], Tensor]]
) -> None:
    peaks = {layers: peak(machine, direction(graph, layers)) for layers in range(1, 7)}
    assert all(needed - TABLE <= 2 * TABLE + SLACK for needed in peaks.values()), peaks
    # From the third layer on nothing is added; one more table would be as large as TABLE.
    assert max(peaks.values()) - peaks[3] < SLACK < TABLE, peaks


@requires("native", "peak")
def test_nothing_a_row_without_layers(machine: ModuleType) -> None:
    nodes = 2_000_000
    nothing = BipartiteGraph.from_interactions([], [], nodes, 0)
    x = torch.randn(nodes, 2)
    assert peak(machine, lambda: lightgcn_propagate(x, nothing, 0)) - 8 * nodes <= SLACK < 8 * nodes


@requires("native", "peak")
@pytest.mark.parametrize("direction", [forward, backward])
def test_less_with_bfloat16_storage_and_rows(
    machine: ModuleType, graph: BipartiteGraph, direction: Callable[..., Callable[[], Tensor]]
) -> None:
    stored = peak(machine, direction(graph, 4, storage_dtype=torch.bfloat16))
    assert stored - TABLE <= TABLE + SLACK
    rows = torch.arange(0, NODES, 97)
    output = TABLE if direction is backward else len(rows) * D * 4
    assert peak(machine, direction(graph, 4, rows=rows)) - output <= 2 * TABLE + SLACK

"""benchmarks/growth.py on tiny graphs: what it measures, the fits, the page, the plot, and the plan's arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The scripts, as when one of them is run; nothing pins this process."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import growth
    import growth_plan
    import growth_report

    monkeypatch.setattr(growth.machine, "pin", lambda threads: None)
    yield SimpleNamespace(script=growth, report=growth_report, plan=growth_plan)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def size(edges: int, large: bool = False) -> dict[str, Any]:
    """Made up: building grows linearly, an epoch with the square, memory as the graph."""
    nodes = edges // 25 + edges // 40
    stage = {"cpu_s": 1.0, "samples": 1}
    stages = {
        "build": {**stage, "seconds": 3e-9 * edges, "peak_bytes": 16 * edges},
        **{
            name: {
                **stage,
                "seconds": 1e-7 * edges,
                "peak_bytes": nodes * 256 * 2,
                "gathered_bytes_per_s": 8e9,
                "gather_ceiling_bytes_per_s": 1e10,
            }
            for name in ("forward", "forward bf16")
        },
    }
    if not large:
        epoch = {**stage, "seconds": 1e-11 * edges**2, "steps": 5, "steps_of_an_epoch": 50, "peak_bytes": edges}
        stages |= {"forward+backward": stages["forward"], "BPR epoch": epoch, "BPR epoch bf16": epoch}
    return {
        "edges": edges,
        "users": edges // 25,
        "items": edges // 40,
        "graph_bytes": 8 * edges + 12 * nodes,
        "table_bytes": nodes * 256,
        "large": large,
        "stages": stages,
    }


def result(growth: Any, sizes: list[dict[str, Any]]) -> dict[str, Any]:
    head = {"cpu": "a processor", "simd": "AVX2", "threads": 2, "commit": "0" * 40, "versions": {"torch": "2"}}
    ceilings = {"copy_bytes_per_s": {"1000": 2e10}}
    found = {**head, "D": 64, "K": 3, "batch_size": 2048, "ceilings": ceilings, "sizes": sizes}
    return found | {"fits": growth.report.fits(sizes)}


def test_fits_find_the_exponents_and_hold_out_the_large_sizes(growth: Any) -> None:
    sizes = [size(10**6), size(3 * 10**6), size(10**7), size(10**8, large=True)]
    fits = {(fit["stage"], fit["what"]): fit for fit in growth.report.fits(sizes)}
    assert fits["build", "seconds"]["exponent"] == pytest.approx(1.0)
    assert fits["BPR epoch", "seconds"]["exponent"] == pytest.approx(2.0)
    assert fits["forward", "bytes"]["exponent"] == pytest.approx(1.0)
    (held,) = fits["build", "seconds"]["held_out"]
    assert held["predicted"] == pytest.approx(held["measured"]) and held["measured"] == 0.3
    assert fits["BPR epoch", "seconds"]["held_out"] == []


def test_page_plot_and_plan(growth: Any, tmp_path: Path) -> None:
    found = result(growth, [size(10**6), size(10**7), size(10**8, large=True)])
    page = growth.report.page(found)
    assert "1000 s (from 5 of 50 steps)" in page or "0.3 h (from 5 of 50 steps)" in page
    # The plan, by hand: 65 million nodes, 2 billion columns; 512 GB of rows a layer at 8 GB/s.
    assert "| **graph** |  | 8.78 |" in page
    assert "| training, float32 layers | graph + embedding, gradient, 2 moments + 1 table | 91.98 |" in page
    assert "| float32 | 512.00 | 41.28 | 64.00 s | 192 s | 553.3 ms |" in page
    # A billion edges at 1e-11 seconds a squared edge.
    assert "the fit gives 116 days" in page
    growth.report.plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_two_ranks_of_the_plan(growth: Any) -> None:
    # Two ranks: each owns half of everything and reads nearly all of the other half.
    cells = growth.plan.ranks(2, 40 * 10**6, 25 * 10**6, 8_780_000_000, 64, 16_640_000_000, 32.0, 289 * 10**9)
    halo = 32.5e6 * (1 - 2**-25 * 40 / 65 - 2**-40 * 25 / 65)
    assert cells[5] == f"{halo * 128 / 1e9:.2f}" == "4.16"
    assert cells[1] == f"{(4.39e9 + 8 * halo) / 1e9:.2f}" and cells[2] == "33.28"
    assert cells[6:] == ["332.8 ms", "16.00 s", "48.2 ms"]


def test_one_size_is_measured(growth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.script, "gather_rate", lambda *arguments, **options: 1e9)
    monkeypatch.setattr("gc.collect", lambda: 0)  # of all that pytest holds, 25 times
    found = growth.script.measure(20_000, 1, 0.01, False, True)
    assert set(found["stages"]) == set(growth.report.STAGES)
    assert found["edges"] <= found["pairs"] == 20_000 and found["users"] == 800 and found["items"] == 500
    for stage in found["stages"].values():
        assert stage["seconds"] > 0
    epoch = found["stages"]["BPR epoch"]
    assert 3 <= epoch["steps"] <= epoch["steps_of_an_epoch"] == 10
    large = growth.script.measure(20_000, 1, 0.01, True, True)
    assert set(large["stages"]) == {"build", "forward", "forward bf16"} and large["edges"] == found["edges"]


@pytest.mark.parametrize(("text", "count"), [("20k", 20_000), ("3M", 3_000_000), ("7", 7)])
def test_counts(growth: Any, text: str, count: int) -> None:
    assert growth.script.count_of(text) == count


def test_without_a_mark_of_the_memory_nothing_is_measured(growth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["growth.py", "--pairs", "1k", "2k"])
    monkeypatch.setattr(growth.script.machine, "peak_bytes", lambda fn, device: None)
    monkeypatch.setattr(growth.script, "in_a_new_process", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="expected the mark of the resident memory"):
        growth.script.main()


def test_one_size_cannot_be_fitted(growth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["growth.py", "--pairs", "1M"])
    with pytest.raises(SystemExit, match="2"):
        growth.script.main()

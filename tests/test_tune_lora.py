"""The search for launch configurations on a clock that is made up, and the text of the table."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from collm_fast.kernels import lora_table
from collm_fast.kernels.lora_table import Launch
from conftest import ROOT


@pytest.fixture(scope="module")
def tuner() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("tune_lora", ROOT / "benchmarks" / "tune_lora.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["tune_lora"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["tune_lora"]


START = Launch(32, 64, 16)
FASTEST = Launch(64, 128, 16, num_warps=8, num_stages=2)


def distance(launch: Launch) -> float:
    """How many doublings, or stages, a configuration is from the fastest one: a clock with one valley."""
    axes = ("BLOCK_M", "BLOCK_C", "RANK", "num_warps")
    steps = sum(abs(math.log2(getattr(launch, a) / getattr(FASTEST, a))) for a in axes)
    return 1.0 + steps + abs(launch.num_stages - FASTEST.num_stages)


def test_the_search_ends_at_the_fastest_and_measures_each_once(tuner: ModuleType) -> None:
    asked: list[Launch] = []

    def measure(launch: Launch) -> float:
        asked.append(launch)
        return distance(launch)

    best, seconds = tuner.search(START, measure, tuner.AXES)
    assert best == FASTEST and seconds[best] == 1.0 and asked[0] == START
    assert len(asked) == len(set(asked)) == len(seconds) < 40
    first = list(asked)
    asked.clear()
    assert tuner.search(START, measure, tuner.AXES)[0] == best and asked == first, "the order is fixed"


def test_noise_moves_nothing(tuner: ModuleType) -> None:
    def measure(launch: Launch) -> float:
        return 1.0 if launch == START else 0.98  # all others 2 % faster: less than counts

    assert tuner.search(START, measure, tuner.AXES)[0] == START
    assert tuner.search(START, measure, tuner.AXES, gain=0.01)[0] == replace(START, BLOCK_M=16), "of equals the first"


def test_what_does_not_run_is_never_taken(tuner: ModuleType) -> None:
    def measure(launch: Launch) -> float:
        return math.inf if launch.BLOCK_M == 64 else distance(launch)

    best, _ = tuner.search(START, measure, tuner.AXES)
    assert best in (replace(FASTEST, BLOCK_M=32), replace(FASTEST, BLOCK_M=128))
    # From a configuration that does not run it finds one that does.
    assert tuner.search(replace(START, BLOCK_M=64), measure, tuner.AXES)[0].BLOCK_M != 64
    with pytest.raises(RuntimeError, match="tune_lora: expected a configuration that runs, got none of"):
        tuner.search(START, lambda launch: math.inf, tuner.AXES)


@pytest.mark.parametrize(
    ("r", "blocks"), [(1, [16]), (8, [16]), (17, [16, 32]), (64, [16, 32, 64]), (256, [16, 32, 64])]
)
def test_blocks_of_ranks_are_not_larger_than_the_rank(tuner: ModuleType, r: int, blocks: list[int]) -> None:
    axes = tuner.axes_for(r, tuner.AXES)
    assert axes["RANK"] == blocks and axes["BLOCK_M"] == list(tuner.AXES["BLOCK_M"])


def test_the_rows_of_a_run(tuner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    problems = [tuner.Problem(kernel, "bfloat16", 512, 576, r) for kernel in ("project", "outer") for r in (8, 64)]

    def clock_of(problem: Any, capability: int) -> Callable[[Launch], float]:
        assert capability == 90
        return lambda launch: distance(launch) * (1 if problem.kernel == "outer" else 2)

    rows, report = tuner.tune(problems, 90, tuner.AXES, clock_of)
    assert rows == {(90, p.kernel, "bfloat16", 16 if p.r == 8 else 256, 1024): FASTEST for p in problems}
    assert [entry["kernel"] for entry in report] == ["project", "project", "outer", "outer"]
    assert report[0]["before_s"] == 2 * distance(START) and report[0]["after_s"] == 2.0
    assert capsys.readouterr().out.count("us by Launch(BLOCK_M=64") == 4


def test_the_table_with_rows_is_the_table(tuner: ModuleType, tmp_path: Any) -> None:
    rows = {(90, "outer", "float32", 256, 4096): FASTEST, (80, "project", "bfloat16", 16, 1024): START}
    text = tuner.with_rows(tuner.TABLE.read_text(), rows, "Measured on a clock that is made up.")
    space: dict[str, Any] = {"__name__": lora_table.__name__}
    exec(compile(text, "lora_table.py", "exec"), space)
    found = {key: (vars(launch)) for key, launch in space["MEASURED"].items()}
    assert found == {key: vars(launch) for key, launch in rows.items()}
    assert list(found) == sorted(rows), "in the order of their keys"
    assert "No row was measured" not in text and "Measured on a clock" in text
    assert tuner.with_rows(text, rows, "Measured on a clock that is made up.") == text
    assert max(map(len, text.splitlines())) <= 120
    with pytest.raises(ValueError, match="tune_lora: expected one place for the rows"):
        tuner.with_rows("MEASURED = {}", rows, "")


def test_the_committed_table_says_whether_it_was_measured(tuner: ModuleType) -> None:
    text = tuner.TABLE.read_text()
    assert ("No row was measured yet" in text) == (not lora_table.MEASURED)


def test_without_a_gpu_it_says_so(
    tuner: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuner.main(["--quick"]) == 2
    sentence = "tune_lora: expected an NVIDIA GPU that this torch can use, got none\n"
    assert capsys.readouterr() == ("", sentence)


def test_a_watched_kernel_keeps_its_code(tuner: ModuleType) -> None:
    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., object]:
            return lambda *args, **options: (grid, args, options)

    watched = tuner.Watched(Kernel())
    assert watched[(3,)](1, BLOCK=2) is None and watched.code == ((3,), (1,), {"BLOCK": 2})

"""The benchmark harness and the comparison of two results, on tiny cases. Nothing here asserts a time."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, requires

from collm_fast.bench import run_bench
from collm_fast.bench_compare import compare

FOLDER = ROOT / "benchmarks"
ROW_KEYS = {"case", "impl", "pass", "dtype", "threads", "median_s", "p20_s", "p80_s", "peak_bytes", "floor_s"}
HEAD_KEYS = {"device", "cpu", "simd", "commit", "versions", "data", "ceilings", "rows"}
CEILINGS = {
    "copy_bytes_per_s": {"1000": 10.0, "1000000": 100.0},
    "gather_bytes_per_s": {"1000": 50.0, "1000000": 5.0},
    "gemm_flops_per_s": {"float32": 2.0, "bfloat16": 4.0},
    "table_bytes_per_s": {"10 x 4 float32": 5.0},
}
MODULES = (
    "harness",
    "options",
    "machine",
    "rows",
    "ceilings",
    "bench_inject",
    "bench_lora",
    "lora_peers",
    "bench_propagate",
    "bench_ranking",
    "graphs",
    "propagate_peers",
    "bpr_steps",
    "cusparse",
)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripts' folder on the path, as when one of them is run; nothing pins this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import harness as module
    import machine

    monkeypatch.setattr(machine, "pin", lambda threads: None)
    yield module
    for name in MODULES:
        sys.modules.pop(name, None)


def tiny(harness: ModuleType, **options: Any) -> Any:
    return harness.Suite(harness.Options(rounds=2, min_sample_s=0.0, **options), copy.deepcopy(CEILINGS))


def doubling(suite: Any) -> None:
    x = suite.tensor(16, 4)
    impls = {"ours": lambda: x + x, "torch": lambda: x * 2, "wrong": lambda: x * 3, "broken": lambda: x @ x}
    suite.case("N=16", "fwd", x.dtype, impls, expected=lambda: x.double() * 2)


def test_a_case_becomes_rows_of_the_promised_shape(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tiny(harness)
    doubling(suite)
    result = suite.to_json()
    assert set(result) >= HEAD_KEYS and all(set(row) >= ROW_KEYS for row in result["rows"])
    assert [row["impl"] for row in result["rows"]] == ["ours", "torch", "wrong"]
    ours, _, wrong = result["rows"]
    assert (ours["case"], ours["pass"], ours["dtype"], ours["threads"]) == ("N=16", "fwd", "float32", 1)
    assert 0 < ours["p20_s"] <= ours["median_s"] <= ours["p80_s"] and ours["cpu_s"] >= 0 and ours["floor_s"] is None
    assert ours["agrees"] and ours["error"] == 0 and not wrong["agrees"] and wrong["error"] == pytest.approx(0.5)
    assert len(result["failures"]) == 1 and result["failures"][0].startswith("N=16 fwd float32 broken: ")
    assert len(result["data"]["synthetic"]["sha256"]) == 64 and result["versions"]["torch"]
    json.dumps(result, allow_nan=False)
    assert capsys.readouterr().err == "N=16 fwd float32\n"


def test_no_speed_up_is_reported_for_another_output(harness: ModuleType) -> None:
    from rows import format_table

    suite = tiny(harness)
    doubling(suite)
    line = format_table(suite.rows)
    assert "torch" in line and line.count("x ours") == 1 and "wrong DIFFERS (error 5.0e-01): no speed-up" in line
    x = suite.tensor(3)
    suite.rows.clear()
    suite.case("nan", "fwd", x.dtype, {"ours": lambda: x / 0, "torch": lambda: x * 2}, expected=lambda: x * 2)
    line = format_table(suite.rows)
    assert "ours DIFFERS (not finite): no speed-up" in line and "x ours" not in line and suite.rows[0].error is None


def test_failures_of_ours_and_unknown_passes_are_errors(harness: ModuleType) -> None:
    suite, x = tiny(harness), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        suite.case("a", "fwd", x.dtype, {"ours": lambda: x @ x}, expected=lambda: x)
    with pytest.raises(ValueError, match="expected a pass of fwd, .* got 'forward'"):
        suite.case("a", "forward", x.dtype, {"ours": lambda: x}, expected=lambda: x)


def test_only_and_flush(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tiny(harness, only=("other", "N=17"))
    doubling(suite)
    assert suite.rows == []
    suite = tiny(harness, only=harness.parse(None, ["--only", "other", "--only", "N=16 fwd"]).only)
    doubling(suite)
    assert len(suite.rows) == 3
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, **kw: empty(min(n, 8), **kw))  # not 256 MiB
    suite = tiny(harness, flush_l2=True)
    doubling(suite)
    assert len(suite.rows) == 3


def test_ours_beside_one_other(harness: ModuleType) -> None:
    suite = tiny(harness, beside=harness.parse(None, ["--beside", "torch", "--beside", "elsewhere"]).beside)
    doubling(suite)
    assert [row.impl for row in suite.rows] == ["ours", "torch"]
    assert suite.failures == ["N=16 fwd float32 elsewhere: expected one of ours, torch, wrong, broken"]


def test_backward_returns_outputs_and_gradients(harness: ModuleType) -> None:
    x, w, grad = torch.ones(2, 3), torch.full((3,), 2.0), torch.full((2, 3), 5.0)
    out, dx, dw = harness.backward(lambda x, w: x * w, [x, w], grad)()
    assert not out.requires_grad and torch.equal(out, x * w)
    assert torch.equal(dx, grad * w) and torch.equal(dw, torch.full((3,), 10.0))
    out, other, dw = harness.backward(lambda x, w: [x * w, x + w], [x, w], [grad, grad], wrt=[1])()
    assert torch.equal(dw, torch.full((3,), 20.0)) and torch.equal(other, x + w) and not x.requires_grad


def test_distance(harness: ModuleType) -> None:
    one, two = torch.ones(4), torch.full((4,), 2.0)
    assert harness.distance([two], [one.double()]) == 1.0 and harness.distance([one, two], [one, two]) == 0.0
    assert harness.distance([one], [one, one]) == math.inf and harness.distance([one], [torch.ones(4, 1)]) == math.inf
    assert math.isnan(harness.distance([one, one / 0], [one, one]))
    assert harness.distance([one], [torch.zeros(4)]) == 2.0


def test_the_floor_is_the_slowest_need_at_the_ceilings(harness: ModuleType) -> None:
    from ceilings import floor_seconds

    work = harness.Work
    assert floor_seconds(work(bytes=2000), CEILINGS, torch.float32) == 200.0
    assert floor_seconds(work(bytes=2e6), CEILINGS, torch.float32) == 2e4
    assert floor_seconds(work(bytes=10, flops=40), CEILINGS, torch.bfloat16) == 10.0
    assert floor_seconds(work(flops=40), CEILINGS, torch.float64) == 20.0
    table = harness.Table(10, 4, torch.float32)
    assert floor_seconds(work(gathered=100, table=table), CEILINGS, torch.float32) == 20.0
    assert floor_seconds(work(bytes=1), {}, torch.float32) is None


def test_a_case_is_held_against_the_gather_ceiling_of_its_own_table(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def rate(table: Any, device: torch.device, *, quick: bool) -> float:
        asked.append(str(table))
        return 1e3

    monkeypatch.setattr(harness, "gather_rate", rate)
    suite, x = tiny(harness), torch.ones(10, 4)
    work = harness.Work(gathered=64.0, table=harness.Table(10, 2, torch.bfloat16))
    for name in ("a", "b"):
        suite.case(name, "fwd", x.dtype, lambda: {"ours": lambda: x * 2}, expected=lambda: x * 2, work=lambda: work)
    suite.case("none", "fwd", x.dtype, {"ours": lambda: x * 2}, expected=lambda: x * 2)
    assert asked == ["10 x 2 bfloat16"] and suite.ceilings["table_bytes_per_s"]["10 x 2 bfloat16"] == 1e3
    first, _, without = suite.rows
    assert first.gather_fraction == pytest.approx(64.0 / first.seconds(True) / 1e3) and first.floor_s == 0.064
    assert without.gather_fraction is None and first.to_json()["gather_fraction"] == first.gather_fraction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_rates_and_ceilings_are_measured(harness: ModuleType, dtype: torch.dtype) -> None:
    from ceilings import Table, _on_huge_pages, gather_rate

    table = Table(1000, 16, dtype)
    assert table.row_bytes == 16 * dtype.itemsize and gather_rate(table, torch.device("cpu"), quick=True) > 0
    huge = _on_huge_pages((300, 7), dtype)
    assert huge.shape == (300, 7) and huge.dtype == dtype and bool((huge == 1).all())


def test_slow_implementations_have_fewer_samples_spread_over_the_turns(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, calls = harness.Suite(harness.Options(rounds=12, min_sample_s=0.0, seconds=6.0)), []
    seconds = {"fast": 0.5, "slow": 1.5, "slower": 10.0, "slowest": 100.0}
    monkeypatch.setattr(suite, "_warm_up", lambda fn, first: first)
    monkeypatch.setattr(harness, "sample", lambda fn, *more: (calls.append(fn()), (1.0, 2.0))[1])
    wall, cpu = suite._times({name: lambda name=name: name for name in seconds}, seconds)
    assert {name: len(times) for name, times in wall.items()} == {"fast": 12, "slow": 4, "slower": 3, "slowest": 1}
    assert list(cpu["slower"].values()) == [2.0] * 3
    places = [i for i, name in enumerate(calls) if name == "slower"]
    assert all(calls[one:two].count("fast") >= 3 for one, two in itertools.pairwise(places))
    suite = harness.Suite(harness.Options(rounds=2, min_sample_s=0.0))
    assert suite._samples(1e9) == 2 and suite._samples(1e-9) == 2
    assert suite._warm_up(lambda: pytest.fail("called again"), 1.5) == 1.5


def test_what_is_drawn_after_reseed_depends_on_the_name_alone(harness: ModuleType) -> None:
    one, other = tiny(harness), tiny(harness)
    one.tensor(5)
    one.reseed("a")
    other.reseed("a")
    assert torch.equal(one.tensor(4), other.tensor(4))
    other.reseed("b")
    assert not torch.equal(one.tensor(4), other.tensor(4))


def test_one_pinned_thread_is_compared_by_processor_time(harness: ModuleType) -> None:
    from rows import format_table

    suite, x = tiny(harness), torch.ones(3)
    impls = {"ours": lambda: x * 2, "torch": lambda: x + x}
    suite.case("a", "fwd", x.dtype, impls, expected=lambda: x * 2)
    for row, cpu, wall in zip(suite.rows, (1.0, 3.0), (2.0, 2.0), strict=True):
        row.cpu_s, row.median_s, row.over_ours = cpu, wall, None  # a file of before
    assert suite.by_cpu and "= 3.00x ours" in format_table(suite.rows, suite.by_cpu)
    assert "= 1.00x ours" in format_table(suite.rows)
    assert not tiny(harness, threads=2).by_cpu


def test_the_ratio_pairs_the_samples_of_a_turn(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes ten times as slow half-way changes both medians, and no quotient."""
    from rows import format_table

    suite, x, rates = tiny(harness), torch.ones(3), iter([1.0] * 4 + [10.0] * 6)
    times = {"ours": [1.0, 1.0, 1.0, 1.0, 1.0], "torch": [2.0, 4.0, 2.0, 2.0, 8.0]}

    def sampled(impls: object, first: object) -> tuple[dict[str, dict[int, float]], ...]:
        rate = [next(rates) for _ in range(5)]
        cpu = {name: {turn: rate[turn] * t for turn, t in enumerate(all_)} for name, all_ in times.items()}
        del cpu["torch"][0]  # a slower one skips turns
        return {name: dict.fromkeys(all_, 7.0) for name, all_ in cpu.items()}, cpu

    monkeypatch.setattr(suite, "_times", sampled)
    impls = {"ours": lambda: x * 2, "torch": lambda: x + x}
    suite.case("a", "fwd", x.dtype, impls, expected=lambda: x * 2)
    assert [row.over_ours for row in suite.rows] == [1.0, 3.0] and suite.rows[1].cpu_s == 3.0
    assert "= 3.00x ours" in format_table(suite.rows, suite.by_cpu)
    assert harness._paired("torch", {"torch": {0: 1.0}}) is None


def test_the_machine_is_described(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import machine

    description = machine.description(torch.device("cpu"))
    assert description["device"] == description["cpu"] and description["simd"]
    assert description["versions"]["torch"] and description["versions"]["python"]
    peak = machine.peak_bytes(lambda: torch.ones(4 << 20), torch.device("cpu"))
    assert peak is None or peak >= 15 << 20  # the kernel counts resident pages in batches
    monkeypatch.setattr(machine.Path, "write_text", lambda *a: (_ for _ in ()).throw(OSError()))
    assert machine.peak_bytes(lambda: None, torch.device("cpu")) is None
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError()))
    monkeypatch.setenv("COLLM_FAST_COMMIT", "abc")
    assert machine.commit() == "abc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--rounds", "-1"], "--rounds: expected at least 1, got -1"),
        (["--seconds", "0"], "--seconds: expected more than 0, got 0.0"),
        (["--continue"], "--continue: expected --json and one process"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_bad_option_exits_with_two(
    harness: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        harness.parse("A toy.", arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_main_writes_the_file_and_fails_on_a_wrong_output(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "measure_ceilings", lambda device, quick: CEILINGS)
    path = tmp_path / "new" / "toy.json"
    assert harness.main(doubling, "A toy.", ["--quick", "--device", "cpu", "--json", str(path)]) == 0
    assert len(json.loads(path.read_text())["rows"]) == 3 and not list(path.parent.glob(".*"))
    text = capsys.readouterr().out
    assert "N=16 fwd float32 x1 | ours" in text and "not run: N=16 fwd float32 broken" in text

    def wrong(suite: Any) -> None:
        x = suite.tensor(4)
        suite.case("a", "step", x.dtype, {"ours": lambda: x * math.nan}, expected=lambda: x)

    assert harness.main(wrong, None, ["--quick", "--device", "cpu", "--json", str(path)]) == 1
    assert json.loads(path.read_text())["rows"][0]["error"] is None
    assert harness.main(lambda suite: None, None, ["--quick", "--device", "cpu"]) == 1
    assert "no case was run" in capsys.readouterr().out


def test_a_run_that_was_cut_short_continues(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "measure_ceilings", lambda device, quick: CEILINGS)
    ran: list[str] = []

    def cases(suite: Any) -> None:
        for name in ("a", "b", "c"):
            if not suite.wanted(name, ("fwd", "eval"), torch.float32):
                continue
            x = suite.tensor(8)
            ran.append(name)
            if len(ran) == 2:
                raise KeyboardInterrupt
            suite.case(name, "fwd", x.dtype, {"ours": lambda x=x: x + x}, expected=lambda x=x: x * 2)
            suite.case(name, "eval", x.dtype, {"ours": lambda x=x: x + x}, expected=lambda x=x: x * 2)

    path = tmp_path / "toy.json"
    arguments = ["--quick", "--device", "cpu", "--json", str(path), "--continue"]
    with pytest.raises(KeyboardInterrupt):
        harness.main(cases, None, arguments)
    # What was measured before the last case began is there.
    (first,) = json.loads(path.read_text())["rows"]
    monkeypatch.setattr(harness, "measure_ceilings", None)
    assert harness.main(cases, None, arguments) == 0
    result = json.loads(path.read_text())
    assert ran == ["a", "b", "a", "b", "c"] and result["ceilings"] == CEILINGS
    assert [(row["case"], row["pass"]) for row in result["rows"]] == [(c, p) for c in "abc" for p in ("fwd", "eval")]
    assert result["rows"][0] == first
    assert harness.main(cases, None, arguments) == 0 and len(ran) == 5
    for key, value in (("commit", "another"), ("cpu", "a better one")):
        path.write_text(json.dumps({**result, key: value}))
        with pytest.raises(ValueError, match=f"--continue: expected a file with {key} "):
            harness.main(cases, None, arguments)
    path.write_text(json.dumps({**result, "rows": [{**first, "threads": 2}]}))
    with pytest.raises(ValueError, match="expected a file of 1 threads, got 2"):
        harness.main(cases, None, arguments)


def test_several_processes_are_merged(tmp_path: Path) -> None:
    """A script run as a user runs it, twice, pinned and with measured ceilings."""
    script = tmp_path / "bench_toy.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nimport harness\n"
        "def cases(suite):\n"
        "    x = suite.integers(0, 9, 64).float()\n"
        "    suite.file('script', __import__('pathlib').Path(__file__))\n"
        "    suite.case('toy', 'eval', x.dtype, {'ours': lambda: x + x}, expected=lambda: x * 2,\n"
        "               work=harness.Work(bytes=512))\n"
        "if __name__ == '__main__':\n    raise SystemExit(harness.main(cases, 'A toy.'))\n"
    )
    path = tmp_path / "toy.json"
    command = [sys.executable, str(script), "--quick", "--device", "cpu", "--processes", "2", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["processes"] == 2 and len(result["rows"]) == 1 and result["rows"][0]["floor_s"] > 0
    assert set(result["data"]) == {"synthetic", "script"} and set(result["ceilings"]) == set(CEILINGS)
    assert "toy eval float32 x1 | ours" in done.stdout


def test_merge_takes_medians(harness: ModuleType) -> None:
    from rows import merge

    suite = tiny(harness)
    doubling(suite)
    result = suite.to_json()
    results = [json.loads(json.dumps(result)) for _ in range(3)]
    for number, seconds in enumerate((5.0, 1.0, 2.0)):
        results[number]["rows"][0] |= {"median_s": seconds, "peak_bytes": None, "agrees": number != 2}
        results[number]["rows"][1]["peak_bytes"] = 10 + number
    first, second, _ = merge(results)["rows"]
    assert first["median_s"] == 2.0 and first["peak_bytes"] is None and first["agrees"] is False
    assert second["peak_bytes"] == 11 and second["agrees"] is True
    for number, rate in enumerate((5.0, 1.0, 2.0)):
        results[number]["ceilings"]["table_bytes_per_s"] = {"both": rate, str(number): 1.0}
    assert merge(results)["ceilings"]["table_bytes_per_s"] == {"both": 2.0}


def test_a_process_without_a_result_is_an_error(harness: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "bench_toy.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="process 1 of 2 ended without a result"):
        harness._again([str(script)], 2)


def test_every_injection_agrees(harness: ModuleType) -> None:
    import bench_inject

    suite = tiny(harness)
    bench_inject.injection(suite, 64, 8, 4, 32, torch.float32)
    bench_inject.sums(suite, 32, 8, 5, torch.float32)
    assert suite.failures == [] and all(row.agrees for row in suite.rows)
    assert {row.pass_ for row in suite.rows} == {"fwd", "fwd+bwd"} and len({row.impl for row in suite.rows}) == 9


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_every_lora_agrees(harness: ModuleType, p: float) -> None:
    """Without dropout the gradients of all formulations are the same; what each keeps is counted."""
    pytest.importorskip("peft")
    import bench_lora

    torch.manual_seed(0)  # the peers' own masks, which the limit of a loose comparison allows at such a size
    suite, (M, K, N, r) = tiny(harness, only=("+",), peak=False), (120, 48, 16, 3)
    bench_lora.lora(suite, "small", M, K, N, r, p, torch.float32)
    names = ["ours", "frozen", "torch", "axolotl-way", "lorafusion-way", *["unsloth-way"] * (p == 0.0), "peft"]
    assert suite.failures == [] and [row.impl for row in suite.rows] == names * 2
    # The frozen layer gives another y, as it must.
    assert all(row.agrees or row.impl == "frozen" for row in suite.rows)
    kept = {(row.pass_, row.impl): row.kept_bytes for row in suite.rows}
    assert kept["fwd+bwd", "frozen"] == 0 and kept["fwd+dx", "ours"] is None
    assert kept["fwd+bwd", "ours"] == 4 * (M * K + M * r), "x and x A^T"
    assert kept["fwd+bwd", "lorafusion-way"] == 4 * (M * K + M * r) + M * K, "and the mask"
    if p > 0.0:
        assert kept["fwd+bwd", "peft"] > kept["fwd+bwd", "ours"] and kept["fwd+bwd", "axolotl-way"] > 4 * M * K
    else:
        assert kept["fwd+bwd", "unsloth-way"] == 4 * M * K


def test_every_group_of_lora_agrees(harness: ModuleType) -> None:
    pytest.importorskip("peft")
    import bench_lora

    torch.manual_seed(0)
    suite = tiny(harness, peak=False)
    bench_lora.lora_group(suite, "small", 120, 48, [16, 8], 3, 0.05, torch.float32)
    assert suite.failures == [] and all(row.agrees or row.impl == "frozen" for row in suite.rows)
    assert [row.impl for row in suite.rows] == ["ours", "frozen", "loop", "axolotl-way", "peft"] * 3
    assert suite.rows[-5].kept_bytes == 4 * (120 * 48 + 2 * 120 * 3)


def test_formulations_with_dropout_have_the_gradients_of_their_mask(harness: ModuleType) -> None:
    import lora_peers

    leaves = [torch.randn(n, m, dtype=torch.float64, requires_grad=True) for n, m in ((7, 6), (2, 6), (5, 2))]
    weight, dy, x, A, B = torch.randn(5, 6).double(), torch.randn(7, 5).double(), *leaves
    calls = lora_peers.formulations(weight, 1.5, 0.5)

    def scaled(name: str) -> torch.Tensor:
        torch.manual_seed(3)
        if name == "axolotl-way":
            return torch.nn.functional.dropout(x, 0.5)
        return x * torch.empty_like(x, dtype=torch.bool).bernoulli_(0.5) * 2

    for name in ("axolotl-way", "lorafusion-way"):
        want = x @ weight.T + 1.5 * scaled(name) @ A.T @ B.T
        torch.manual_seed(3)
        got = calls[name](x, A, B)
        torch.testing.assert_close(got, want)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, want)), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_every_ranking_agrees(harness: ModuleType) -> None:
    import bench_ranking

    suite = tiny(harness)
    seen, held_out = bench_ranking.synthetic(suite, 150, 400)
    bench_ranking.evaluation(suite, "small", seen, held_out, 400, 8)
    assert suite.failures == [] and all(row.agrees for row in suite.rows) and len(suite.rows) == 3


def test_every_propagation_agrees(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_propagate
    import machine

    monkeypatch.setattr(machine, "peak_bytes", lambda fn, device: 1)  # collects garbage each time
    monkeypatch.setattr(harness, "gather_rate", lambda table, device, quick: 1e9)
    config = dataclasses.replace(bench_propagate.CONFIG, batch_size=64, lr=0.1, l2=0.3)
    monkeypatch.setattr(bench_propagate, "CONFIG", config)
    suite = tiny(harness)
    case = bench_propagate.Case(suite, "toy", 8, lambda: bench_propagate.graphs.power_law(suite, 2000))
    case.propagation()
    case.bf16_storage()
    case.rows()
    case.step(config, "toy step")
    case.step(dataclasses.replace(config, storage_dtype="bfloat16"), "toy step bf16", 1e-2)
    case.layers()
    lacking = [failure for failure in suite.failures if "torch_geometric, which is not installed" not in failure]
    assert lacking == [] and all(row.agrees for row in suite.rows), suite.rows
    assert {"ours", "naive", "torch_csr", "torch_csr_int32", "embedding_bag", "scipy_csr"} <= {
        row.impl for row in suite.rows if row.pass_ == "fwd"
    }
    assert {row.case for row in suite.rows} >= {
        "toy D=8 K=3",
        "toy D=8 K=3 bf16 storage",
        "toy D=8 K=3 rows of a batch",
    }
    assert {row.impl for row in suite.rows if row.pass_ == "step"} == {"ours", "ours_untrimmed", "naive", "torch_csr"}
    assert {row.case for row in suite.rows if row.case.endswith("K=6")} == {"toy D=8 K=6"}


def test_nothing_is_built_for_a_case_that_is_left_out(harness: ModuleType) -> None:
    import bench_propagate

    suite = tiny(harness, only=("elsewhere",))
    case = bench_propagate.Case(suite, "toy", 8, lambda: pytest.fail("the graph was loaded"))
    case.propagation()
    case.bf16_storage()
    case.rows()
    case.step(bench_propagate.CONFIG, "toy step")
    case.layers()
    assert suite.rows == [] and suite.failures == []


def test_graphs(harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import graphs

    suite = tiny(harness)
    graph = graphs.load(suite, "power-law 50k")
    assert graph.num_users == 2000 and graph.num_items == 1250 and 45_000 < graph.num_edges < 50_000
    degree = graph.crow.diff()
    assert 0.1 < int(degree[2000:].max()) / 2000 < 0.3 and int(degree[:2000].max()) < 60
    assert torch.equal(graphs.load(tiny(harness), "power-law 50k").col, graph.col)
    monkeypatch.setattr(graphs, "DATA", tmp_path)
    assert graphs.available(suite, ["gowalla", "power-law 1M"]) == ["power-law 1M"]
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    assert graphs.available(suite, ["ml-1m"]) == []
    assert suite.failures == ["gowalla: no gowalla-lightgcn/train.parquet", "ml-1m: needs pyarrow"]


def test_a_peer_that_is_not_installed_is_named(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_propagate
    import propagate_peers

    monkeypatch.setattr(propagate_peers.importlib.util, "find_spec", lambda name: None)
    suite = tiny(harness)
    case = bench_propagate.Case(suite, "toy", 8, lambda: bench_propagate.graphs.power_law(suite, 500))
    assert "pyg_lgconv" not in case.others
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    assert case.scipy() == {}
    pyg, scipy = suite.failures
    assert pyg == "toy D=8 pyg_lgconv: needs torch_geometric, which is not installed" and "scipy_csr: import" in scipy
    monkeypatch.setattr(bench_propagate, "LARGE", 100)
    case = bench_propagate.Case(suite, "big", 8, lambda: bench_propagate.graphs.power_law(suite, 500))
    assert set(case.others) == {"naive", "torch_csr", "embedding_bag"} and "big D=8: 0.0 GiB of" in suite.failures[2]


class FakeCusparse:
    """cuSPARSE's functions as far as the benchmark calls them, on host pointers; refuses CSR_ALG1."""

    def __init__(self) -> None:
        self.objects: dict[int, list[Any]] = {}
        self.prepared: tuple[int, int] | None = None
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cusparse"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return getattr(self, f"call_{name.removeprefix('cusparse')}", lambda *a: 0)(*arguments)

        return call

    def cusparseGetErrorString(self, status: int) -> bytes:  # noqa: N802
        return {3: b"invalid value", 10: b"operation not supported"}[status]

    def made(self, out: Any, *content: Any) -> int:
        out._obj.value = len(self.objects) + 1
        self.objects[out._obj.value] = list(content)
        return 0

    call_Create = call_CreateCsr = call_CreateDnMat = made  # noqa: N815

    def call_DnMatSetValues(self, matrix: Any, pointer: int) -> int:  # noqa: N802
        self.objects[matrix.value][3] = pointer
        return 0

    def call_SpMM_bufferSize(self, *arguments: Any) -> int:  # noqa: N802
        arguments[-1]._obj.value = 256
        return 10 if arguments[9] == 4 else 0

    def call_SpMM_preprocess(self, *arguments: Any) -> int:  # noqa: N802
        self.prepared = arguments[9], arguments[10]
        return 0

    def call_SpMM(self, *arguments: Any) -> int:  # noqa: N802
        handle, op_a, op_b, alpha, matrix, table, beta, result, compute, algorithm, workspace = arguments
        if self.prepared != (algorithm, workspace) or (op_a, op_b, compute) != (0, 0, 0) or self.objects[handle.value]:
            return 3
        assert alpha._obj.value == 1.0 and beta._obj.value == 0.0
        rows, cols, nnz, crow, col, val, *kinds = self.objects[matrix.value]
        assert kinds[:3] == [2, 2, 0]
        dtype = {0: torch.float32, 14: torch.bfloat16}[kinds[3]]
        matrix = torch.sparse_csr_tensor(
            host(crow, (rows + 1,), torch.int32),
            host(col, (nnz,), torch.int32),
            host(val, (nnz,), dtype).float(),
            (rows, cols),
        )
        _, D, stride, into, *dense = self.objects[result.value]
        assert stride == D and dense == [kinds[3], 2]
        product = matrix @ host(self.objects[table.value][3], (cols, D), dtype).float()
        host(into, (rows, D), dtype).copy_(product)
        return 0


def host(pointer: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that lies at an address."""
    count = math.prod(shape)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_cusparse_multiplies_and_frees(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    import cusparse
    import propagate_peers as peers
    from graphs import power_law

    fake = FakeCusparse()
    monkeypatch.setattr(cusparse, "library", lambda: fake)
    monkeypatch.setattr(cusparse, "_stream", lambda device: 7)
    suite = tiny(harness)
    graph, device = power_law(suite, 500), torch.device("cpu")
    x = suite.tensor(graph.num_nodes, 8).requires_grad_()
    layer = cusparse.CachedCsr(graph, 8, dtype, device)
    del layer
    assert fake.calls[-4:] == ["cusparseDestroyDnMat"] * 2 + ["cusparseDestroySpMat", "cusparseDestroy"]
    layer = cusparse.CachedCsr(graph, 8, dtype, device)
    assert layer.algorithm in ("CSR_ALG2", "CSR_ALG3")
    out = peers.self_adjoint(layer.multiply, 2)(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert harness.distance([out], [peers.exact(graph, 2, x.detach())]) < limit
    assert harness.distance([grad], [peers.exact(graph, 2, torch.ones_like(out))]) < limit
    with pytest.raises(ValueError, match=r"cusparse: expected x of shape \[\d+, 8\] on cpu, got \[3, 8\]"):
        layer.multiply(torch.zeros(3, 8))
    fake.prepared = None
    with pytest.raises(RuntimeError, match=r"expected status 0 of cusparseSpMM, got 3 \(invalid value\)"):
        layer.multiply(x.detach())
    with pytest.raises(RuntimeError, match="to serve .* got CSR_ALG1: .* got 10 .*; CSR_ALG2: .* got 3 "):
        fake.call_SpMM_preprocess = lambda *arguments: 0
        cusparse.CachedCsr(graph, 8, dtype, device)


def test_cusparse_names_what_it_lacks(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_propagate
    import cusparse

    def missing(name: str) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(cusparse.ctypes, "CDLL", missing)
    suite = tiny(harness)
    case = bench_propagate.Case(suite, "toy", 8, lambda: bench_propagate.graphs.power_law(suite, 500))
    found: dict[str, Any] = {}
    case.add(found, "cusparse", lambda: case.cusparse(torch.float32))
    expected = "toy D=8 cusparse: cusparse: expected libcusparse.so.12 on the library path, got no such file"
    assert found == {} and suite.failures == [expected]


@requires("cuda")
def test_samples_and_peak_on_cuda(harness: ModuleType) -> None:
    import machine

    suite = tiny(harness, device="cuda", flush_l2=True)
    doubling(suite)
    assert all(row.median_s > 0 and row.peak_bytes >= 256 for row in suite.rows[:2])
    assert machine.description(torch.device("cuda"))["device"] == torch.cuda.get_device_name()
    assert set(harness.measure_ceilings(torch.device("cuda"), quick=True)) == set(CEILINGS)


# --- compare -----------------------------------------------------------------------------------------------------
def result(*rows: tuple[str, str, float], **more: Any) -> dict[str, Any]:
    return {
        "device": "a",
        "cpu": "b",
        "simd": "c",
        "commit": "d",
        "rows": [
            {"case": case, "impl": impl, "pass": "fwd", "dtype": "float32", "threads": 1, "median_s": seconds}
            for case, impl, seconds in rows
        ],
        **more,
    }


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_compare_prints_ratios(written: Any) -> None:
    old = written("old.json", result(("x", "ours", 1.0), ("x", "peer", 1.0), ("gone", "ours", 1.0)))
    new = written("new.json", result(("x", "ours", 1.04), ("x", "peer", 9.0), ("added", "ours", 1.0), device="z"))
    text, worse = compare(old, new, 0.05)
    assert not worse and "1.040x" in text and "9.000x" in text
    assert "only in the old file" in text and "gone fwd float32 x1 ours" in text and "added fwd float32 x1 ours" in text
    assert "another device: a -> z" in text and text.endswith("rows of ours beyond the allowed loss: none")
    text, worse = compare(old, new, 0.03)
    assert worse and "slower than allowed (1.03x)" in text and text.endswith("yes")


def test_compare_judges_peers_only_without_ours_and_wrong_outputs_always(written: Any) -> None:
    old = written("old.json", result(("x", "naive", 1.0)))
    assert compare(old, written("new.json", result(("x", "naive", 2.0))), 0.5)[1]
    fast = result(("x", "ours", 0.1))
    fast["rows"][0]["agrees"] = False
    text, worse = compare(written("old.json", result(("x", "ours", 1.0))), written("new.json", fast), 0.5)
    assert worse and "wrong output" in text


def test_compare_errors(written: Any, tmp_path: Path) -> None:
    good = written("good.json", result(("x", "ours", 1.0)))
    broken = result(("x", "ours", 1.0))
    del broken["rows"][0]["dtype"]
    for content, message in (
        ("{", "expected JSON in"),
        ([1], "expected an object with rows in"),
        ({"rows": 3}, "expected an object with rows in"),
        (broken, "expected dtype in row 0 of"),
        ({"rows": [4]}, "expected case, pass, dtype, impl, threads, median_s in row 0"),
        (result(("x", "ours", 0.0)), "expected a median_s above 0 in row 0"),
        (result(("x", "ours", 1.0), ("x", "ours", 2.0)), "expected each row once in"),
        (result(("y", "ours", 1.0)), "expected rows in common, got none"),
    ):
        with pytest.raises(ValueError, match="bench compare: " + message):
            compare(good, written("bad.json", content), 0.1)
    with pytest.raises(ValueError, match="which does not exist"):
        compare(good, tmp_path / "none.json", 0.1)
    with pytest.raises(ValueError, match="max_loss of at least 0, got -1"):
        compare(good, good, -1)


def test_compare_command(written: Any, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = written("old.json", result(("x", "ours", 1.0))), written("new.json", result(("x", "ours", 1.2)))
    assert run_bench(["compare", str(old), str(new)]) == 1 and "1.200x" in capsys.readouterr().out
    assert run_bench(["compare", str(old), str(new), "--max-loss", "0.3"]) == 0
    with pytest.raises(ValueError, match=r"^bench compare: the following arguments are required: new$"):
        run_bench(["compare", str(old)])
    assert capsys.readouterr().err == ""


# --- the GPU suite -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected the folder for the results, got nothing"),
        (["--fast"], "got --fast"),
        (
            ["out", "everything"],
            "expected a step of native tests triton sanitizer tune bench growth distributed gowalla, got everything",
        ),
    ],
)
def test_the_gpu_suite_names_a_bad_call(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = ["bash", str(FOLDER / "gpu_suite.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


def test_the_gpu_suite_rehearses_steps(tmp_path: Path) -> None:
    command = ["bash", str(FOLDER / "gpu_suite.sh"), str(tmp_path), "--rehearse", "sanitizer", "tune"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert "ok      sanitizer" in summary and "ok      tune" in summary


def test_options_are_frozen(harness: ModuleType) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        harness.Options().threads = 2

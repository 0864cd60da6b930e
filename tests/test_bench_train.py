"""The training benchmark on a tiny random model: equal results, floors, summaries. Nothing here asserts a time."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, requires
from flex_on_cpu import flex_attention  # noqa: F401  (a fixture)
from small_run import save_llm, write_ratings

from collm_fast.config import PrepareConfig
from collm_fast.data.packing import pack
from collm_fast.data.prepare import prepare

FOLDER = ROOT / "benchmarks"
# A file without ceilings has no floors; these are round numbers.
CEILINGS = {
    "copy_bytes_per_s": {"1000000": 1e9},
    "gemm_flops_per_s": {"float32": 1e11, "bfloat16": 2e11},
    "table_bytes_per_s": {},
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """`bench_train` with the scripts' folder on the path, as when it is run; nothing pins this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import bench_train as module
    import machine

    monkeypatch.setattr(machine, "pin", lambda threads: None)
    monkeypatch.setattr(machine, "peak_bytes", lambda fn, device: 1 << 20)
    # With all modules of the other tests in the process, collections would take half of the time.
    monkeypatch.setattr(module.gc, "collect", lambda: 0)
    monkeypatch.setattr(module.gc, "freeze", lambda: None)
    monkeypatch.setattr(module.harness, "measure_ceilings", lambda device, quick: dict(CEILINGS))
    monkeypatch.setattr(module, "CANDIDATES", 40)
    yield module
    for name, loaded in list(sys.modules.items()):
        if Path(getattr(loaded, "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


def run(bench: ModuleType, *arguments: str) -> int:
    command = ["--quick", "--device", "cpu", "--rounds", "1", "--seconds", "0.001", *arguments]
    code: int = bench.harness.main(bench.cases, "", command, add=bench.add_options, finish=bench.finish)
    return code


def test_every_case_gives_what_the_naive_way_gives(bench: ModuleType, tmp_path: Path) -> None:
    file, plot = tmp_path / "train.json", tmp_path / "train.png"
    options = ["--dtype", "float32", "--steps", "1", "--memory-steps", "20", "--rank-rows", "10"]
    assert run(bench, *options, "--json", str(file), "--plot", str(plot)) == 0
    result = json.loads(file.read_text())
    assert {row["impl"] for row in result["rows"]} >= {"ours", "naive", "generic"}
    found = {(row["case"], row["pass"]) for row in result["rows"]}
    assert found == {
        *((name, "step") for name in bench.STEPS),
        ("eval", "eval"),
        ("eval-warm", "eval"),
        ("rank-40", "rank"),
    }
    for row in result["rows"]:
        assert row["agrees"] and row["error"] < 1e-5 and row["floor_s"] > 0, row
    steps = result["data"]["stage2-grouped"]
    assert steps["samples"] == 16 and steps["tree_tokens"] < steps["tokens"]
    assert result["data"]["rank-40"]["samples_timed_of_peers"] == 10
    assert len(result["summary"]) == len(result["rows"])
    assert all(entry["ours_over_it"] > 0 and 0 < entry["floor_fraction"] for entry in result["summary"])
    memory = result["data"]["memory"]
    assert len(memory["bytes"]) == len(memory["peak_bytes"]) == 2 and memory["growth_bytes"] is None
    assert all(peak >= now > 0 for now, peak in zip(memory["bytes"], memory["peak_bytes"], strict=True))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bfloat16_is_held_to_the_naive_ways_own_error(bench: ModuleType, tmp_path: Path) -> None:
    options = ["--dtype", "bfloat16", "--steps", "1", "--only", "stage2-grouped", "--only", "eval-warm"]
    assert run(bench, *options, "--json", str(tmp_path / "a.json")) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"stage2-grouped", "eval-warm"}
    assert all(0 < row["error"] < 0.1 and row["agrees"] for row in rows)


def test_another_result_has_no_ratio_and_ours_ends_the_run(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, options = tmp_path / "a.json", ["--dtype", "float32", "--only", "stage1-grouped", "--json"]
    right = bench.peers.generic_logits
    monkeypatch.setattr(bench.peers, "generic_logits", lambda *inputs: lambda rows: right(*inputs)(rows) * 1.001)
    assert run(bench, *options, str(file)) == 0
    ratio = {entry["impl"]: entry["ours_over_it"] for entry in json.loads(file.read_text())["summary"]}
    assert ratio["generic"] is None and ratio["naive"] > 0
    theirs = bench.peers.ours_logits
    monkeypatch.setattr(bench.peers, "ours_logits", lambda *inputs: lambda rows: theirs(*inputs)(rows) * 1.001)
    assert run(bench, *options, str(file)) == 1
    assert all(entry["ours_over_it"] is None for entry in json.loads(file.read_text())["summary"])


def test_a_warm_case_finds_every_prefix(bench: ModuleType) -> None:
    suite = bench.harness.Suite(bench.harness.Options(quick=True, more=MORE), dict(CEILINGS))
    whole = bench.Bench(suite)
    prompts = whole.rows.prompts["train", 2]
    hybrid = bench.peers.ours(whole.adapted("ours", 2, torch.float32), kv_cache_gb=bench.CACHE_GB)
    rows = bench.batches(prompts, order="group", batch_size=16)[0]
    call = bench.train_steps.steps(
        bench.peers.ours_logits(hybrid, prompts), list(hybrid.mapper.parameters()), [rows], prompts
    )
    call()
    cache = hybrid.prefixes
    saved, met = cache.tokens_saved, cache.tokens_met
    assert saved == 0 < met
    call()
    assert cache.tokens_saved == met and cache.tokens_met == 2 * met


MORE: dict[str, Any] = {
    "llm": "tiny",
    "data": None,
    "dtype": ["float32"],
    "plot": None,
    "steps": 1,
    "eval_rows": 16,
    "rank_rows": None,
    "memory_steps": None,
}


def test_prompts_of_a_dataset(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CANDIDATES", 12)
    prepare(PrepareConfig(source="table", input=write_ratings(tmp_path / "ratings.csv"), out=tmp_path / "data"))
    places = ["--data", str(tmp_path / "data"), "--llm", str(save_llm(tmp_path / "llm"))]
    options = ["--dtype", "float32", "--only", "rank-12 rank float32", "--only", "stage2-warm", "--steps", "1"]
    assert run(bench, *places, *options, "--json", str(tmp_path / "a.json")) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert (
        list(dict.fromkeys(row["case"] for row in result["rows"])) == ["stage2-warm", "rank-12"]
        and "eval" not in result["data"]
    )
    assert result["data"]["train"]["file"] == "train.parquet" and result["data"]["rank-12"]["samples"] == 12
    with pytest.raises(ValueError, match="expected a full history and over 5000 items"):
        bench.train_rows.of_dataset(tmp_path / "data", str(tmp_path / "llm"), 5000)


def test_prefix_grouper_is_named_where_it_is_not_installed(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prefix_grouper", None)
    assert run(bench, "--dtype", "float32", "--only", "eval eval", "--json", str(tmp_path / "a.json")) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert [row["impl"] for row in result["rows"]] == ["ours", "naive", "generic"]
    assert result["failures"] == ["eval prefix-grouper: not installed (pip install prefix-grouper)"]


def test_flops_of_a_layer_are_those_that_torch_counts(bench: ModuleType) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    begin = bench.train_llm.start(4, 4, 64, (5, 6), torch.device("cpu"))
    prompts = bench.train_rows.synthetic(512, 6, 3, short=True).prompts["train", 1]
    counted = []
    for depth in (1, 2):
        family, sizes = bench.train_llm.SHAPES["tiny"]
        bench.train_llm.SHAPES["deep"] = family, sizes | {"num_hidden_layers": depth}
        base = bench.train_llm.random_llm("deep", torch.float32, "cpu")
        adapted = bench.train_llm.with_our_layers(base, begin, 1)
        peer = bench.train_llm.with_peft(base, begin, adapted, 1)
        peer.llm.get_base_model().set_attn_implementation("eager")  # torch counts no fused attention on a CPU
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            bench.peers.generic_logits(peer, prompts)(np.array([0]))
        counted.append(counter.get_total_flops())
    T = int(prompts.offsets[1])
    layer = bench.train_rows.Layer.of(base.config)
    ours = T * (layer.q + layer.kv + layer.rest + layer.lora_q + layer.lora_v) + T * T * layer.attend
    assert counted[1] - counted[0] == ours


@pytest.mark.parametrize("stage", [1, 2])
def test_the_floor_by_hand(bench: ModuleType, stage: int) -> None:
    """Token by token over the mask: what is seen, what has a gradient."""
    prompts = bench.train_rows.synthetic(512, 20, 3, short=True).prompts["train", stage]
    config = bench.train_llm.random_llm("tiny", torch.float32, "meta").config
    batch = pack(prompts, np.arange(12))
    mask, injected = batch.mask().numpy(), batch.row_index.numpy() >= 0
    T, B, H = len(injected), 12, config.hidden_size
    behind = (mask & injected[None, :]).any(1)
    np.testing.assert_array_equal(bench.train_rows.behind_injected(batch), behind)
    layer, depth, answer = bench.train_rows.Layer.of(config), config.num_hidden_layers, batch.answer.numpy()
    lora = layer.lora_q + layer.lora_v
    mapper = 2.0 * len(batch.slot_id) * 10 * bench.train_llm.D * (bench.train_llm.D + H)

    def forward(run: np.ndarray) -> float:
        each = layer.q + layer.kv + layer.rest + lora + layer.attend * mask.sum(1)
        last = layer.q + layer.rest + layer.lora_q + layer.attend * mask.sum(1) + 4.0 * H
        everywhere = (depth - 1) * each[run].sum() + run.sum() * (layer.kv + layer.lora_v)
        return float(everywhere + last[answer].sum() + mapper)

    everything = np.ones(T, np.bool_)
    count = bench.train_rows.flops
    assert count(config, batch, "eval", stage=stage, warm=False) == pytest.approx(forward(everything))
    assert count(config, batch, "eval", stage=2, warm=True) == pytest.approx(forward(behind))

    graph = behind if stage == 2 else everything
    attend = layer.attend * (mask.sum(1) + (mask & graph[None, :]).sum(1))
    linear = layer.q + layer.kv + layer.rest + lora
    backward = (depth - 1) * (linear + attend)[graph].sum() + graph.sum() * (layer.kv + layer.lora_v)
    backward += (layer.q + layer.rest + layer.lora_q + attend)[answer].sum() + 2 * mapper
    first = layer.q + layer.kv
    if stage == 1:  # dA and dB as much as A and B forward; layer 0 needs no dX, so neither dh A
        backward += depth * T * layer.lora_v + ((depth - 1) * T + B) * layer.lora_q
        backward -= T * (first + 2 * 2.0 * 8 * H)
    else:
        backward -= (graph & ~injected).sum() * (first + lora)
    whole = forward(everything) + backward
    assert count(config, batch, "step", stage=stage, warm=False) == pytest.approx(whole)


def test_what_all_prompts_begin_with_counts_once(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = bench.train_rows.synthetic(512, 20, 3, short=True).prompts["train", 2]
    ids = prompts.token_ids.copy()
    for place in range(3):
        ids[prompts.offsets[:-1] + place] = 7 + place
    batch = pack(dataclasses.replace(prompts, token_ids=ids), np.arange(12))
    once = ~bench.train_rows.repeated_opening(batch)
    tree, position = batch.tree.numpy(), batch.position_ids.numpy()
    np.testing.assert_array_equal(~once, (tree > 0) & (batch.branch.numpy() < 0) & (position < 3))
    assert not bench.train_rows.repeated_opening(pack(prompts, np.arange(12))).any()
    config = bench.train_llm.random_llm("tiny", torch.float32, "meta").config
    layer, depth = bench.train_rows.Layer.of(config), config.num_hidden_layers
    each = layer.q + layer.kv + layer.rest + layer.lora_q + layer.lora_v + layer.attend * (position[~once] + 1)
    saved = (depth - 1) * each.sum() + (~once).sum() * (layer.kv + layer.lora_v)
    count = bench.train_rows.flops
    scores = [count(config, batch, "eval", stage=2, warm=False)]
    steps = [count(config, batch, "step", stage=1, warm=False)]
    monkeypatch.setattr(bench.train_rows, "repeated_opening", lambda batch: np.zeros_like(once))
    scores.append(count(config, batch, "eval", stage=2, warm=False))
    steps.append(count(config, batch, "step", stage=1, warm=False))
    assert scores[1] - scores[0] == pytest.approx(saved) and saved > 0
    assert steps[1] - steps[0] > 1.5 * saved, "and backward"


@pytest.mark.parametrize(
    ("shape", "millions"),
    [("smollm2-135m", 134.5), ("qwen3-0.6b", 596.0), ("qwen2-1.5b", 1543.7), ("llama-7b", 6738.4)],
)
def test_shapes_with_random_weights(bench: ModuleType, shape: str, millions: float) -> None:
    model = bench.train_llm.random_llm(shape, torch.bfloat16, "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    begin = bench.train_llm.start(3, 3, model.config.hidden_size, (5, 6), torch.device("cpu"))
    layers = bench.train_llm.SHAPES[shape][1]["num_hidden_layers"]
    ours = bench.train_llm.with_our_layers(model, begin, 1)
    peft = bench.train_llm.with_peft(model, begin, ours, 1)
    for adapted in (ours, peft):
        assert len(adapted.parameters) == 4 * layers and all(p.requires_grad for p in adapted.parameters)
    assert [p.shape for p in ours.lora] == [p.shape for p in peft.lora]
    assert bench.train_rows.Layer.of(model.config).rest > 0


@pytest.mark.usefixtures("flex_attention")
@pytest.mark.parametrize("stage", [1, 2])
def test_captured_steps_give_what_steps_give(bench: ModuleType, stage: int) -> None:
    """In turn over the same parameters, as the benchmark runs them."""
    prompts = bench.train_rows.synthetic(512, 60, 3, short=True).prompts["train", stage]
    base = bench.train_llm.random_llm("tiny", torch.float32, "cpu")
    begin = bench.train_llm.start(60, 60, base.config.hidden_size, (5, 6), torch.device("cpu"))
    model = bench.train_llm.with_our_layers(base, begin, stage)
    plan = [np.arange(8), np.arange(8, 16)]
    capture = SimpleNamespace(first=lambda run: run(), record=lambda run: run)
    graphs = bench.StepGraphs(bench.peers.ours(model), model.parameters, capture)
    logits = bench.peers.ours_logits(bench.peers.ours(model), prompts)
    captured = bench.train_steps.graph_steps(graphs, model.parameters, plan, prompts)
    usual = bench.train_steps.steps(logits, model.parameters, plan, prompts)
    for _ in range(3):
        for got, want in zip(captured(), usual(), strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()
    assert graphs.captured >= 1


def test_copies_share_their_weights(bench: ModuleType) -> None:
    base = bench.train_llm.random_llm("tiny", torch.float32, "cpu")
    copied = bench.train_llm.sharing_copy(base)
    assert copied.model.layers[0] is not base.model.layers[0] and copied.config is not base.config
    for ours, theirs in zip(copied.parameters(), base.parameters(), strict=True):
        assert ours is theirs


def test_typical_batches_are_the_nearest_to_the_mean(bench: ModuleType) -> None:
    prompts = bench.train_rows.synthetic(512, 200, 3, short=True).prompts["train", 2]
    plan = bench.batches(prompts, order="group", batch_size=16, generator=np.random.default_rng(0))
    chosen = bench.train_steps.typical(prompts, plan, 3, 16)
    assert len(chosen) == 3 and all(len(rows) == 16 for rows in chosen)
    trees = [len(pack(prompts, rows).token_ids) for rows in plan]
    mean = np.mean([size for size, rows in zip(trees, plan, strict=True) if len(rows) == 16])
    gaps = sorted(abs(size / mean - 1) for size in trees)
    assert max(abs(len(pack(prompts, rows).token_ids) / mean - 1) for rows in chosen) < gaps[len(gaps) // 2]


def test_typical_groups_are_whole(bench: ModuleType) -> None:
    prompts = bench.train_rows.synthetic(512, 60, 3, short=True).prompts["test", 2]
    rows = bench.train_steps.typical_groups(prompts, 30)
    assert 30 <= len(rows) < 30 + np.bincount(prompts.group).max() and (np.diff(rows) > 0).all()
    chosen = np.isin(prompts.group, prompts.group[rows])
    np.testing.assert_array_equal(np.flatnonzero(chosen), rows)


def test_memory_growth_is_counted_from_the_fiftieth_step(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, device = bench.train_memory.watch, torch.device("cpu")
    seen, peaks = [100, 200, 300, 400, 500, 530, 560, 590], [900, 200, 300, 400, 600, 800, 700, 600]
    read = iter(zip(seen, peaks, strict=True))
    monkeypatch.setattr(bench.train_memory, "_memory", lambda device: next(read))
    ran: list[int] = []
    found = watch(ran.append, 80, device)
    assert ran == list(range(80)) and found["bytes"] == seen and found["peak_bytes"] == peaks
    assert found["growth_bytes"] == 90 and found["growth_bytes_per_step"] == pytest.approx(3.0)
    assert found["halves_peak_bytes"] == [800, 700]
    assert "+0.00 KiB a step; highest in each half 0 and 0 MiB" in bench.train_report.memory_line(found)


@requires("peak")
def test_the_peak_of_a_step_is_seen_after_it(bench: ModuleType) -> None:
    seen = bench.train_memory.watch(lambda number: torch.ones((number // 10) << 26).numel(), 20, torch.device("cpu"))
    assert seen["peak_bytes"][1] - seen["bytes"][1] > 200 << 20  # 256 MiB of ones in each of the last ten steps
    assert seen["bytes"][1] - seen["bytes"][0] < 100 << 20 and seen["bytes"][0] > 10 << 20


def test_scaled_times(bench: ModuleType) -> None:
    row = bench.Row("a", "naive", "rank", "float32", 1, 2.0, 1.0, 3.0, 2.5, 7, 0.1, 0.0, True)
    bench.scale_times(row, 1.0)
    assert row.over_ours is None
    row.over_ours = 1.5
    bench.scale_times(row, 4.0)
    assert row.over_ours == 6.0
    assert (row.median_s, row.p20_s, row.p80_s, row.cpu_s, row.peak_bytes, row.floor_s) == (
        8.0,
        4.0,
        12.0,
        10.0,
        7,
        0.1,
    )

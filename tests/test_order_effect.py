"""The benchmark of what the order of training does to accuracy, on a small world."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import ROOT
from small_run import write_world

from collm_fast.config import CFConfig
from collm_fast.data.dataset import load_dataset
from collm_fast.training.cf import fit_cf


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import order_effect

    return order_effect


def test_a_run_trains_in_the_order_and_is_found_again(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path, monkeypatch)
    places = {"data": tmp_path / "data", "llm": tmp_path / "llm", "out": tmp_path}
    fitted = CFConfig(model="mf", dim=4, max_epochs=2, bias=True, held_out=bench.HELD_OUT)
    fit_cf(load_dataset(places["data"]), fitted, out=tmp_path / "cf")
    arguments = Namespace(**places, prompts=16, stage="cie")
    row = bench.run_one(arguments, "group:2", 1)
    assert row["order"] == "group:2" and row["seed"] == 1 and "stage1_auc" not in row
    assert 0 <= row["stage2_auc"] <= 1 and 0 <= row["stage2_uauc"] <= 1
    config = yaml.safe_load((tmp_path / "group2-1" / "config.yaml").read_text())
    assert config["order"] == "group" and config["group_rows"] == 2
    assert bench.run_one(arguments, "group:2", 1) == row


def test_the_table_compares_within_a_seed(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_dataset", lambda folder: Namespace(fingerprint="of the data"))
    (tmp_path / "cf").mkdir()
    (tmp_path / "cf" / "cf.safetensors").touch()
    seen: list[tuple[str, int]] = []

    def run(arguments: Namespace, order: str, seed: int) -> dict[str, Any]:
        seen.append((order, seed))
        return {"order": order, "seed": seed, "stage2_auc": 0.6 + 0.1 * seed * (order == "group"), "stage2_uauc": 0.5}

    monkeypatch.setattr(bench, "run_one", run)
    command = ["order_effect", "--data", tmp_path / "data", "--out", tmp_path, "--results", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--stage", "cie", "--seeds", "1", "2", "--name", "found"])
    bench.main()
    assert seen == [("group", 1), ("random", 1), ("group", 2), ("random", 2)]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["stage"] == "cie" and len(found["rows"]) == 4
    text = (tmp_path / "found.md").read_text()
    assert "| order | seed | stage 2 AUC | stage 2 UAUC |\n|---|---|---|---|\n" in text
    assert "| group - random | mean ± standard error | +0.150 ± 0.050 | +0.000 ± 0.000 |" in text
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--seeds", "1"])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 2

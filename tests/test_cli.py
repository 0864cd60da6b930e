"""A whole run through the command line, in process: every command, its files and numbers, its one-line errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import QUICK, save_llm, write_ratings

import collm_fast
from collm_fast import bench
from collm_fast.cli import main
from collm_fast.io.tables import read_table, write_table

METRICS = {
    "auc",
    "auc_low",
    "auc_high",
    "uauc",
    "uauc_low",
    "uauc_high",
    "users_counted",
    "ndcg",
    "log_loss",
    "rows",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with ratings, dataset, model and one finished run, `run`, that tests read and do not change."""
    folder = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    write_ratings(folder / "ratings.csv")
    save_llm(folder / "llm")
    assert (
        main(["prepare", "--source", "table", "--input", str(folder / "ratings.csv"), "--out", str(folder / "data")])
        == 0
    )
    assert main(train(folder, folder / "run")) == 0
    yield folder
    patch.undo()


def train(folder, out, *more):
    places = ["--data", str(folder / "data"), "--llm", str(folder / "llm"), "--cf", "mf", "--out", str(out)]
    return ["train", *places, *QUICK, *more]


def error_of(capsys, arguments):
    """The one line on stderr of a command that must exit with 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("collm-fast: "), lines
    return lines[0]


def test_a_run_folder_holds_what_it_should(world):
    run = world / "run"
    for name in ("config.yaml", "metrics.json", "run.json", "mapper.safetensors", "cf.safetensors", "report.html"):
        assert (run / name).is_file(), name
    for name in ("report.md", "loss.png", "validation.png", "roc.png", "calibration.png", "interactions.png"):
        assert (run / name).is_file(), name
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for row in ("stage1", "stage2"):
        assert list((run / "events" / row).glob("events.out.tfevents*"))
        assert 1 <= len(list((run / "checkpoints" / row).iterdir())) <= 2
    assert not [path for path in run.rglob(".*")], "temporary files"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["limit_train"] == 32 and config["stage1"]["batch_size"] == 8
    assert "collm-fast train --data" in (run / "report.md").read_text()


def test_metrics_have_every_row_split_and_part(world):
    metrics = json.loads((world / "run" / "metrics.json").read_text())
    assert list(metrics) == ["item_mean", "item_user_mean", "cf", "stage1", "stage2"]
    for row, splits in metrics.items():
        assert set(splits) == {"valid", "test"}
        for parts in splits.values():
            assert set(parts) == {"all", "warm", "cold"}
            assert all(set(numbers) == METRICS for numbers in parts.values())
        test = splits["test"]["all"]
        assert test["rows"] >= 40 and 0 <= test["auc_low"] <= test["auc"] <= test["auc_high"] <= 1
        assert test["log_loss"] > 0, row
    assert "NaN" not in (world / "run" / "metrics.json").read_text()


def test_predictions_give_the_metrics(world):
    table = read_table(world / "run" / "predictions" / "test.parquet", ["uid"], "t")
    metrics = json.loads((world / "run" / "metrics.json").read_text())
    for row in metrics:
        value = collm_fast.metrics.auc(table[f"score:{row}"], table["label"]).value
        assert value == pytest.approx(metrics[row]["test"]["all"]["auc"], abs=1e-12)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, tmp_path):
    assert main(train(world, tmp_path / "again")) == 0
    for name in ("metrics.json", "history.json", "report.html"):
        first = (world / "run" / name).read_text()
        again = (tmp_path / "again" / name).read_text()
        assert name == "report.html" or first == again
    for name in ("mapper.safetensors", "cf.safetensors", "adapter/adapter_model.safetensors"):
        first, again = load_file(world / "run" / name), load_file(tmp_path / "again" / name)
        assert all(torch.equal(first[key], again[key]) for key in first)
    assert main(train(world, tmp_path / "other", "--seed", "1")) == 0
    assert (tmp_path / "other" / "metrics.json").read_text() != (world / "run" / "metrics.json").read_text()


def test_the_adapter_gives_stock_peft_the_same_scores(world):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = collm_fast.open_run(world / "run")
    test = run.dataset.splits["test"].take(np.arange(6))
    ours = run.logits(test, "stage1")
    base = run._base
    prompts = base.prompts("stage1", test, run.dataset, run.config, cache=False)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "llm"), world / "run" / "adapter")
    yes, no = base.answers["stage1"]
    for row in range(len(test)):
        tokens = prompts.token_ids[prompts.offsets[row] : prompts.offsets[row + 1]]
        with torch.no_grad():
            logits = stock(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, -1]
        assert float(logits[yes] - logits[no]) == pytest.approx(float(ours[row]), abs=1e-4)


def test_evaluate_repeats_the_numbers(world, tmp_path):
    assert main(["evaluate", "--run", str(world / "run"), "--split", "test", "--out", str(tmp_path / "e.json")]) == 0
    again = json.loads((tmp_path / "e.json").read_text())
    metrics = json.loads((world / "run" / "metrics.json").read_text())
    assert again == {row: {"test": splits["test"]} for row, splits in metrics.items()}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predict_scores_pairs_as_the_api_does(world, tmp_path, suffix):
    pairs = tmp_path / f"pairs{suffix}"
    write_table(pairs, {"user": ["u3", "u1", "u3"], "item": [105, 101, 100]})
    assert (
        main(["predict", "--run", str(world / "run"), "--pairs", str(pairs), "--out", str(tmp_path / "o.parquet")]) == 0
    )
    table = pq.read_table(tmp_path / "o.parquet").to_pydict()
    assert list(table) == ["user", "item", "score"] and table["user"] == ["u3", "u1", "u3"]
    score = collm_fast.open_run(world / "run").score(["u3", "u1", "u3"], [105, 101, 100])
    assert score.dtype == np.float32 and ((score > 0) & (score < 1)).all()
    assert np.allclose(score, table["score"], atol=1e-6)


def test_rank_lists_the_best_first(world, tmp_path):
    out = tmp_path / "r.parquet"
    arguments = ["--users", "u3,u5", "--candidates", "105,101,100,107", "--top-k", "3", "--out", str(out)]
    assert main(["rank", "--run", str(world / "run"), *arguments]) == 0
    table = pq.read_table(out).to_pydict()
    assert table["user"] == ["u3"] * 3 + ["u5"] * 3 and table["rank"] == [1, 2, 3] * 2
    assert table["score"][:3] == sorted(table["score"][:3], reverse=True)
    best = collm_fast.open_run(world / "run").rank("u3", [105, 101, 100, 107], 3)
    assert [item for item, _ in best] == table["item"][:3]


def test_ablate_adds_rows_and_repeats_nothing(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    stage1 = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert main(["ablate", "--run", str(tmp_path / "run"), "--inputs", "+stats,+pair"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    before = json.loads((world / "run" / "metrics.json").read_text())
    assert list(metrics) == [*before, "stage2+stats", "stage2+pair"]
    assert all(metrics[row] == before[row] for row in before)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stage1
    assert (tmp_path / "run" / "mapper+pair.safetensors").is_file()
    run = collm_fast.open_run(tmp_path / "run")
    assert run.row == "stage2" and run.rows == ["stage1", "stage2", "stage2+stats", "stage2+pair"]
    again = run.evaluate("test")
    assert again["stage2+pair"]["test"] == metrics["stage2+pair"]["test"]
    assert again["stage2+stats"]["test"] == metrics["stage2+stats"]["test"]


def test_one_stage_alone(world, tmp_path):
    assert main(train(world, tmp_path / "lora", "--stage", "lora")) == 0
    assert list(json.loads((tmp_path / "lora" / "metrics.json").read_text()))[-1] == "stage1"
    assert not (tmp_path / "lora" / "mapper.safetensors").exists()
    assert collm_fast.open_run(tmp_path / "lora").score(["u1"], [101]).shape == (1,)
    assert main(train(world, tmp_path / "cie", "--stage", "cie")) == 0
    assert list(json.loads((tmp_path / "cie" / "metrics.json").read_text())) == [
        "item_mean",
        "item_user_mean",
        "cf",
        "stage2",
    ]
    assert not (tmp_path / "cie" / "adapter").exists()
    # A finished stage 1 is taken over by a run that goes on to stage 2.
    assert main(train(world, tmp_path / "lora", "--stage", "both", "--resume", "auto")) == 0
    both = json.loads((tmp_path / "lora" / "metrics.json").read_text())
    assert both == json.loads((world / "run" / "metrics.json").read_text())


def test_fit_cf_and_its_folder(world, tmp_path, capsys):
    fit = ["fit-cf", "--data", world / "data", "--model", "lightgcn", "--out", tmp_path / "cf", "--max-epochs", "2"]
    fit += ["--dim", "4", "--seed", "5"]
    assert main([str(argument) for argument in fit]) == 0
    metrics = json.loads((tmp_path / "cf" / "metrics.json").read_text())
    assert list(metrics) == ["item_mean", "item_user_mean", "cf"]
    assert "expected a folder without a run" in error_of(capsys, fit)
    other = write_ratings(tmp_path / "other.csv", seed=1)
    assert main(["prepare", "--source", "table", "--input", str(other), "--out", str(tmp_path / "data")]) == 0
    wrong = train(world, tmp_path / "run", "--data", str(tmp_path / "data"), "--cf", str(tmp_path / "cf"))
    assert "fitted to other data" in error_of(capsys, wrong)
    none = train(world, tmp_path / "run", "--cf", str(tmp_path / "cf"))
    assert "cie_rows: expected held-out rows" in error_of(capsys, none)
    assert not (tmp_path / "run").exists()
    assert (
        main(train(world, tmp_path / "run", "--cf", str(tmp_path / "cf"), "--cie-rows", "all", "--stage", "cie")) == 0
    )
    assert "+stats counts their own labels" in (tmp_path / "run" / "report.md").read_text()


def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, capsys):
    new = tmp_path / "new"
    save_llm(tmp_path / "bare", tokenizer=False)
    for more, message in (
        (["--limit-trian", "3"], "did you mean --limit-train?"),
        (["--data", tmp_path / "nothing"], "expected a folder that prepare wrote"),
        (["--llm", tmp_path / "bare"], "expected a folder with a tokenizer"),
        (["--llm", tmp_path / "nothing"], "expected a folder"),
        (["--cf", "mff"], "cf: expected mf|lightgcn|sasrec|din or a folder that fit-cf wrote, got 'mff'"),
        (["--cf", "din"], "expected model mf or lightgcn, got 'din', which a later version brings"),
        (["--prompt.stage2", "no tags"], "expected <UserID> in the stage 2 template"),
        (["--lora.target-modules", "nope"], "expected target_modules among"),
        (["--cfg-path", "x.yaml"], "cfg-path: expected a YAML file, got x.yaml"),
    ):
        assert message in error_of(capsys, train(world, new, *map(str, more))), more
        assert not new.exists(), more
    message = error_of(capsys, train(world, world / "run"))
    assert "out: expected a folder without a run" in message and "--resume auto" in message
    different = error_of(capsys, train(world, world / "run", "--resume", "auto", "--seed", "9"))
    assert "seed: expected 2023 as in the run to be resumed" in different


def test_bad_pairs_users_and_splits(world, tmp_path, capsys):
    run = ["--run", world / "run"]
    write_table(tmp_path / "p.csv", {"user": ["u1", "nobody"], "item": [101, 101]})
    out = ["--out", tmp_path / "o.parquet"]
    assert "'nobody' in row 1" in error_of(capsys, ["predict", *run, "--pairs", tmp_path / "p.csv", *out])
    assert "expected --pairs FILE and --out FILE" in error_of(capsys, ["predict", *run])
    assert "expected a file named" in error_of(capsys, ["predict", *run, "--pairs", "x.csv", "--out", "x.txt"])
    assert "got '999'" in error_of(capsys, ["rank", *run, "--users", "u1", "--candidates", "999", *out])
    assert "expected --users" in error_of(capsys, ["rank", *run])
    assert "every candidate once" in error_of(capsys, ["rank", *run, "--users", "u1", "--candidates", "101,101", *out])
    assert "top_k at least 1" in error_of(
        capsys, ["rank", *run, "--users", "u1", "--candidates", "101", "--top-k", "0", *out]
    )
    assert "split: expected one of train, valid, test" in error_of(capsys, ["evaluate", *run, "--split", "tset"])
    assert "expected a run folder" in error_of(capsys, ["evaluate", "--run", tmp_path])
    assert "out: expected a file, got the folder" in error_of(capsys, ["evaluate", *run, "--out", tmp_path])
    assert not (tmp_path / "o.parquet").exists()


def test_other_commands(world, tmp_path, capsys):
    assert main([]) == 0 and "ablate" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == collm_fast.__version__
    assert main(["env"]) == 0 and "lora_linear" in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"version", "torch", "device", "simd", "ops", "problems"}
    assert "did you mean train?" in error_of(capsys, ["trian"])
    assert "import-official: expected --ckpt FILE.pth" in error_of(capsys, ["import-official"])
    assert "bench: expected" in error_of(capsys, ["bench", "nothing"])  # one of them, or a checkout
    assert "bench: expected" in error_of(capsys, ["bench"])
    with pytest.raises(ValueError, match="expected a checkout"):
        bench.run_bench(["propagate"], tmp_path / "nothing")
    (tmp_path / "bench_x.py").write_text("import sys; sys.exit(len(sys.argv) - 1)")
    assert bench.run_bench(["x", "a", "b", "c"], tmp_path) == 3
    with pytest.raises(ValueError, match="expected one of compare, x, got 'y'"):
        bench.run_bench(["y"], tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0 and "--limit-train" in capsys.readouterr().out


def test_what_is_no_bad_input_exits_with_one(monkeypatch, capsys):
    def fail(*_, **__):
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr("collm_fast.environment.env", fail)
    assert main(["env"]) == 1 and "loss is nan" in capsys.readouterr().err

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("collm_fast.environment.env", stop)
    assert main(["env"]) == 1 and "interrupted" in capsys.readouterr().err


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "collm_fast", "trian"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("collm-fast: expected a command")

"""The Python API, and that a run stopped anywhere continues to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import QUICK, save_llm, write_ratings, write_world

import collm_fast
from collm_fast.cli import main
from collm_fast.config import CFConfig, PrepareConfig, TrainConfig, from_mapping
from collm_fast.data.prepare import prepare
from collm_fast.io.tables import read_table
from collm_fast.models.cf.frozen import CFModel
from collm_fast.rank import best_first
from collm_fast.training import pipeline
from collm_fast.training.controls import logistic_scores
from collm_fast.training.interrupt import Interrupted
from collm_fast.training.stages import load_mapper, set_trainable, with_biases
from collm_fast.training.subsets import choose_rows, valid_sample, whole_groups, whole_users

OPTIONS = {
    "limit_train": 32,
    "limit_eval": 40,
    "max_steps": 4,
    "collaborative": {"max_epochs": 3, "dim": 4, "held_out": 0.2},
    "cie_rows": "held-out",
    "prompt": {"history_length": 3},
    "stage1": {"eval_every": 2, "batch_size": 8},
    "stage2": {"eval_every": 2, "batch_size": 8},
    "loss": "yes-no",
    "dtype": "float32",
}
FILES = ("mapper.safetensors", "cf.safetensors", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    write_world(folder, patch)
    collm_fast.train(folder / "data", folder / "llm", "mf", folder / "run", **OPTIONS)
    yield folder
    patch.undo()


def same(first, second):
    assert (first / "metrics.json").read_text() == (second / "metrics.json").read_text()
    assert (first / "history.json").read_text() == (second / "history.json").read_text()
    for name in FILES:
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def test_the_api_does_what_the_command_does(world, tmp_path):
    places = ["--data", str(world / "data"), "--llm", str(world / "llm"), "--cf", "mf", "--out", str(tmp_path / "run")]
    assert main(["train", *places, *QUICK]) == 0
    same(world / "run", tmp_path / "run")
    commands = [json.loads((run / "run.json").read_text())["commands"] for run in (world / "run", tmp_path / "run")]
    assert commands[0][0].startswith("collm_fast.train('") and "limit_train=32" in commands[0][0]
    assert commands[1][0].startswith("collm-fast train --data")


def test_scores_depend_on_the_history_before_the_moment(world):
    run = collm_fast.open_run(world / "run")
    early, late = run.score(["u1"], [105], at=0), run.score(["u1"], [105])
    assert early.shape == late.shape == (1,) and early[0] != late[0]
    test = run.dataset.splits["test"]
    many = run.score(run.dataset.raw_users[test.uid], run.dataset.raw_items[test.iid], at=test.timestamp)
    assert many.shape == (len(test),) and many.dtype == np.float32
    alone = run.score([run.dataset.raw_users[test.uid[5]]], [run.dataset.raw_items[test.iid[5]]], at=test.timestamp[5])
    assert alone[0] == pytest.approx(many[5], abs=1e-5)


def test_a_run_of_relative_paths_opens_from_another_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    collm_fast.train("data", "llm", "mf", tmp_path / "run", **{**OPTIONS, "stage": "lora", "max_steps": 1})
    monkeypatch.chdir(tmp_path)
    assert collm_fast.open_run("run").score(["u1"], [105]).shape == (1,)


def test_a_run_evaluates_on_a_sample_of_whole_users(world, tmp_path):
    run = collm_fast.train(world / "data", world / "llm", "mf", tmp_path / "run", **OPTIONS, valid_rows=12)
    dataset, plain = run.dataset, collm_fast.open_run(world / "run")
    valid = dataset.splits["valid"].take(choose_rows(run.config, dataset, 0.2)["valid"])
    sample = valid_sample(run.config, valid)
    inside = np.isin(valid.uid, valid.uid[sample])
    assert np.array_equal(np.flatnonzero(inside), sample) and 12 <= sample.size < len(valid)
    for row in ("stage1", "stage2"):
        stage = run.record["stages"][row]
        assert stage["interim"]["rows"] == sample.size
        assert run.metrics[row]["valid"]["all"]["rows"] == len(valid)
        assert run.metrics[row]["valid"]["all"]["auc"] == stage["best_auc"]
    curves = [json.loads((folder / "history.json").read_text())["stage1"] for folder in (run.path, plain.path)]
    assert curves[0]["loss"] == curves[1]["loss"] and len(curves[0]["valid_low"]) == len(curves[0]["eval_step"])
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert f"scored a fixed sample of {sample.size} validation rows, whole users" in text
    assert valid_sample(from_mapping(TrainConfig, {"valid_rows": len(valid)}), valid) is None


def test_dropout_per_sample_shares_no_prefix_where_masks_are_drawn(world, tmp_path, monkeypatch):
    real, shared = pipeline.train_stage, []

    def look(*arguments):
        shared.append(arguments[6].share_prefix)
        return real(*arguments)

    monkeypatch.setattr(pipeline, "train_stage", look)
    options = {**OPTIONS, "max_steps": 1, "lora": {"dropout_per": "sample"}}
    collm_fast.train(world / "data", world / "llm", "mf", tmp_path / "a", **options)
    collm_fast.train(world / "data", world / "llm", "mf", tmp_path / "b", **options, stage2_lora_dropout=True)
    assert shared == [False, True, False, False]


def test_bad_ids_and_lengths(world):
    run = collm_fast.open_run(world / "run")
    with pytest.raises(ValueError, match="'nobody'"):
        run.score(["nobody"], [101])
    with pytest.raises(ValueError, match="999"):
        run.score(["u1"], [999])
    with pytest.raises(ValueError, match="as many users as items"):
        run.score(["u1", "u2"], [101])
    with pytest.raises(ValueError, match="row: expected one of stage1, stage2, got 'stage3'"):
        run.model("stage3")


def test_rank_is_the_order_of_the_scores(world):
    run = collm_fast.open_run(world / "run")
    items = [101, 110, 107, 103]
    score = run.score(["u2"] * 4, items)
    ranked = run.rank("u2", items)
    assert [item for item, _ in ranked] == [items[place] for place in np.argsort(-score, kind="stable")]
    assert ranked[:2] == run.rank("u2", items, top_k=2)
    with pytest.raises(ValueError, match="at least one candidate"):
        run.rank("u2", [])
    assert best_first([0.5, 0.5, 0.9]).tolist() == [2, 0, 1] and best_first([0.5, 0.5, 0.9], 2).tolist() == [2, 0]


def test_open_run_checks_what_it_stands_on(world, tmp_path):
    with pytest.raises(ValueError, match="expected a run folder"):
        collm_fast.open_run(tmp_path)
    other = save_llm(tmp_path / "llm", seed=5)
    with pytest.raises(ValueError, match="llm: expected the model of the run"):
        collm_fast.open_run(world / "run", llm=other).score(["u1"], [101])
    ratings = write_ratings(tmp_path / "r.csv", seed=3)
    prepare(PrepareConfig(source="table", input=ratings, out=tmp_path / "data"))
    with pytest.raises(ValueError, match="data: expected the dataset of the run"):
        _ = collm_fast.open_run(world / "run", data=tmp_path / "data").dataset
    (tmp_path / "m.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="mapper: expected a mapper of collm_fast in"):
        load_mapper(tmp_path / "m.safetensors")


def test_an_unfinished_run_cannot_be_opened(world, tmp_path):
    (tmp_path / "config.yaml").write_text((world / "run" / "config.yaml").read_text())
    (tmp_path / "run.json").write_text('{"stages": {}}')
    with pytest.raises(ValueError, match="expected a run with a finished stage"):
        collm_fast.open_run(tmp_path)


@pytest.mark.parametrize("part", ["_baselines", "score_prompts", "add_scores", "save_mapper", "write_report"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_run_broken_off_in_any_part_continues_to_the_same_bits(world, tmp_path, monkeypatch, part, call):
    real, calls = getattr(pipeline, part), []

    def broken(*args, **kwargs):
        calls.append(part)
        if len(calls) == call:
            raise RuntimeError("the machine went down")
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, part, broken)
    arguments = (world / "data", world / "llm", "mf", tmp_path / "run")
    try:
        collm_fast.train(*arguments, **OPTIONS)
    except RuntimeError:
        monkeypatch.setattr(pipeline, part, real)
        collm_fast.train(*arguments, **OPTIONS, resume="auto")
    else:
        assert call > len(calls)
    same(world / "run", tmp_path / "run")


def test_interrupt_in_the_middle_of_a_stage_continues_to_the_same_bits(world, tmp_path, monkeypatch):
    from collm_fast.training import loop

    real, steps = loop.set_step_seed, []

    def with_signal(*args):
        steps.append(1)
        if len(steps) == 7:  # the third step of stage 2
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop, "set_step_seed", with_signal)
    arguments = (world / "data", world / "llm", "mf", tmp_path / "run")
    with pytest.raises(Interrupted):
        collm_fast.train(*arguments, **OPTIONS)
    said = []
    config = {**yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()), "resume": "auto"}
    pipeline.run_training(from_mapping(TrainConfig, config), say=said.append, progress=False)
    assert said[0] == "resumed from step 3" and len(steps) == 8
    same(world / "run", tmp_path / "run")


def test_killed_process_exits_with_three_and_continues(world, tmp_path):
    """The real thing: a signal to the command, exit code 3, the printed step, and equal results."""
    places = ["--data", str(world / "data"), "--llm", str(world / "llm"), "--cf", "mf", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "collm_fast", "train", *places, *QUICK, "--resume", "auto"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run").glob("checkpoints/*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    # It may have ended before the signal came; then there is nothing to continue.
    assert process.returncode in (0, 3), err
    assert process.returncode == 0 or "--resume auto continues" in err
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert "resumed from step " in done.stdout
    # The process drew more resamples for its intervals; the scores they stand on are equal.
    first, again = (
        read_table(folder / "run" / "predictions" / "test.parquet", [], "t") for folder in (world, tmp_path)
    )
    assert all(np.array_equal(first[name], again[name]) for name in first.keys() | again.keys())


def test_subsets_are_whole_and_seeded(world):
    train = collm_fast.open_run(world / "run").dataset.splits["train"]
    rows = whole_users(train, 50, 1)
    assert 50 <= rows.size < len(train) and np.array_equal(rows, np.sort(rows))
    assert all((train.uid == user).sum() == (train.uid[rows] == user).sum() for user in np.unique(train.uid[rows]))
    assert np.array_equal(rows, whole_users(train, 50, 1)) and not np.array_equal(rows, whole_users(train, 50, 2))
    assert whole_users(train, None, 1).size == len(train) == whole_users(train, 10**6, 1).size
    groups = whole_groups(train, 20, 1)

    def key(row):
        return int(train.uid[row]), train.his[train.his_offsets[row] : train.his_offsets[row + 1]].tobytes()

    chosen = {key(row) for row in groups}
    assert groups.size >= 20 and sum(key(row) in chosen for row in range(len(train))) == groups.size
    among = np.arange(len(train)) % 2 == 0
    assert set(whole_groups(train, 20, 1, among)) <= set(np.flatnonzero(among))


def test_biases_become_columns_and_scores_stay():
    rng = np.random.default_rng(0)
    user, item = (torch.from_numpy(rng.normal(size=(n, 3)).astype(np.float32)) for n in (5, 7))
    plain = CFModel("mf", CFConfig(), user, item, offset=0.5)
    assert with_biases(plain) is plain
    biased = CFModel("mf", CFConfig(), user, item, user[:, 0].clone(), item[:, 1].clone(), 0.5)
    read = with_biases(biased)
    uid, iid = np.repeat(np.arange(5), 7), np.tile(np.arange(7), 5)
    assert read.dim == 5 and read.user_bias is None
    assert np.allclose(read.score(uid, iid), biased.score(uid, iid), atol=1e-5)


def test_a_stage_without_its_parameters_is_an_error():
    with pytest.raises(ValueError, match="stage lora: expected a model with lora_A or lora_B, got one without"):
        set_trainable(torch.nn.Linear(2, 2), "lora")


def test_logistic_regression_is_the_optimum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) * [1.0, 10.0, 0.1]
    y = (x @ [1.0, -0.1, 5.0] + rng.logistic(size=300) > 0).astype(int)
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(x)
    expected = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(scaled, y).decision_function(scaled)
    assert np.allclose(logistic_scores(x, y, x, ridge=2.0), expected, atol=1e-4)
    assert np.isfinite(logistic_scores(np.ones((4, 1)), np.ones(4), np.ones((2, 1)))).all()

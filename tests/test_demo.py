"""The demo on a small world: its plan, a stop in the middle, a second call, a fresh one, and its time estimate."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from small_run import write_world

import collm_fast
from collm_fast import demo
from collm_fast.cli import main
from collm_fast.training import loop

SIZES = demo.BF16, demo.FLOAT32  # before the tests make them small


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, model and one finished demo."""
    folder = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    write_world(folder, patch)
    small = demo.MachineClass("small products", 48, 0.01, 0.01)
    patch.setattr(demo, "BF16", small)
    patch.setattr(demo, "FLOAT32", small)
    assert main(command(folder, folder / "demo")) == 0
    yield folder
    patch.undo()


def command(folder, out, *more):
    return ["demo", "--data", str(folder / "data"), "--llm", str(folder / "llm"), "--out", str(out), *more]


def test_a_demo_leaves_a_whole_run_with_all_baselines(world):
    out = world / "demo"
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["item_mean", "item_user_mean", "cf", "stage1", "stage2"]
    report = (out / "report.md").read_text()
    for wanted in (
        "logistic, product alone",
        "lightgcn" if "mf" in report else "mf",
        "not fitted to",
        "collm-fast demo",
    ):
        assert wanted in report, wanted
    run = collm_fast.open_run(out)
    assert run.config.loss == "yes-no" and run.config.prompt.history_length == 5
    assert run.cf.config.held_out == demo.HELD_OUT and run.cf.config.bias
    assert run.score(["u1"], [101]).shape == (1,)


def test_a_finished_demo_is_shown_again_and_moved_aside_when_fresh(world, tmp_path, capsys):
    before = (world / "demo" / "run.json").read_bytes()
    assert main(command(world, world / "demo")) == 0
    text = capsys.readouterr().out
    assert "is complete; --fresh makes another one" in text and "stage2" in text and "report.html" in text
    assert (world / "demo" / "run.json").read_bytes() == before
    for name in ("old", "old-1"):
        (tmp_path / name).mkdir()
    assert demo._move_aside(tmp_path / "old") == tmp_path / "old-2"


@pytest.mark.parametrize("step", [2, 5])
def test_a_demo_stopped_in_the_middle_ends_with_the_same_table(world, tmp_path, monkeypatch, capsys, step):
    real, steps = loop.set_step_seed, []

    def with_signal(*args):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop, "set_step_seed", with_signal)
    assert main(command(world, tmp_path / "demo")) == 3
    assert "Estimated time: about" in capsys.readouterr().out
    monkeypatch.setattr(loop, "set_step_seed", real)
    assert main(command(world, tmp_path / "demo")) == 0
    assert "resumed from step" in capsys.readouterr().out
    first, again = (json.loads((path / "demo" / "metrics.json").read_text()) for path in (world, tmp_path))
    assert first == again
    controls = [json.loads((path / "demo" / "run.json").read_text())["controls"] for path in (world, tmp_path)]
    assert controls[0] == controls[1]


def test_fitted_models_of_another_seed_are_not_taken(world, tmp_path, capsys):
    shutil.copytree(world / "demo" / "collaborative", tmp_path / "demo" / "collaborative")
    assert main(command(world, tmp_path / "demo", "--seed", "3")) == 2
    assert "demo: expected the data and the seed that" in capsys.readouterr().err


def test_the_command_to_repeat_it_names_the_language_model(world):
    commands = json.loads((world / "demo" / "run.json").read_text())["commands"]
    assert len(commands) == 1 and f"--llm {world / 'llm'}" in commands[0]


def test_fresh_starts_over(world, tmp_path, capsys):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "note.txt").write_text("mine")
    assert main(command(world, tmp_path / "demo", "--fresh", "--seed", "3")) == 0
    assert "moved the run of before to" in capsys.readouterr().out
    assert (tmp_path / "demo-1" / "note.txt").read_text() == "mine"
    assert json.loads((tmp_path / "demo" / "run.json").read_text())["seed"] == 3


def test_the_estimate_follows_size_and_cores():
    bf16, float32 = SIZES
    assert demo.estimated_seconds(bf16, 2) < demo.estimated_seconds(bf16, 1)
    assert demo.estimated_seconds(float32, 64) == demo.estimated_seconds(float32, 16)
    assert float32.prompts * 2 == bf16.prompts
    assert all(demo.estimated_seconds(size, 2) < 15 * 60 for size in SIZES)

"""What a run may be continued with, and that bad input leaves a folder as it was."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
from small_run import QUICK, quick_reports, save_llm, write_ratings

import collm_fast
from collm_fast.cli import main
from collm_fast.io.tables import read_table
from collm_fast.models.cf.frozen import CFModel
from collm_fast.training import pipeline
from collm_fast.training.stages import load_mapper, mapper_file, save_mapper


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two datasets, a model, prompts in a file, and `run`, which reads them and which tests do not change."""
    folder = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    quick_reports(patch)
    for name, seed in (("data", 0), ("other", 3)):
        prepare_from(write_ratings(folder / f"{name}.csv", seed=seed), folder / name)
    save_llm(folder / "llm")
    (folder / "prompt.txt").write_text("Liked: <ItemTitleList>. Enjoys <TargetItemTitle>? #Answer:")
    assert main(train(folder, folder / "run")) == 0
    yield folder
    patch.undo()


def prepare_from(ratings, out):
    assert main(["prepare", "--source", "table", "--input", str(ratings), "--out", str(out)]) == 0


def train(folder, out, *more):
    places = ["--data", folder / "data", "--llm", folder / "llm", "--cf", "mf", "--out", out]
    return ["train", *map(str, places), "--prompt.stage1", f"@{folder / 'prompt.txt'}", *QUICK, *map(str, more)]


def error_of(capsys, arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def unfinished(world, out):
    """A copy of the run that has its last part still to do."""
    shutil.copytree(world / "run", out)
    (out / "report.html").unlink()
    return out


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_dataset_at_the_same_place_is_refused(world, tmp_path, capsys):
    run = unfinished(world, tmp_path / "run")
    data = world / "data"
    data.rename(tmp_path / "kept")
    try:
        shutil.copytree(world / "other", data)
        before = content(run)
        message = error_of(capsys, train(world, run, "--resume", "auto"))
    finally:
        shutil.rmtree(data)
        (tmp_path / "kept").rename(data)
    assert "fitted to other data" in message and content(run) == before


def test_a_run_before_its_collaborative_model_knows_its_dataset_too(world, tmp_path, capsys):
    run = unfinished(world, tmp_path / "run")
    (run / "cf.safetensors").unlink()
    record = json.loads((run / "run.json").read_text())
    record["data"]["fingerprint"] = "another"
    (run / "run.json").write_text(json.dumps(record))
    before = content(run)
    message = error_of(capsys, train(world, run, "--resume", "auto"))
    assert "data: expected the dataset that the run in" in message and content(run) == before


def test_the_wording_belongs_to_the_run(world, tmp_path, capsys):
    run = unfinished(world, tmp_path / "run")
    file, score = world / "prompt.txt", collm_fast.open_run(world / "run").score(["u1"], [105])
    before = file.read_text()
    try:
        file.write_text("Likes <ItemTitleList>. And <TargetItemTitle>? #Answer:")
        assert "prompt.stage1: expected the text that the run" in error_of(
            capsys, train(world, run, "--resume", "auto")
        )
        file.unlink()
        opened = collm_fast.open_run(run)
        assert np.array_equal(opened.score(["u1"], [105]), score)
        assert opened._base.templates["stage1"].texts == (before,)
    finally:
        file.write_text(before)


def test_wordings_with_different_answer_tokens_are_refused(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("collm_fast.training.stages.answer_ids", lambda tokenizer, end, yes, no: (len(end), 1))
    several = tmp_path / "several.txt"
    several.write_text("<ItemTitleList> <TargetItemTitle>? A:\n<ItemTitleList> <TargetItemTitle>\n")
    message = error_of(capsys, train(world, tmp_path / "run", "--prompt.stage1", f"@{several}"))
    assert "prompt.stage1: expected wordings with the same answer tokens" in message


def test_stage_1_does_not_come_after_a_stage_2(world, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train(world, run, "--stage", "cie")) == 0
    before = content(run)
    for stage in ("both", "lora"):
        message = error_of(capsys, train(world, run, "--stage", stage, "--resume", "auto"))
        assert "stage: expected cie, as stage2 in" in message and content(run) == before


def test_an_ablation_leaves_the_main_mapper_alone(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    assert main(["ablate", "--run", str(run), "--inputs", "+stats"]) == 0
    assert main(["ablate", "--run", str(run), "--inputs", "+pair"]) == 0
    opened = collm_fast.open_run(run)
    assert opened.rows == ["stage1", "stage2", "stage2+stats", "stage2+pair"]
    names = [mapper_file(inputs, "+stats") for inputs in ("+stats", "embedding", "+pair")]
    assert names == ["mapper.safetensors", "mapper-embedding.safetensors", "mapper+pair.safetensors"]
    shutil.copy(run / "mapper+stats.safetensors", run / "mapper.safetensors")
    with pytest.raises(ValueError, match=r"mapper: expected one that reads embedding in .*, got \+stats"):
        collm_fast.open_run(run).model()
    assert load_mapper(run / "mapper+pair.safetensors").config.inputs == "+pair"


def test_a_mapper_of_another_model_is_refused_and_equal_mappers_are_equal_files(world, tmp_path):
    path = world / "run" / "mapper.safetensors"
    mapper = load_mapper(path, {"data": collm_fast.open_run(world / "run").dataset.fingerprint})
    with pytest.raises(ValueError, match="mapper: expected .* to be trained with this llm, got another one's"):
        load_mapper(path, {"llm": "another"})
    for number in range(4):
        save_mapper(tmp_path / str(number), mapper, {"data": "d", "llm": "l"})
    assert len({(tmp_path / str(number)).read_bytes() for number in range(4)}) == 1


def test_one_model_one_seed_one_warm_up(world, tmp_path, capsys, caplog):
    contradicting = train(world, tmp_path / "a", "--collaborative.model", "lightgcn")
    assert "collaborative.model: expected 'mf' as cf says, got 'lightgcn'" in error_of(capsys, contradicting)
    short = ["--stage", "lora", "--cie-rows", "all"]
    assert main(train(world, tmp_path / "b", *short, "--seed", "7", "--collaborative.seed", "2023")) == 0
    assert CFModel.load(tmp_path / "b").config.seed == 2023
    assert "stage1: warm-up over 0 steps, a tenth of all, not 200" in caplog.text
    assert main(train(world, tmp_path / "c", *short, "--cf", tmp_path / "b", "--collaborative.num-layers", "1")) == 0
    assert "collaborative.num_layers: not used, the collaborative model is a fitted one" in caplog.text


def test_predictions_have_the_ids_as_the_dataset_has_them(world, tmp_path):
    pairs, out = tmp_path / "pairs.csv", tmp_path / "out.parquet"
    pairs.write_text("user,item\nu1,105\nu2,101\n")
    assert main(["predict", "--run", str(world / "run"), "--pairs", str(pairs), "--out", str(out)]) == 0
    items = read_table(out, ["item"], "out")["item"]
    assert items.tolist() == [105, 101] and items.dtype == collm_fast.open_run(world / "run").dataset.raw_items.dtype


def test_bad_input_that_shows_late_leaves_a_folder_as_it_was(world, tmp_path, monkeypatch, capsys):
    def bad(*_):
        raise ValueError("late")

    monkeypatch.setattr(pipeline, "_baselines", bad)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "note.txt").write_text("mine")
    assert "late" in error_of(capsys, train(world, mine))
    assert [path.name for path in mine.iterdir()] == ["note.txt"]
    assert "late" in error_of(capsys, train(world, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_an_interrupt_before_anything_is_trained_promises_no_more_than_it_keeps(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "fit_cf", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert main(train(world, tmp_path / "run")) == 3
    assert capsys.readouterr().err.endswith("interrupted; --resume auto continues from what is saved\n")
    monkeypatch.undo()
    assert main(train(world, tmp_path / "run", "--resume", "auto")) == 0
    metrics = [(folder / "run" / "metrics.json").read_text() for folder in (world, tmp_path)]
    assert metrics[0] == metrics[1]


def test_an_error_after_training_deletes_nothing(world, tmp_path, monkeypatch, capsys):
    def bad(*_, **__):
        raise ValueError("late")

    monkeypatch.setattr(pipeline, "add_controls", bad)
    assert "late" in error_of(capsys, train(world, tmp_path / "run"))
    assert (tmp_path / "run" / "mapper.safetensors").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "score_prompts", lambda *_, **__: np.array([0.5, np.nan], np.float32))
    assert main(train(world, tmp_path / "nan")) == 1
    assert "stage1: expected finite test scores, got nan" in capsys.readouterr().err
    assert (tmp_path / "nan" / "checkpoints").is_dir()


def test_a_run_goes_on_without_the_folder_of_its_collaborative_model(world, tmp_path):
    run = unfinished(world, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("\ncf: mf\n", f"\ncf: {tmp_path / 'gone'}\n"))
    assert main(train(world, run, "--cf", tmp_path / "gone", "--resume", "auto")) == 0
    assert CFModel.load(run).fingerprint == collm_fast.open_run(run).dataset.fingerprint

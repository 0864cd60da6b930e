"""train --cfg-path: whole runs from files as the official code has them, and one sentence for each that is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import data_folder, requires
from official_files import (
    ID_PROMPT,
    TEXT_PROMPT,
    cf_state,
    lora_state,
    mapper_state,
    save_checkpoint,
    write_published,
    write_yaml,
)
from safetensors.torch import load_file
from small_run import quick_reports, save_llm

import collm_fast
from collm_fast.cli import main
from collm_fast.models.cf.frozen import CFModel
from collm_fast.official.launch import split_arguments

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, a language model, prompts and official checkpoints; an option for each path."""
    folder = tmp_path_factory.mktemp("official")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    quick_reports(patch)
    torch.manual_seed(0)
    write_published(folder / "data")
    save_llm(folder / "llm")
    (folder / "prompts").mkdir()
    (folder / "prompts" / "ids.txt").write_text(ID_PROMPT)
    (folder / "prompts" / "text.txt").write_text(TEXT_PROMPT)
    for kind in ("mf", "lightgcn"):
        torch.save(cf_state(kind), folder / f"{kind}.pth")
    save_checkpoint(folder / "stage1.pth", lora_state(32))
    save_checkpoint(folder / "both.pth", {**lora_state(32), **mapper_state(4, 32), **cf_state("mf", 4, "rec_encoder.")})
    yield folder
    patch.undo()


def paths(world, prompt="ids", **more):
    given = {
        "model.llama_model": world / "llm",
        "model.prompt_path": world / "prompts" / f"{prompt}.txt",
        "run.output_dir": world / "log",
        **more,
    }
    return ["--options", *(f"{key}={value}" for key, value in given.items())]


def train(*arguments):
    return main(["train", *map(str, arguments)])


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert train(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("collm-fast: ")]
    assert len(errors) == 1 and errors[0] == lines[-1], lines
    return errors[0]


def test_stage_1_then_stage_2_on_its_run_folder(world, tmp_path, capsys):
    first = write_yaml(tmp_path / "one.yaml", world / "data", {"freeze_proj": True, "freeze_lora": False})
    assert train("--cfg-path", first, *paths(world, "text"), "--out", tmp_path / "one") == 0
    said = capsys.readouterr().out
    listing = (tmp_path / "one" / "official.txt").read_text()
    assert listing in said and said.count("field by field") == 1
    assert "run.init_lr " in listing and "stage1.lr" in listing
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert list(metrics) == ["item_mean", "item_user_mean", "cf", "stage1"] and set(metrics["stage1"]) == {
        "valid",
        "test",
    }
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert config["order"] == "random" and config["stage1"]["max_steps"] == 4 and config["collaborative"]["dim"] == 4
    # The backslash and n of the prompt file are two characters of the prompt; equal lines are one wording.
    run = collm_fast.open_run(tmp_path / "one")
    assert run.record["prompts"]["stage1"] == [TEXT_PROMPT.split("\n")[0]]
    assert "\\n#Answer:" in run.record["prompt_examples"]["stage1"]

    second = write_yaml(tmp_path / "two.yaml", world / "data", {"ckpt": str(tmp_path / "one"), "rec_model": "lightgcn"})
    options = paths(world, **{"model.rec_config.pretrained_path": world / "lightgcn.pth"})
    assert train("--cfg-path", second, *options, "--out", tmp_path / "two", "--max-steps", 2, "--limit-eval", 12) == 0
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    run = collm_fast.open_run(tmp_path / "two")
    assert run.record["stages"]["stage2"]["steps"] == 2 and run.record["rows"]["test"] < 36
    assert run.cf.name == "lightgcn" and run.cf.dim == 4
    assert run.score([1, 2], [3, 4]).shape == (2,)


def test_stage_2_begins_with_what_the_checkpoint_holds(world, tmp_path, capsys):
    file = write_yaml(tmp_path / "c.yaml", world / "data", {"ckpt": str(world / "both.pth")})
    options = paths(world, **{"model.rec_config.pretrained_path": world / "mf.pth", "run.init_lr": "1e-9"})
    more = ["--stage2.min-lr", "0", "--max-steps", 1, "--limit-eval", 12]
    assert train("--cfg-path", file, *options, "--out", tmp_path / "run", *more) == 0
    assert "both.pth: 6 tensors not used: llama_model_lora" in capsys.readouterr().out
    state = torch.load(world / "both.pth", weights_only=True)["model"]
    mapper = load_file(tmp_path / "run" / "mapper.safetensors")
    assert torch.allclose(mapper["first.weight"], state["llama_proj.0.weight"], atol=1e-6)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(adapter[key], state["llama_model_lora." + key.replace(".weight", ".default.weight")].float())
    # The separate file wins over the checkpoint's own copy, as the official code loads it last.
    tables = torch.load(world / "mf.pth", weights_only=True)
    assert torch.equal(CFModel.load(tmp_path / "run").user, tables["user_embedding.weight"])
    # ... and not where the collaborative model was trained along, or where there is none.
    out = ["--out", tmp_path / "own", *more]
    assert train("--cfg-path", file, *options, "model.freeze_rec=False", *out) == 0
    assert torch.equal(CFModel.load(tmp_path / "own").user, state["rec_encoder.user_embedding.weight"])


def test_only_scored_and_repeated(world, tmp_path):
    file = write_yaml(tmp_path / "c.yaml", world / "data", {"ckpt": str(world / "both.pth")}, {"evaluate": True})
    options = paths(world, **{"run.output_dir": tmp_path / "log"})
    assert train("--cfg-path", file, *options) == 0
    (run,) = [path for path in (tmp_path / "log").iterdir() if not path.name.startswith("data-")]
    record = json.loads((run / "run.json").read_text())
    assert record["stages"]["stage2"]["steps"] == 0 and not (run / "checkpoints").exists()
    assert not [sentence for sentence in record["conclusions"] if "Training did not raise" in sentence]
    state = torch.load(world / "both.pth", weights_only=True)["model"]
    assert torch.equal(load_file(run / "mapper.safetensors")["second.bias"], state["llama_proj.2.bias"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert collm_fast.open_run(run).evaluate("test")["stage2"]["test"] == metrics["stage2"]["test"]
    # A folder of ours serves in place of the checkpoint, the prepared data beside it are used again.
    prepared = next((tmp_path / "log").glob("data-*/meta.json")).stat().st_mtime_ns
    assert train("--cfg-path", file, *options, f"model.ckpt={run}", "--cf", run, "--out", tmp_path / "log" / "own") == 0
    assert json.loads((tmp_path / "log" / "own" / "metrics.json").read_text()) == metrics
    assert next((tmp_path / "log").glob("data-*/meta.json")).stat().st_mtime_ns == prepared
    # The official way to go on with a run, and the same by our own options.
    again = [*options, f"run.resume_ckpt_path={run}"]
    assert train("--cfg-path", file, *again) == 0
    # Zero-shot: a text prompt and no checkpoint.
    zero = paths(world, "text", **{"model.ckpt": "null"})
    assert train("--cfg-path", file, *zero, "--out", tmp_path / "zero", "--limit-eval", 12) == 0
    assert list(json.loads((tmp_path / "zero" / "metrics.json").read_text()))[-1] == "stage1"


def test_stage_1_goes_on_from_a_checkpoint(world, tmp_path):
    model = {"freeze_proj": True, "freeze_lora": False, "ckpt": str(world / "stage1.pth")}
    file = write_yaml(tmp_path / "c.yaml", world / "data", model, {"evaluate": True})
    assert train("--cfg-path", file, *paths(world, "text"), "--out", tmp_path / "run", "--limit-eval", 12) == 0
    state = torch.load(world / "stage1.pth", weights_only=True)["model"]
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for key, value in adapter.items():
        old = "llama_model_lora." + key.replace(".weight", ".default.weight")
        assert torch.equal(value, state[old].float())


def test_prompts_are_found_beside_the_configuration_and_wrapped(world, tmp_path):
    (tmp_path / "train_configs").mkdir()
    shutil.copytree(world / "prompts", tmp_path / "prompts")
    model = {"prompt_path": "prompts/ids.txt", "prompt_template": "### {}"}
    file = write_yaml(tmp_path / "train_configs" / "c.yaml", world / "data", model)
    given = [option for option in paths(world) if "prompt_path" not in option]
    assert train("--cfg-path", file, *given, "--out", tmp_path / "run", "--max-steps", 1, "--limit-eval", 12) == 0
    texts = collm_fast.open_run(tmp_path / "run").record["prompts"]["stage2"]
    assert texts == ["### " + ID_PROMPT.split("\n")[0]]
    assert not (tmp_path / "run" / "adapter").exists()  # no checkpoint, no adapter


def test_missing_paths_name_their_field(world, tmp_path, capsys):
    file = write_yaml(
        tmp_path / "c.yaml",
        "/nowhere/ml-1m/",
        {"ckpt": "xxxxx", "prompt_path": "prompts/none.txt", "rec_config": {"pretrained_path": "/nowhere/mf.pth"}},
    )
    given = [f"run.output_dir={tmp_path / 'log'}"]
    steps = [
        ("model.prompt_path", world / "prompts" / "ids.txt", "got 'prompts/none.txt', which is no file"),
        ("model.llama_model", world / "llm", "got /home/someone/vicuna, which is not there"),
        ("datasets.movie_ood.build_info.storage", world / "data", "got /nowhere/ml-1m, which is not there"),
        ("model.rec_config.pretrained_path", world / "mf.pth", "got /nowhere/mf.pth, which is not there"),
        ("model.ckpt", world / "both.pth", "got xxxxx, which is not there"),
    ]
    for name, value, message in steps:
        error = error_of(capsys, "--cfg-path", file, "--options", "run.seed=1", *given)
        assert error.startswith(f"collm-fast: {name}: ") and message in error, error
        assert f"--options {name}=PATH sets it" in error
        given.append(f"{name}={value}")
    assert not (tmp_path / "log").exists()


def test_what_does_not_fit_is_named(world, tmp_path, capsys):
    file = write_yaml(tmp_path / "c.yaml", world / "data", {"ckpt": str(world / "both.pth")})
    torch.save(cf_state("mf", 6), tmp_path / "wide.pth")
    save_checkpoint(tmp_path / "short.pth", lora_state(32, layers=2))
    save_checkpoint(tmp_path / "narrow.pth", mapper_state(3, 32))
    save_checkpoint(tmp_path / "none.pth", {"other": torch.zeros(1)})
    (tmp_path / "lines.txt").write_text(ID_PROMPT + "\nMore <UserID> <TargetItemID>")
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "run"]
    pretrained = "model.rec_config.pretrained_path"
    for changes, more, message in (
        ({pretrained: tmp_path / "wide.pth"}, [], "embedding_size: expected 6 as in"),
        ({pretrained: world / "lightgcn.pth"}, [], f"{pretrained}: expected the tables of mf in"),
        ({"model.ckpt": tmp_path / "short.pth"}, [], "model.ckpt: expected the model's 12 keys in"),
        ({"model.ckpt": tmp_path / "narrow.pth"}, [], "model.ckpt: expected a mapper of d=4, H=32"),
        ({"model.ckpt": tmp_path / "none.pth"}, [], "model.ckpt: expected LoRA matrices"),
        ({"model.ckpt": tmp_path / "empty"}, [], "model.ckpt: expected a folder with adapter/ or mapper"),
        ({"model.ckpt": tmp_path / "short.pth", "run.evaluate": True}, [], "expected a checkpoint with a mapper"),
        ({"model.ckpt": "null", "run.evaluate": True}, [], "model.ckpt: expected a checkpoint with a mapper"),
        ({"model.prompt_path": tmp_path / "lines.txt", "model.prompt_template": "'# {}'"}, [], "with the 2 wordings"),
        ({"run.init_lr": "fast"}, [], "run.init_lr (stage2.lr): expected number, got 'fast'"),
        ({"run.resume_ckpt_path": world / "both.pth"}, [], "run.resume_ckpt_path: expected a run folder"),
        ({}, ["--limit-trian", 3], "did you mean --limit-train?"),
        ({}, ["--data", tmp_path / "none"], "data: expected the folder of the published files"),
        ({}, ["--start", tmp_path / "empty"], "model.ckpt: expected a folder with adapter/ or mapper.safetensors"),
        ({"run.output_dir": world / "mf.pth"}, ["--out", world / "mf.pth" / "x"], "out: expected a folder to write"),
        ({"model.llama_model": tmp_path / "empty"}, [], "model.llama_model: expected a model folder with config.json"),
    ):
        error = error_of(capsys, "--cfg-path", file, *paths(world, **changes), *out, *more)
        assert message in error, error
        assert not (tmp_path / "run").exists(), message
    error = error_of(capsys, "--cfg-path", file, *paths(world), "--resume", "auto")
    assert "resume: expected --out FOLDER" in error


def test_pickles_only_on_request(world, tmp_path, capsys):
    for name in ("train", "valid", "test"):
        shutil.copy(HERE.parent / "data" / "pandas22_protocol5.pkl", tmp_path / f"{name}_ood2.pkl")
    file = write_yaml(tmp_path / "c.yaml", f"{tmp_path}/")
    out = [*paths(world), "--out", tmp_path / "log" / "run"]
    assert "data: expected --allow-pickle to read pickles" in error_of(capsys, "--cfg-path", file, *out)
    assert train("--cfg-path", file, *out, "--allow-pickle", "true") == 0
    assert collm_fast.open_run(tmp_path / "log" / "run").record["rows"]["train_all"] == 3


def test_arguments_of_the_launcher():
    found = split_arguments("--options a=1 b=2 --seed 3 --cfg-path=x.yaml --allow-pickle --out o".split())
    assert (found.cfg_path, found.options, found.allow_pickle) == (Path("x.yaml"), ["a=1", "b=2"], True)
    assert found.rest == ["--seed", "3", "--out", "o"]
    assert not split_arguments(["--cfg-path", "x", "--allow-pickle", "false"]).allow_pickle
    with pytest.raises(ValueError, match="expected --options key=value"):
        split_arguments(["--cfg-path", "x", "--options", "--seed"])
    with pytest.raises(ValueError, match="expected --cfg-path FILE.yaml"):
        split_arguments(["--cfg-path"])


def test_several_processes_are_refused_in_one_sentence(world, tmp_path, capsys, monkeypatch):
    file = write_yaml(tmp_path / "c.yaml", world / "data")
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = error_of(capsys, "--cfg-path", file)
    assert "train: expected one process" in error and "several GPUs are not there yet" in error
    assert main(["env"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "model.llama_model" in error_of(capsys, "--cfg-path", file)


@requires("data")
def test_every_published_configuration_runs_or_says_what_is_missing(world, tmp_path, capsys):
    """On small data, with paths and widths given by --options; a model that is not there yet is named."""
    files = sorted((data_folder() / "collm-official" / "train_configs").glob("*.yaml"))
    assert len(files) == 16
    rows = {}
    for file in files:
        values = yaml.safe_load(file.read_text())
        (name,) = values["datasets"]
        kind = str(values["model"].get("rec_model", "MF")).lower()
        stage = 2 if values["model"]["freeze_lora"] else 1
        changes = {
            f"datasets.{name}.build_info.storage": world / "data",
            "model.llama_model": world / "llm",
            "model.lora_config.r": 2,
            "model.rec_config.embedding_size": 4,
            "model.rec_config.pretrained_path": world / f"{kind}.pth",
            "model.ckpt": world / "both.pth" if stage == 2 else "null",
        }
        if kind == "lightgcn":
            changes["model.rec_config.embed_size"] = 4
        if not (file.parent.parent / values["model"]["prompt_path"]).is_file():
            changes["model.prompt_path"] = world / "prompts" / "ids.txt"  # never published
        options = ["--options", *(f"{key}={value}" for key, value in changes.items())]
        limits = ["--max-steps", 1, "--limit-train", 8, "--limit-eval", 12, "--dtype", "float32"]
        arguments = ["--cfg-path", file, *options, "--out", tmp_path / file.stem, *limits]
        if kind not in ("mf", "lightgcn"):
            error = error_of(capsys, *arguments)
            assert "model.rec_model: expected MF or lightgcn" in error and "which a later version brings" in error
            continue
        assert train(*arguments) == 0, file
        metrics = json.loads((tmp_path / file.stem / "metrics.json").read_text())
        rows[file.stem] = list(metrics)[-1]
        assert np.isfinite(metrics[rows[file.stem]]["test"]["all"]["auc"])
    stages = {"0924-tallrec-qwen-book", "0924-tallrec-qwen-ml", "collm_pretrain_mf_ood"}
    assert len(rows) == 8 and {name for name, row in rows.items() if row == "stage1"} == stages

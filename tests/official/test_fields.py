"""What an official configuration becomes: every field, the launcher's options, and what is refused by name."""

from __future__ import annotations

import pytest
import yaml
from conftest import data_folder, requires
from official_files import ID_PROMPT, MODEL, RUN, TEXT_PROMPT, write_yaml

from collm_fast.config import TrainConfig, from_mapping
from collm_fast.official.fields import DECIDED, IGNORED, KNOWN, RENAMED, leaves, model_of, plan_of
from collm_fast.official.read import read_config


def plan(tmp_path, options=(), prompt="", **changes):
    return plan_of(read_config(write_yaml(tmp_path / "c.yaml", "/data", **changes), options), prompt)


def config_of(found):
    return from_mapping(TrainConfig, found.values)


def test_stage_2_as_a_configuration_of_ours(tmp_path):
    config = config_of(plan(tmp_path))
    assert (config.stage, config.cf, config.llm, config.seed) == ("cie", "mf", "/home/someone/vicuna", 42)
    stage = config.stage2
    assert (stage.lr, stage.min_lr, stage.weight_decay, stage.warmup_steps) == (1e-3, 8e-5, 1e-3, 200)
    assert (stage.batch_size, stage.eval_every, stage.max_steps) == (4, 2, 4)
    assert (stage.clip_norm, stage.patience, config.order) == (None, 20, "random")
    assert config.stage1 == TrainConfig().stage1
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (2, 4.0, ("q_proj", "v_proj"))
    assert (config.mapper.hidden_factor, config.mapper.tokens_per_id) == (10, 1)
    assert (config.collaborative.dim, config.dtype, config.device) == (4, "auto", "auto")
    assert (config.prompt.yes, config.prompt.no, config.evaluate_only) == ("Yes", "No", False)


def test_stage_1_and_other_values(tmp_path):
    model = {"freeze_proj": True, "freeze_lora": False, "rec_model": "lightgcn", "ans_type": "v1", "proj_token_num": 3}
    model["rec_config"] = {"embedding_size": 8, "embed_size": 6, "gcn_layers": 3, "keep_prob": 0.6}
    run = {"amp": False, "device": "cpu", "mode": "v1", "iters_per_epoch": None, "max_epoch": 7}
    config = config_of(plan(tmp_path, model=model, run=run))
    assert (config.stage, config.cf, config.dtype, config.device) == ("lora", "lightgcn", "float32", "cpu")
    assert (config.collaborative.dim, config.collaborative.num_layers) == (6, 3)
    assert (config.prompt.yes, config.prompt.no, config.mapper.tokens_per_id) == ("former", "latter", 3)
    assert (config.stage1.epochs, config.stage1.max_steps) == (7.0, None)


def test_every_field_is_named_once_with_what_it_became(tmp_path):
    found = plan(tmp_path, model={"strange": 1, "ckpt": "a.pth"})
    names = [name for name, _, _ in found.done if not name.startswith("(")]
    written = [name for name, _ in leaves(yaml.safe_load((tmp_path / "c.yaml").read_text()))]
    assert sorted(names) == sorted(written)
    became = {name: what for name, _, what in found.done}
    assert became["model.strange"] == "ignored: no meaning here"
    assert became["run.num_workers"].startswith("ignored: ")
    assert became["run.init_lr"] == "stage2.lr" and became["run.max_epoch"].startswith("stage2.max_steps: 4")
    assert found.text().count("\n") + 1 == len(found.done)
    # Without a checkpoint stage 2 has no adapter: said although the file does not mention it.
    assert "without an adapter" in dict((name, what) for name, _, what in plan(tmp_path).done)["model.ckpt"]


def test_no_field_has_two_places():
    assert len(KNOWN) == len({*KNOWN}) == len(RENAMED) + len(IGNORED) + len(DECIDED)
    for section, values in (("model", MODEL), ("run", RUN)):
        assert {name for name, _ in leaves(values, f"{section}.")} <= {*KNOWN}


def test_options_as_the_launcher_has_them(tmp_path):
    options = ["run.batch_size_train=8", "model.llama_model=/llm", "model.lora_config.target_modules=[k_proj]"]
    options += ["datasets.movie_ood.build_info.storage=/there", "model.ckpt=null", "run.init_lr=1e-2", "run.seed=7"]
    found = plan(tmp_path, options, model={"ckpt": "xxxxx"})
    config = config_of(found)
    assert (config.stage2.batch_size, config.llm, config.stage2.lr, config.seed) == (8, "/llm", 1e-2, 7)
    assert config.lora.target_modules == ("k_proj",)
    assert "model.ckpt" not in found.paths and found.paths["datasets.movie_ood.build_info.storage"] == "/there"
    older = plan(tmp_path, ["run.batch_size_train", "8", "run.seed", "5"])
    assert (config_of(older).stage2.batch_size, config_of(older).seed) == (8, 5)
    for wrong, message in (
        (["run.batchsize_train=8"], "got 'run.batchsize_train'; did you mean run.batch_size_train?"),
        (["model.llama=x"], "did you mean model.llama_model?"),
        (["run.seed=1", "run.amp"], "options: expected key=value, got 'run.amp'"),
        (["run.seed"], "options: expected key=value or key value, got 'run.seed' alone"),
        (["run.seed=[1"], "options: expected a YAML value for run.seed"),
    ):
        with pytest.raises(ValueError, match="options: ") as error:
            plan(tmp_path, wrong)
        assert message in str(error.value)


def test_what_is_scored_is_told_by_the_prompt(tmp_path):
    for prompt, stage in ((ID_PROMPT, "cie"), (TEXT_PROMPT, "lora")):
        for frozen in (True, False):
            changes = {"model": {"freeze_lora": frozen, "freeze_proj": frozen}, "run": {"evaluate": True}}
            config = config_of(plan(tmp_path, prompt=prompt, **changes))
            assert (config.stage, config.evaluate_only) == (stage, True)
    assert config_of(plan(tmp_path, run={"evaluate": True})).stage == "cie"  # no prompt file: by the flags


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "rec_model", "DIN", "got 'DIN': DIN, which a later version brings"),
        ("model", "rec_model", "sasrec", "got 'sasrec': SASRec, which a later version brings"),
        ("model", "rec_model", "soft_prompt", "soft prompts .*, which a later version brings"),
        ("model", "rec_model", "personlized_prompt", "personalised prompts .*, which a later version brings"),
        ("model", "rec_model", "xyz", "got 'xyz', which the official code does not have either"),
        ("model", "arch", "mini_gpt4", "model.arch: expected mini_gpt4rec_v2, got 'mini_gpt4', which a later"),
        (
            "model",
            "freeze_lora",
            False,
            "one of them true and one false, got both train at once, which a later",
        ),
        ("model", "freeze_proj", True, "expected one of them true and one false, got nothing trains"),
        ("model", "freeze_rec", "no", "model.freeze_rec: expected True or False, got 'no'"),
        ("model", "ans_type", "v3", "model.ans_type: expected v2 or v1, got 'v3'"),
        ("model", "prompt_template", "{} {}", "model.prompt_template: expected a text with one {}, got '{} {}'"),
        ("model", "rec_config", {"dropout": True}, "model.rec_config.dropout: expected False, got True"),
        ("run", "lr_sched", "linear_warmup_step_lr", "got 'linear_warmup_step_lr', which a later version brings"),
        ("run", "mode", "v1", "run.mode: expected v2 with freeze_lora true"),
        ("run", "max_epoch", 0, "run.max_epoch: expected a whole number of at least 1, got 0"),
        ("run", "train_splits", ["train", "valid"], "run.train_splits: expected .'train'., got"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, section, key, value, message):
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, **{section: {key: value}})


def test_stage_1_needs_lora(tmp_path):
    model = {"freeze_proj": True, "freeze_lora": False, "lora_config": {"use_lora": False}}
    with pytest.raises(ValueError, match="use_lora: expected True for stage 1"):
        plan(tmp_path, model=model)


def test_files_that_are_no_configuration(tmp_path):
    file = tmp_path / "c.yaml"
    for text, message in (
        (None, "cfg-path: expected a YAML file, got .*c.yaml, which is no file"),
        ("a: [", "cfg-path: expected YAML in"),
        ("model: {}\nrun: {}\n", "expected the sections model, datasets, run"),
        ("model: !!python/object/apply:os.system [ls]\n", "cfg-path: expected YAML in"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(file)
    write_yaml(file, "/data")
    two = yaml.safe_load(file.read_text())
    two["datasets"]["amazon_ood"] = two["datasets"]["movie_ood"]
    with pytest.raises(ValueError, match="datasets: expected one data set, got movie_ood, amazon_ood"):
        plan_of(two)


@requires("data")
def test_the_published_configurations(tmp_path):
    files = sorted((data_folder() / "collm-official" / "train_configs").glob("*.yaml"))
    assert len(files) == 16
    kinds = {}
    for file in files:
        values = read_config(file)
        given = values["model"].get("rec_model", "MF")
        try:
            kinds[file.stem] = model_of(given)
        except ValueError as error:
            assert f"got {given!r}" in str(error) and "a later version brings" in str(error)
            continue
        found = plan_of(values)
        config_of(found)
        assert not [row for row in found.done if row[2] == "ignored: no meaning here"], file
    assert sorted(kinds.values()) == ["lightgcn"] * 2 + ["mf"] * 6

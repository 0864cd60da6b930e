"""Run folders: who may write into one, merged records, and readable errors for foreign files."""

from __future__ import annotations

import pytest

from collm_fast.io.run_folder import RunFolder, read_yaml

CONFIG = {"data": "d", "stage": "both", "stage1": {"lr": 1e-3}, "resume": "never"}


def test_a_new_folder_may_be_written(tmp_path):
    assert RunFolder.check_new(tmp_path / "new", CONFIG, resume=False) is False
    assert RunFolder.check_new(tmp_path, CONFIG, resume=True) is False  # exists, holds nothing of ours
    assert not (tmp_path / "new").exists()


def test_a_held_folder_is_refused_or_continued(tmp_path):
    RunFolder(tmp_path).write_config(CONFIG)
    with pytest.raises(ValueError, match=r"out: expected a folder without a run, got .*; --resume auto continues it"):
        RunFolder.check_new(tmp_path, CONFIG, resume=False)
    assert RunFolder.check_new(tmp_path, {**CONFIG, "resume": "auto", "stage": "cie"}, resume=True)
    with pytest.raises(ValueError, match=r"stage1.lr: expected 0.001 as in the run to be resumed, .*, got 0.1"):
        RunFolder.check_new(tmp_path, {**CONFIG, "stage1": {"lr": 0.1}}, resume=True)


def test_a_run_of_an_earlier_version_had_the_defaults_of_later_keys(tmp_path):
    RunFolder(tmp_path).write_config(CONFIG)
    defaults = {"seed": 1, "stage1": {"lr": 0.5, "clip": 2}, "lora": {"r": 8}}
    now = {**CONFIG, "seed": 1, "stage1": {"lr": 1e-3, "clip": 2}, "lora": {"r": 8}}
    assert RunFolder.check_new(tmp_path, now, True, defaults)
    with pytest.raises(ValueError, match="stage1.clip: expected 2 as in the run to be resumed, .*, got 3"):
        RunFolder.check_new(tmp_path, {**now, "stage1": {"lr": 1e-3, "clip": 3}}, True, defaults)
    with pytest.raises(ValueError, match="stage1.lr: expected 0.001 as in the run to be resumed"):
        RunFolder.check_new(tmp_path, {**now, "stage1": {"lr": 0.5, "clip": 2}}, True, defaults)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        RunFolder.check_new(tmp_path / "x", CONFIG, resume=True)
    with pytest.raises(ValueError, match="out: expected a folder, got the file .*x$"):
        RunFolder.check_new(tmp_path / "x" / "run", CONFIG, resume=True)


def test_record_merges_and_metrics_keep_every_split(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    folder.update(seconds={"a": 1.0}, seed=1)
    folder.update(seconds={"b": 2.0}, seed=2)
    folder.add_metrics("cf", "valid", {"all": {"auc": None}})
    folder.add_metrics("cf", "test", {"all": {"auc": 0.5}})
    again = RunFolder.open(tmp_path)
    assert again.record == {"seconds": {"a": 1.0, "b": 2.0}, "seed": 2}
    assert again.metrics == {"cf": {"valid": {"all": {"auc": None}}, "test": {"all": {"auc": 0.5}}}}
    with pytest.raises(ValueError, match="Out of range float"):
        folder.write_json("x.json", {"auc": float("nan")})


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected a run folder with config.yaml and run.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json: expected JSON, got"):
        RunFolder(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run.json: expected a JSON object, got list"):
        RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", r"c.yaml: expected YAML, got .* in line 1"),
        (b"\xff\xfe\xfa", "c.yaml: expected YAML, got"),
        (b"- 1", "c.yaml: expected a YAML mapping of names, got list"),
        (b"1: 2", "c.yaml: expected a YAML mapping of names"),
        (None, "c.yaml: expected a readable file, got No such file"),
    ],
)
def test_bad_yaml_is_named(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_yes_and_no_are_text_and_true_is_a_boolean(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("loss: yes\nprompt: {yes: Yes, no: No, on: off}\nbias: true\ntitle: trueish\nfresh: FALSE\n")
    expected = {"loss": "yes", "prompt": {"yes": "Yes", "no": "No", "on": "off"}, "bias": True, "title": "trueish"}
    assert read_yaml(path) == {**expected, "fresh": False}
    folder = RunFolder(tmp_path / "run")
    folder.write_config(expected)
    assert folder.config() == expected


def test_empty_yaml_is_an_empty_mapping(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "c.yaml") == {}

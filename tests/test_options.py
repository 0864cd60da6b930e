"""From arguments to configurations: both spellings, files under options, and what a mistyped key says."""

from __future__ import annotations

from pathlib import Path

import pytest

from collm_fast.cli import COMMANDS
from collm_fast.options import available_cpus, parse


def configs(command, *arguments):
    summary, classes, _ = COMMANDS[command]
    return parse(command, summary, classes, arguments)


def test_flags_of_the_contract():
    (config,) = configs(
        "train",
        *"--data D --llm L --cf mf --out R --stage lora --seed 7 --limit-train 5 --limit-eval 6".split(),
        *"--max-steps 3 --resume auto --stage1.lr 1e-2 --stage2.batch_size=4".split(),
    )
    assert (config.data, config.llm, config.out) == (Path("D"), "L", Path("R"))
    assert (config.stage, config.seed, config.resume) == ("lora", 7, "auto")
    assert (config.limit_train, config.limit_eval, config.max_steps) == (5, 6, 3)
    assert (config.stage1.lr, config.stage2.batch_size) == (1e-2, 4)
    place, cf = configs("fit-cf", *"--data D --model lightgcn --out R --seed 3".split())
    assert (place.data, place.out, cf.model, cf.seed) == (Path("D"), Path("R"), "lightgcn", 3)
    (prepare,) = configs("prepare", *"--source ml-100k --input P --out D --split user".split())
    assert (prepare.source, prepare.input, prepare.split) == ("ml-100k", Path("P"), "user")
    (rank,) = configs("rank", *"--run R --users 1,2 --candidates a,b --top-k 3 --out f.parquet".split())
    assert (rank.users, rank.candidates, rank.top_k) == (("1", "2"), ("a", "b"), 3)
    assert configs("env", "--json")[0].json is True and configs("env")[0].json is False


def test_options_win_over_files_and_later_files_over_earlier(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nstage1: {lr: 0.1, batch_size: 2}\n")
    (tmp_path / "b.yaml").write_text("stage1: {lr: 0.2}\n")
    files = ("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    (config,) = configs("train", *files, "--stage1.epochs", "2")
    assert (config.seed, config.stage1.lr, config.stage1.batch_size, config.stage1.epochs) == (1, 0.2, 2, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit-trian", "5"), "train: expected a known option, got '--limit-trian'; did you mean --limit-train?"),
        (("--stage1.batchsize=5",), "got '--stage1.batchsize'; did you mean --stage1.batch_size?"),
        (("--seed", "x"), "seed: expected integer, got 'x'"),
        (("--seed",), "train: argument --seed: expected one argument"),
        (("word",), "train: expected a known option, got 'word'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError) as error:
        configs("train", *arguments)
    assert message in str(error.value)


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    (tmp_path / "a.yaml").write_text("stage1: {learning_rate: 1, lr_: 2}\n")
    with pytest.raises(ValueError, match="got 'stage1.learning_rate'"):
        configs("train", "--config", str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("modl: mf\n")
    with pytest.raises(ValueError, match="got 'modl'; did you mean model?"):
        configs("fit-cf", "--config", str(tmp_path / "b.yaml"))


def test_cpus_by_quota(tmp_path):
    quota = tmp_path / "cpu.max"
    everything = available_cpus(quota)
    for text, expected in (("max 100000", everything), ("50000 100000", 1), ("", everything), ("0 0", everything)):
        quota.write_text(text)
        assert available_cpus(quota) == expected
    assert everything >= 1

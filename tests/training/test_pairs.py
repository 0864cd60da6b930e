"""From a file of pairs to recommendations: the ids of the file, what is written, resumption, the command, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from collm_fast.cli import main
from collm_fast.config import BPRConfig, to_mapping
from collm_fast.io.tables import read_table, write_table
from collm_fast.training.pairs import FILES, Pairs, fit_pairs

QUICK = BPRConfig(dim=8, lr=0.02, batch_size=64, epochs=10, evaluate_every=5, checkpoint_every=5)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Users a0 .. a39 of two kinds and items 100 .. 139, each kind with its half; one pair of each user held out."""
    rng = np.random.default_rng(0)
    train, test = [], []
    for user in range(40):
        items = 100 + user % 2 + 2 * rng.choice(20, 13, replace=False)
        train += [(f"a{user}", int(item)) for item in items[:12]]
        test.append((f"a{user}", int(items[12])))
    for name, pairs in (("train", train), ("test", [*test, ("nobody", 100), ("a0", 999)])):
        users, items = zip(*pairs, strict=True)
        write_table(tmp_path / f"{name}.csv", {"user": users, "item": items, "note": ["x"] * len(users)})
    return tmp_path


def test_everything_is_written_with_the_ids_of_the_file(world: Path):
    found = fit_pairs(world / "train.csv", world / "run", QUICK, held_out=world / "test.csv", top_k=5)
    assert found == json.loads((world / "run" / "metrics.json").read_text())
    assert {path.name for path in (world / "run").iterdir()} == {*FILES, "checkpoints"}
    assert (found["users"], found["items"], found["pairs"]) == (40, 41, 480)
    assert found["held_out_rows_of_unknown_users"] == 1 and len(found["history"]) == 10
    # Eight items of the user's kind are left, five are listed.
    assert found["held_out"]["recall@5"] > 0.3 and "recall@5" in found["history"][4]
    assert yaml.safe_load((world / "run" / "config.yaml").read_text()) == to_mapping(QUICK)

    best = read_table(world / "run" / "recommendations.parquet", ["user", "item"], "best")
    train = read_table(world / "train.csv", ["user", "item"], "train")
    had = set(zip(train["user"], train["item"], strict=True))
    assert len(best["user"]) == 200 and best["rank"].tolist() == [1, 2, 3, 4, 5] * 40
    assert not had & set(zip(best["user"], best["item"], strict=True))
    same = [int(user[1:]) % 2 == int(item) % 2 for user, item in zip(best["user"], best["item"], strict=True)]
    assert np.mean(same) > 0.9
    tables = {}
    for name in ("user", "item"):
        table = read_table(world / "run" / f"{name}s.parquet", [name], name)
        tables[name] = dict(zip(table[name], table["embedding"], strict=True))
    products = [float(tables["user"][u] @ tables["item"][i]) for u, i in zip(best["user"], best["item"], strict=True)]
    np.testing.assert_allclose(products, best["score"], rtol=1e-4)


def test_a_user_who_has_nearly_everything_gets_what_is_left(tmp_path: Path):
    write_table(tmp_path / "p.parquet", {"user": [7, 7, 7, 9], "item": [1, 2, 3, 4]})
    found = fit_pairs(tmp_path / "p.parquet", tmp_path / "run", BPRConfig(dim=4, epochs=1), top_k=3)
    best = read_table(tmp_path / "run" / "recommendations.parquet", ["user"], "best")
    assert best["user"].tolist() == [7, 9, 9, 9] and best["item"][0] == 4
    assert found["held_out"] is None and found["pairs"] == 4


def test_ids_of_text_and_of_numbers_meet_as_text(tmp_path: Path):
    write_table(tmp_path / "p.parquet", {"user": [1, 2], "item": [10, 20]})
    write_table(tmp_path / "t.csv", {"user": [2, 3], "item": [10, 30]})
    data = Pairs.read(tmp_path / "p.parquet", tmp_path / "t.csv")
    assert data.user_ids.tolist() == ["1", "2"] and data.item_ids.tolist() == ["10", "20", "30"]
    assert data.users.tolist() == [0, 1] and data.items.tolist() == [0, 1]
    assert [column.tolist() for column in data.held_out] == [[1], [0]] and data.unknown_users == 1


def test_numbers_stay_numbers_beside_items_of_text(tmp_path: Path):
    write_table(tmp_path / "p.parquet", {"user": [10, 9], "item": ["b", "a"]})
    write_table(tmp_path / "t.csv", {"user": ["9"], "item": ["b"]})
    data = Pairs.read(tmp_path / "p.parquet", None)
    assert data.user_ids.tolist() == [9, 10] and data.item_ids.tolist() == ["a", "b"]
    both = Pairs.read(tmp_path / "p.parquet", tmp_path / "t.csv")
    assert both.user_ids.tolist() == ["10", "9"] and [column.tolist() for column in both.held_out] == [[1], [1]]


def test_a_finished_run_that_is_continued_is_measured_as_asked(world: Path):
    pairs, out = world / "train.csv", world / "run"
    write_table(world / "known.csv", {"user": ["a0", "a1"], "item": [100, 101]})
    config = BPRConfig(dim=4, epochs=1)
    assert fit_pairs(pairs, out, config)["held_out"] is None
    for k in (5, 3):
        found = fit_pairs(pairs, out, config, held_out=world / "known.csv", top_k=k, resume=True)
        assert set(found["held_out"]) == {f"recall@{k}", f"ndcg@{k}", f"precision@{k}"}


def test_the_command_trains_resumes_and_refuses(world: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--dim", "8", "--lr", "0.02", "--batch-size", "64", "--top-k", "5", "--device", "cpu"]
    command = ["fit-lightgcn", "--pairs", str(world / "train.csv"), "--out", str(world / "run"), *options]
    assert main([*command, "--epochs", "3"]) == 0
    assert capsys.readouterr().out == f"{world / 'run'}: 40 users, 40 items\n"
    assert main([*command, "--epochs", "5"]) == 2
    assert "expected a folder without a run" in capsys.readouterr().err
    assert main([*command, "--epochs", "5", "--resume", "auto"]) == 0
    assert len(json.loads((world / "run" / "metrics.json").read_text())["history"]) == 5
    measured = [*command[:3], "--out", str(world / "other"), "--test-pairs", str(world / "test.csv"), *options]
    assert main([*measured, "--epochs", "1"]) == 0
    assert "40 users, 41 items; recall@5 0." in capsys.readouterr().out


@pytest.mark.parametrize("arguments,message", [
    ([], "fit-lightgcn: expected --pairs FILE, got none"),
    (["--pairs", "none.csv"], "pairs: expected a file, got none.csv"),
    (["--pairs", "train.csv", "--top-k", "0"], "top_k: expected at least 1, got 0"),
    (["--pairs", "train.csv", "--test-pairs", "strangers.csv"], "test_pairs: expected pairs of users in train.csv"),
    (["--pairs", "train.csv", "--device", "abacus"], "device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
    (["--pairs", "train.csv", "--l2", "-1"], "l2: expected at least 0, got -1.0"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(world)
    write_table(world / "strangers.csv", {"user": ["b"], "item": [100]})
    assert main(["fit-lightgcn", "--out", "run", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (world / "run").exists()

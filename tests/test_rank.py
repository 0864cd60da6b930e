"""Ranking with a run, from the API and the command line: the candidates, their order, and the file that streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_run import QUICK, write_world

import collm_fast
from collm_fast import rank, run
from collm_fast.cli import main
from collm_fast.io import tables
from collm_fast.io.tables import read_table, write_parts, write_table


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    write_world(folder, patch)
    places = ["--data", folder / "data", "--llm", folder / "llm", "--cf", "mf", "--out", folder / "run"]
    options = ["--mapper.inputs", "+pair", "--max-steps", "1"]
    assert main(["train", *map(str, places), *QUICK, *options]) == 0
    yield folder
    patch.undo()


@pytest.fixture
def opened(world):
    return collm_fast.open_run(world / "run")


def rated(opened: Any, user: str, *splits: str) -> set[int]:
    """Raw ids of what a user rated in some splits."""
    (uid,) = opened.dataset.user_index([user])
    parts = [opened.dataset.splits[name] for name in splits]
    return {int(opened.dataset.raw_items[i]) for part in parts for i in part.iid[part.uid == uid]}


def titled(opened: Any) -> list[int]:
    return [int(raw) for raw, title in zip(opened.dataset.raw_items, opened.dataset.titles, strict=True) if title]


@pytest.mark.parametrize("row", ["stage2+pair", "stage1"])
def test_scores_are_those_of_the_pairs_and_best_come_first(opened, row):
    opened.rows = [row]
    items = titled(opened)
    score = opened.score(["u4"] * len(items), items)
    found = dict(opened.rank("u4", items))
    assert np.allclose([found[item] for item in items], score, rtol=1e-5, atol=0)
    ranked = opened.rank("u4", items)
    assert [s for _, s in ranked] == sorted((s for _, s in ranked), reverse=True) and ranked[:3] == opened.rank(
        "u4", items, 3
    )
    early = opened.score(["u4"] * 2, items[:2], at=10_300)
    assert np.allclose([dict(opened.rank("u4", items[:2], at=10_300))[item] for item in items[:2]], early, rtol=1e-5)
    assert not np.allclose(early, score[:2], rtol=1e-4)


def test_equal_candidates_keep_their_order(opened, monkeypatch):
    for logits, order in (([20, 20, 20], [107, 101, 110]), ([30, 31, 32], [110, 101, 107])):
        # P(yes) is 1 in float32 for all of them, equal or not.
        monkeypatch.setattr(run, "branch_logits", lambda *_, logits=logits, **__: np.array(logits, np.float32))
        assert opened.rank("u4", [107, 101, 110]) == [(item, 1.0) for item in order]


def as_table(rankings: Any) -> dict[tuple[str, int], float]:
    return {
        (user, int(item)): float(score)
        for user, items, scores in rankings
        for item, score in zip(items, scores, strict=True)
    }


def test_portions_and_forwards_of_any_size_give_the_same(opened, monkeypatch):
    users = ["u7", "u3", "u11", "u0", "u9"]
    whole = list(opened.rank_users(users))
    assert [user for user, _, _ in whole] == users and all(0 < len(items) <= 10 for _, items, _ in whole)
    for rows, room in ((7, 8192), (1, 30), (45, 1), (10_000, 200)):
        monkeypatch.setattr(rank, "_ROWS", rows)
        opened.config = replace(opened.config, tokens_per_batch=room)
        again = list(opened.rank_users(users))
        assert [user for user, _, _ in again] == users
        first, second = as_table(whole), as_table(again)
        assert first.keys() == second.keys() and np.allclose(
            list(first.values()), [second[key] for key in first], rtol=1e-5
        )


def test_without_a_decoder_the_packed_forward_scores(opened, monkeypatch):
    expected = as_table(opened.rank_users(["u1", "u2"], top_k=None))
    del opened.__dict__["_ranker"]
    monkeypatch.setattr(run, "branch_decoder", lambda model: None)
    found = as_table(opened.rank_users(["u1", "u2"], top_k=None))
    assert found.keys() == expected.keys()
    assert np.allclose([found[key] for key in expected], list(expected.values()), rtol=1e-5)


def test_what_was_rated_before_is_left_out_of_all_items_only(opened):
    ((_, items, _),) = opened.rank_users(["u5"], top_k=None)
    assert set(items) == set(titled(opened)) - rated(opened, "u5", "train", "valid")
    ((_, items, _),) = opened.rank_users(["u5"], top_k=None, exclude_seen=False)
    assert set(items) == set(titled(opened))
    given = titled(opened)[:6]
    ((_, items, _),) = opened.rank_users(["u5"], given, top_k=None)
    assert set(items) == set(given)
    ((_, items, _),) = opened.rank_users(["u5"], given, top_k=None, exclude_seen=True)
    assert set(items) == set(given) - rated(opened, "u5", "train", "valid")
    ((_, items, _),) = opened.rank_users(["u5"], top_k=None, at=0)
    assert set(items) == set(titled(opened))
    ((_, items, _),) = opened.rank_users(["u5"], top_k=None, at=10**6)
    assert set(items) == set(titled(opened)) - rated(opened, "u5", "train", "valid", "test")


@pytest.mark.parametrize("candidates", [None, [119, 103, 110, 101, 112, 107]])
@pytest.mark.parametrize("exclude", [True, False])
def test_retrieval_is_exact(opened, monkeypatch, candidates, exclude):
    monkeypatch.setattr(rank, "_PLACES", 8)  # two users at once
    pool = titled(opened) if candidates is None else candidates
    found = list(opened.rank_users(None, candidates, top_k=None, retrieve=4, exclude_seen=exclude))
    assert [user for user, _, _ in found] == opened.dataset.raw_users[1:].tolist()
    for user, items, _ in found:
        left = [item for item in pool if not exclude or item not in rated(opened, user, "train", "valid")]
        uid, iid = opened.dataset.user_index([user] * len(left)), opened.dataset.item_index(left)
        score = opened.cf.score(uid, iid)
        assert set(items) == {left[place] for place in np.argsort(-score, kind="stable")[:4]}, user


def test_items_without_a_title_are_no_candidates(opened):
    titles = ["", *opened.dataset.titles[1:]]
    titles[3] = ""
    opened.dataset = replace(opened.dataset, titles=titles)
    request = rank.Request.of(
        opened.dataset, ["u1"], None, retrieve=None, at=None, exclude_seen=False, history_length=3
    )
    assert request.pool.tolist() == [1, 2, *range(4, opened.dataset.num_items)]
    opened.dataset = replace(opened.dataset, titles=[""] * len(titles))
    with pytest.raises(ValueError, match="rank: expected at least one candidate, got none"):
        opened.rank_users(["u1"])


def test_bad_input_is_told_before_any_work(opened, monkeypatch):
    monkeypatch.setattr(run, "branch_decoder", None)  # nothing is loaded
    for message, arguments, options in (
        ("expected user ids of the dataset, got 'nobody' in row 1", (["u1", "nobody"],), {}),
        ("expected item ids of the dataset, got 999", (["u1"], [101, 999]), {}),
        ("rank: expected every candidate once, got 101 repeated", (["u1"], [101, 103, 101]), {}),
        ("rank: expected at least one candidate, got none", (["u1"], []), {}),
        ("rank: expected at least one user, got none", ([],), {}),
        ("rank: expected top_k at least 1, got 0", (["u1"],), {"top_k": 0}),
        ("rank: expected retrieve at least 1, got 0", (["u1"],), {"retrieve": 0}),
        ("expected timestamps as numbers", (["u1"],), {"at": "today"}),
    ):
        with pytest.raises(ValueError, match=message):
            opened.rank_users(*arguments, **options)


def command(world, out, *options):
    return ["rank", "--run", str(world / "run"), "--out", str(out), *map(str, options)]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_file_is_what_the_api_gives_in_parts(world, opened, tmp_path, monkeypatch, capsys, suffix):
    out = tmp_path / f"r{suffix}"
    monkeypatch.setattr(tables, "_GROUP", 8)
    assert main(command(world, out, "--users", "all", "--all-items", "--retrieve", 6, "--top-k", 3)) == 0
    expected = list(opened.rank_users(None, top_k=3, retrieve=6))
    rows = sum(len(items) for _, items, _ in expected)
    said = capsys.readouterr()
    assert said.out == f"{out}: {rows} rows\n" and rows > 24
    table = read_table(out, [], "ranks")
    assert list(table) == ["user", "rank", "item", "score"]
    assert table["user"].tolist() == [user for user, items, _ in expected for _ in items]
    assert table["rank"].tolist() == [place + 1 for _, items, _ in expected for place in range(len(items))]
    assert table["item"].tolist() == [item for _, items, _ in expected for item in items]
    assert np.allclose(table["score"], np.concatenate([scores for _, _, scores in expected]), rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if suffix == ".parquet":
        assert pq.ParquetFile(out).num_row_groups > 2 and table["score"].dtype == np.float32


def test_users_come_from_a_file_once_each(world, tmp_path):
    write_table(tmp_path / "users.csv", {"user": ["u3", "u1", "u3"], "item": [1, 2, 3]})
    options = ["--users-file", tmp_path / "users.csv", "--all-items", "--include-seen", "--top-k", 2]
    assert main(command(world, tmp_path / "r.parquet", *options)) == 0
    assert read_table(tmp_path / "r.parquet", [], "r")["user"].tolist() == ["u3", "u3", "u1", "u1"]


def test_bad_options_exit_with_two_and_leave_no_file(world, tmp_path, capsys):
    out = tmp_path / "r.parquet"
    for message, options in (
        ("expected --users U,.. (or --users all) or --users-file FILE, got neither or both", ["--all-items"]),
        ("or --users-file FILE, got neither or both", ["--users", "u1", "--users-file", "f.csv", "--all-items"]),
        ("expected --candidates I,.. or --all-items, got neither or both", ["--users", "u1"]),
        ("or --all-items, got neither or both", ["--users", "u1", "--candidates", "101", "--all-items"]),
        ("--include-seen, got both", ["--users", "u1", "--all-items", "--include-seen", "--exclude-seen"]),
        ("got 'nobody'", ["--users", "u1,nobody", "--all-items"]),
        ("got '999'", ["--users", "all", "--candidates", "999"]),
        ("users_file: expected a file", ["--users-file", tmp_path / "none.csv", "--all-items"]),
        ("retrieve at least 1, got 0", ["--users", "all", "--all-items", "--retrieve", "0"]),
    ):
        assert main(command(world, out, *options)) == 2, options
        assert message in capsys.readouterr().err, options
    assert main(["rank", "--users", "u1", "--all-items"]) == 2 and "--out FILE" in capsys.readouterr().err
    assert main(command(world, tmp_path / "r.txt", "--users", "u1", "--all-items")) == 2
    assert not list(tmp_path.iterdir())
    out.mkdir()
    assert main(command(world, out, "--users", "u1", "--all-items")) == 2
    assert "out: expected a file, got the folder" in capsys.readouterr().err


def test_a_table_that_breaks_off_leaves_nothing(tmp_path):
    def parts():
        yield {"user": np.array([1, 2])}
        raise RuntimeError("the machine went down")

    with pytest.raises(RuntimeError):
        write_parts(tmp_path / "t.parquet", {"user": np.dtype(np.int64)}, parts())
    assert not list(tmp_path.iterdir())
    assert write_parts(tmp_path / "t.parquet", {"user": np.dtype("<U3")}, []) == 0
    assert pq.read_schema(tmp_path / "t.parquet").names == ["user"]

"""Prepared folders: what they hold, the published split reproduced by the rules, atomic writing and broken folders."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import types
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import data_folder, requires

from collm_fast.config import PrepareConfig
from collm_fast.data import history_before, load_dataset, prepare
from collm_fast.data.dataset import SPLITS, Dataset, Split
from collm_fast.data.folder import check_out
from collm_fast.data.history import histories, row_blocks
from collm_fast.data.prepare import number_ids
from collm_fast.data.readers.published import guess_domain, read_published
from collm_fast.data.readers.unpickle import read_frame
from collm_fast.data.splits import WARM_RULES, not_cold

HERE = Path(__file__).parent
TITLE = 'The <UserID> "x"\n\x01 <|im_end|> <TargetItemTitle>'


def write_table(folder: Path, users: int = 6, rows: int = 20, seed: int = 0) -> Path:
    """A CSV of random interactions, unsorted, with ties in time."""
    rng = np.random.default_rng(seed)
    lines = ["user,item,rating,timestamp,title"]
    for user in range(users):
        for item in rng.choice(40, rows, replace=False):
            title = '"' + TITLE.replace('"', '""') + '"' if item == 0 else f"Item {item} (1999)"
            lines.append(f"u{user},{item},{rng.integers(1, 6)},{rng.integers(0, 30)},{title}")
    file = folder / "t.csv"
    file.write_text("\n".join([lines[0], *rng.permutation(lines[1:]).tolist()]) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return prepare(PrepareConfig(source="table", input=write_table(tmp_path), out=tmp_path / "out"))


def rows_of(split: Split) -> list[list[int]]:
    bounds = zip(split.his_offsets[:-1], split.his_offsets[1:], strict=True)
    return [split.his[start:end].tolist() for start, end in bounds]


def test_folder(data: Dataset):
    names = sorted(path.name for path in data.path.iterdir())
    tables = ["interactions", "items", "test", "train", "users", "valid"]
    assert names == sorted([f"{name}.parquet" for name in tables] + ["meta.json"])
    interactions = pq.read_table(data.path / "interactions.parquet")
    assert interactions.column_names == ["user", "item", "rating", "timestamp", "label", "uid", "iid", "split"]
    label = interactions["label"].to_numpy()
    np.testing.assert_array_equal(label, interactions["rating"].to_numpy() >= 4)
    for raw, ids, column in (
        (data.raw_users, interactions["uid"].to_numpy(), "user"),
        (data.raw_items, interactions["iid"].to_numpy(), "item"),
    ):
        assert raw[ids].tolist() == interactions[column].to_pylist()
    items = pq.read_table(data.path / "items.parquet")
    assert items.column_names == ["item", "title", "iid"]
    assert data.titles[1:] == items["title"].to_pylist() and TITLE in data.titles
    train = pq.read_table(data.path / "train.parquet")
    published = ["uid", "iid", "label", "timestamp", "his", "his_title", "title", "not_cold"]
    assert train.column_names == published
    columns = [train[name].to_pylist() for name in ("his", "his_title", "title", "iid")]
    for his, his_title, title, iid in zip(*columns, strict=True):
        assert his[0] == 0 and his_title == [data.titles[item] for item in his] and title == data.titles[iid]
    mode = data.path.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o777 & ~umask


def test_meta(data: Dataset):
    meta = json.loads((data.path / "meta.json").read_text())
    assert meta == data.meta
    assert meta["source"] == "table" and meta["split"]["rule"] == "user" and meta["history"] == data.meta["history"]
    assert meta["history"]["rule"] == "block" and meta["history"]["block"] == 8
    assert meta["counts"]["rows"] == {"train": 96, "valid": 12, "test": 12} and meta["counts"]["users"] == 6
    assert meta["counts"]["liked"]["train"] == int(data.splits["train"].label.sum())
    assert meta["bad_rows"]["count"] == 0 and meta["files"][0]["name"] == "t.csv"
    assert meta["maps"]["users"]["file"] == "users.parquet" and set(meta["warm"]) == set(WARM_RULES)
    assert data.domain == "item" and data.num_users == 7


def test_splits_are_in_time_and_histories_hold_only_the_past(data: Dataset):
    last: dict[int, int] = {}
    for name in SPLITS:
        split = data.splits[name]
        for user in np.unique(split.uid):
            own = split.timestamp[split.uid == user]
            assert (np.diff(own) >= 0).all() and own[0] >= last.get(int(user), -1)
            last[int(user)] = int(own[-1])
    pairs = np.concatenate([np.stack([s.uid, s.iid], 1)[s.label == 1] for s in data.splits.values()])
    liked = set(map(tuple, pairs.tolist()))
    for name in SPLITS:
        split = data.splits[name]
        for user, item, his in zip(split.uid.tolist(), split.iid.tolist(), rows_of(split), strict=True):
            assert item not in his and all((user, place) in liked for place in his)
    np.testing.assert_array_equal(
        data.splits["test"].not_cold, np.isin(data.splits["test"].iid, data.splits["train"].iid)
    )


def test_valid_and_test_rows_of_a_user_share_one_history(data: Dataset):
    for name in ("valid", "test"):
        split = data.splits[name]
        for user in np.unique(split.uid):
            own = {tuple(his) for his, uid in zip(rows_of(split), split.uid, strict=True) if uid == user}
            assert len(own) == 1
            offsets, his = history_before(data, [user]) if name == "test" else (np.array([0]), np.array([]))
            assert name == "valid" or own == {tuple(his.tolist())}


def test_preparing_twice_gives_the_same_bytes(data: Dataset, tmp_path: Path):
    again = prepare(PrepareConfig(source="table", input=tmp_path / "t.csv", out=tmp_path / "again"))
    for file in data.path.iterdir():
        assert file.read_bytes() == (again.path / file.name).read_bytes()
    assert again.fingerprint == data.fingerprint


def test_the_fingerprint_tells_other_raw_ids_apart(data: Dataset):
    users, items = data.raw_users.copy(), data.raw_items.copy()
    users[1], items[1] = "someone else", "999"
    same = replace(data, raw_users=data.raw_users.copy())
    assert same.fingerprint == data.fingerprint
    assert len({d.fingerprint for d in (data, replace(data, raw_users=users), replace(data, raw_items=items))}) == 3


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "collm",
            {"like_threshold": 3.0},
            "--like_threshold only with source ml-100k or .* or table, got 3.0 with 'coll",
        ),
        ("collm", {"max_bad_fraction": 0.5}, "--max_bad_fraction only with source"),
        ("ml-1m", {"user_column": "u"}, "--user_column only with source recbole or table, got 'u' with 'ml-1m'"),
        ("recbole", {"title_column": "name"}, "--title_column only with source table, got 'name' with 'recbole'"),
        ("ml-100k", {"items": Path("i.csv")}, "--items only with source table"),
        ("table", {"allow_pickle": True}, "--allow_pickle only with source collm, got True with 'table'"),
        ("ml-1m", {"history_block": 4}, "--history_block only with --history block, got 4"),
        ("table", {"history_block": 4, "history": "row"}, "--history_block only with --history block, got 4"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    source: Any, options: dict[str, Any], message: str, tmp_path: Path
):
    config = PrepareConfig(source=source, input=write_table(tmp_path), out=tmp_path / "out", **options)
    with pytest.raises(ValueError, match=f"^prepare: expected {message}"):
        prepare(config)
    assert not config.out.exists()


def test_calendar_and_row_rules_for_a_table(tmp_path: Path):
    config = PrepareConfig(
        source="table", input=write_table(tmp_path), out=tmp_path / "out", split="calendar", domain="book"
    )
    data = prepare(config)
    assert data.meta["split"]["rule"] == "calendar" and data.meta["history"]["rule"] == "row" and data.domain == "book"
    assert data.splits["train"].timestamp.max() < data.splits["valid"].timestamp.min()
    assert data.splits["valid"].timestamp.max() < data.splits["test"].timestamp.min()
    _check_running_history(data)


def _joined(data: Dataset) -> tuple[np.ndarray, ...]:
    parts = [data.splits[name] for name in SPLITS]
    uid, iid, label, time = (
        np.concatenate([getattr(p, n) for p in parts]) for n in ("uid", "iid", "label", "timestamp")
    )
    order = np.lexsort((time, uid))
    split = np.repeat([0, 1, 2], [len(part) for part in parts])
    return order, uid[order], iid[order], label[order], split[order]


def _check_running_history(data: Dataset) -> None:
    """Histories, warm marks and numbering of a dataset equal what the rules `row` and not_cold give."""
    order, uid, iid, label, split = _joined(data)
    offsets, values = histories(uid, iid, label == 1, row_blocks(uid))
    expected = [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    found = [his for name in SPLITS for his in rows_of(data.splits[name])]
    assert [found[place] for place in order] == expected
    marks = np.concatenate([data.splits[name].not_cold for name in SPLITS])[order]
    np.testing.assert_array_equal(marks, not_cold(uid, iid, split))
    for ids in (uid, iid):
        np.testing.assert_array_equal(number_ids(ids)[0], ids)


def test_raw_ml_1m_follows_the_published_rules(tmp_path: Path):
    rng = np.random.default_rng(1)
    lines = ["1::1::5::" + str(int(datetime(2000, 4, 25, tzinfo=timezone.utc).timestamp()))]
    first = int(datetime(2001, 6, 1, tzinfo=timezone.utc).timestamp())
    last = int(datetime(2003, 1, 31, tzinfo=timezone.utc).timestamp())
    for user in range(2, 12):
        for item in rng.choice(50, 30, replace=False):
            lines.append(f"{user}::{item}::{rng.integers(1, 6)}::{rng.integers(first, last)}")
    raw = tmp_path / "ml-1m"
    raw.mkdir()
    (raw / "ratings.dat").write_text("\n".join(rng.permutation(lines).tolist()) + "\n")
    (raw / "movies.dat").write_text("".join(f"{item}::Film {item} (1999)::Drama\n" for item in range(49)))
    data = prepare(PrepareConfig(source="ml-1m", input=raw, out=tmp_path / "out"))
    assert data.meta["split"]["rule"] == "calendar" and data.meta["split"]["months"]["train"] == [14, 23]
    assert data.meta["split"]["rows_in_no_split"] == 1 and sum(data.meta["counts"]["rows"].values()) == 300
    assert data.meta["items_without_title"] == 1 and data.titles[data.item_index([49])[0]] == "49"
    assert data.domain == "movie" and data.meta["history"]["rule"] == "row"
    _check_running_history(data)
    # The published form is read back as it is: the same splits under the same numbers.
    copy = prepare(PrepareConfig(source="collm", input=data.path, out=tmp_path / "copy"))
    assert all(copy.splits[name].fingerprint == data.splits[name].fingerprint for name in SPLITS)
    assert copy.titles == data.titles and copy.domain == "movie" and copy.raw_users.tolist() == [-1, *range(1, 11)]


@requires("data")
def test_the_published_files(tmp_path: Path):
    data = prepare(PrepareConfig(source="collm", input=data_folder() / "ml-1m-collm", out=tmp_path / "out"))
    assert data.meta["counts"]["rows"] == {"train": 33891, "valid": 10401, "test": 7331}
    assert (data.num_users, data.num_items, data.domain) == (839, 3256, "movie")
    _check_running_history(data)


@requires("recbole")
def test_ml_100k(tmp_path: Path):
    data = prepare(PrepareConfig(out=tmp_path / "out"))
    counts = data.meta["counts"]
    assert (counts["users"], counts["items"]) == (943, 1682) and sum(counts["rows"].values()) == 100_000
    assert data.user_index([196, "186", np.int64(22)]).tolist() == [196, 186, 22]
    assert data.titles[data.item_index(["1"])[0]] == "Toy Story" and data.domain == "movie"


def test_ids_are_found_by_number_or_text(data: Dataset):
    users = data.user_index(["u3", "u0"])
    assert data.raw_users[users].tolist() == ["u3", "u0"]
    items = data.item_index([39, "7", 8.0])
    assert data.raw_items[items].tolist() == [39, 7, 8]
    assert data.item_index(np.array([39, 7])).tolist() == items[:2].tolist()
    with pytest.raises(ValueError, match="user_index: expected user ids of the dataset, got 'u9' in row 1"):
        data.user_index(["u1", "u9"])
    with pytest.raises(ValueError, match="item_index: expected item ids of the dataset, got 99 in row 0"):
        data.item_index([99])
    for padding in ("", -1, 0):
        with pytest.raises(ValueError, match="_index: expected"):
            data.user_index([padding])


def test_history_before_a_moment(data: Dataset):
    parts = [data.splits[name] for name in SPLITS]
    uid, iid, label, time = (
        np.concatenate([getattr(p, n) for p in parts]) for n in ("uid", "iid", "label", "timestamp")
    )
    order = np.lexsort((time, uid))
    for at in (0, 7, 15.5, 100):
        offsets, his = history_before(data, [3, 1, 3], at)
        for place, user in enumerate((3, 1, 3)):
            wanted = [int(iid[row]) for row in order if uid[row] == user and label[row] and time[row] < at]
            assert his[offsets[place] : offsets[place + 1]].tolist() == wanted
    each, _ = history_before(data, [2, 2], [0, 100])
    assert each[1] == 0 and each[2] == label[uid == 2].sum()
    assert history_before(data, [])[0].tolist() == [0]
    with pytest.raises(ValueError, match=r"user ids in \[1, 6\], got 7 in row 1"):
        history_before(data, [1, 7])
    with pytest.raises(ValueError, match=r"one timestamp or 2 of them, got \(3,\)"):
        history_before(data, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="expected timestamps as numbers of seconds, got '2020-01-01'"):
        history_before(data, [1, 2], "2020-01-01")


def test_take(data: Dataset):
    train = data.splits["train"]
    some = train.take([5, 0, 5])
    assert len(some) == 3 and rows_of(some) == [rows_of(train)[row] for row in (5, 0, 5)]
    mask = train.label == 1
    assert rows_of(train.take(mask)) == [rows_of(train)[row] for row in np.flatnonzero(mask)]
    assert some.fingerprint != train.fingerprint == train.take(np.arange(len(train))).fingerprint


def test_out_must_be_new_or_empty(data: Dataset, tmp_path: Path):
    config = PrepareConfig(source="table", input=tmp_path / "t.csv", out=data.path)
    with pytest.raises(
        ValueError, match="an out folder that is new or empty, got .*out, which holds a prepared dataset"
    ):
        prepare(config)
    with pytest.raises(ValueError, match="which holds other files"):
        check_out(tmp_path)
    with pytest.raises(ValueError, match="which holds other files"):
        check_out(tmp_path / "t.csv")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len(prepare(PrepareConfig(source="table", input=tmp_path / "t.csv", out=empty)).titles) == data.num_items


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = PrepareConfig(source="table", input=write_table(tmp_path), out=tmp_path / "deep" / "out")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("collm_fast.data.folder._write_split", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare(config)
    assert list((tmp_path / "deep").iterdir()) == []


def test_requests_that_cannot_be_met(tmp_path: Path):
    out, file = tmp_path / "out", write_table(tmp_path, rows=4)
    cases = {
        "a later version": PrepareConfig(source="amazon", input=file, out=out),
        "--input with the published files": PrepareConfig(source="collm", out=out),
        "a folder with the published files, got": PrepareConfig(source="collm", input=file, out=out),
        "--split calendar for source 'collm'": PrepareConfig(source="collm", input=tmp_path, out=out, split="user"),
        "--history row for source 'collm'": PrepareConfig(source="collm", input=tmp_path, out=out, history="block"),
        "train.parquet or train_ood2.pkl in": PrepareConfig(source="collm", input=tmp_path, out=out),
        "rows in every split, got an empty valid .*--split calendar": PrepareConfig(
            source="table", input=file, out=out
        ),
    }
    for message, config in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            prepare(config)
        assert "\n" not in str(caught.value)
    assert not out.exists()


def rewrite(file: Path, column: str, row: int | None, value: Any) -> None:
    """Change one value of a Parquet file (row None: drop the column)."""
    table = pq.read_table(file)
    place = table.column_names.index(column)
    if row is None:
        table = table.remove_column(place)
    else:
        values = table.column(place).to_pylist()
        values[row] = value
        table = table.set_column(place, column, pa.array(values))
    pq.write_table(table, file)


DAMAGE = [
    ("train.parquet", "uid", 3, 7, r"uid in \[1, 6\] in train.parquet, got 7 in row 3"),
    ("valid.parquet", "iid", 0, 0, r"iid in \[1, \d+\] in valid.parquet, got 0 in row 0"),
    ("test.parquet", "label", 1, 2, r"label in \[0, 1\] in test.parquet, got 2 in row 1"),
    ("test.parquet", "label", 1, None, "a value in every row of label in test.parquet, got null"),
    ("train.parquet", "his", 2, [0, 99], r"his in \[0, \d+\] in train.parquet, got 99 in row 2"),
    ("train.parquet", "his", None, None, "column 'his' in .*train.parquet, got uid, iid"),
    ("items.parquet", "title", 0, None, "a title in every row of items.parquet"),
    ("users.parquet", "uid", 0, 5, "ids 1, 2, .. in users.parquet"),
]


@pytest.mark.parametrize("file,column,row,value,message", DAMAGE)
def test_a_changed_folder_is_refused(data: Dataset, file: str, column: str, row: int | None, value: Any, message: str):
    rewrite(data.path / file, column, row, value)
    with pytest.raises(ValueError, match=f"{file} as prepare wrote it, got other contents"):
        load_dataset(data.path)
    meta = {**data.meta, "hashes": {}}  # as a hand-made folder would be
    (data.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(data.path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("load_dataset: expected ")


def test_a_broken_folder_is_refused(data: Dataset, tmp_path: Path):
    def broken(name: str, content: bytes | None, message: str) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(data.path, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_dataset(copy)
        assert "\n" not in str(caught.value)
        shutil.rmtree(copy)

    broken("meta.json", None, "a folder that prepare wrote, got .* without meta.json")
    broken("meta.json", b"{", "JSON in .*meta.json")
    broken("meta.json", b"[]", "format 1 in .*meta.json, got 'list'")
    broken("meta.json", b'{"format": 9}', "format 1 in .*meta.json, got 9")
    broken("test.parquet", None, "test.parquet in .*, got no such file")
    broken("test.parquet", b"x", "as prepare wrote it")
    meta = json.dumps({**data.meta, "hashes": {}})
    (data.path / "meta.json").write_text(meta)
    broken("test.parquet", b"x", "Parquet in .*test.parquet")
    train = pq.read_table(data.path / "train.parquet")
    pq.write_table(train.slice(0, 0), data.path / "train.parquet")
    with pytest.raises(ValueError, match="rows in .*train.parquet, got an empty split"):
        load_dataset(data.path)


def publish(folder: Path, source: Path) -> None:
    for name in SPLITS:
        shutil.copy(source, folder / f"{name}_ood2.pkl")


@pytest.mark.parametrize("name", ["pandas15_protocol2.pkl", "pandas22_protocol5.pkl"])
def test_published_pickles_only_on_request(tmp_path: Path, name: str):
    # Written by pandas 1.5.3 and 2.2.3: three rows with the published columns and `flag`.
    publish(tmp_path, HERE / name)
    config = PrepareConfig(source="collm", input=tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match="--allow_pickle true to read .*train_ood2.pkl, got a pickle without it"):
        prepare(config)
    data = prepare(PrepareConfig(source="collm", input=tmp_path, out=tmp_path / "out", allow_pickle=True))
    train = data.splits["train"]
    assert train.uid.tolist() == [1, 1, 2] and train.not_cold.tolist() == [True, True, False]
    assert rows_of(train) == [[], [1], []] and data.titles == ["", 'A "quoted" title (1990)', "B (1991)"]


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo no > /dev/null",)


def test_a_pickle_can_name_nothing_else(tmp_path: Path):
    good = (HERE / "pandas22_protocol5.pkl").read_bytes()
    cases = {
        pickle.dumps(_Evil()): "a pickled table of numbers, text and lists in .*, got .*system",
        good[: len(good) // 2]: "a pickled table of numbers|a complete pickle in",
        b"": "a complete pickle in",
        pickle.dumps({"a": 1}): r"a pandas DataFrame in .*, got another layout \(a dict\)",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.": "got the codec 'rot13'",
    }
    file = tmp_path / "x.pkl"
    for content, message in cases.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_frame(file)


def test_the_layout_of_older_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before 1.3 the block manager was pickled by its state; stand-ins under pandas' names make such a pickle."""

    def module(name: str, **content: Any) -> None:
        for parent in ("pandas", "pandas.core", "pandas.core.indexes", "pandas.core.internals"):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        made = types.ModuleType(name)
        for key, value in content.items():
            value.__module__, value.__qualname__ = name, key
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)

    def new_index(cls: type, described: dict[str, Any]) -> Any:
        return None

    Index, Manager, Frame = (type(name, (), {}) for name in ("Index", "BlockManager", "DataFrame"))
    module("pandas.core.indexes.base", Index=Index, _new_Index=new_index)
    module("pandas.core.internals.managers", BlockManager=Manager)
    module("pandas.core.frame", DataFrame=Frame)

    class Axis:
        def __init__(self, described: dict[str, Any]) -> None:
            self.described = described

        def __reduce__(self) -> tuple[Any, ...]:
            return new_index, (Index, self.described)

    axes = [Axis({"data": np.array(["a", "b"], object)}), Axis({"start": 0, "stop": 2, "step": 1})]
    blocks = [{"values": np.array([[1, 2]]), "mgr_locs": slice(1, 2, 1)}]
    blocks.append({"values": np.array([["x", [1]]], object), "mgr_locs": slice(0, 1, 1)})
    manager, frame = Manager(), Frame()
    manager.state = None
    Manager.__getstate__ = lambda self: (axes, [], [], {"0.14.1": {"axes": axes, "blocks": blocks}})  # type: ignore
    Frame.__getstate__ = lambda self: {"_data": manager}  # type: ignore[attr-defined]
    file = tmp_path / "old.pkl"
    file.write_bytes(pickle.dumps(frame))
    found = read_frame(file)
    assert found["b"].tolist() == [1, 2] and found["a"].tolist() == ["x", [1]]


PUBLISHED_DAMAGE = [
    ("uid", 0, 0, r"uid in \[1, \d+\] in .*train.parquet, got 0 in row 0"),
    ("label", 1, 5, r"label in \[0, 1\] in .*, got 5 in row 1"),
    ("iid", 1, 1.5, "whole numbers in iid of .*train.parquet, got float64"),
    ("uid", 1, None, "whole numbers in uid"),
    ("his", 1, [-2], r"item ids in his of .*, got -2 in row 1"),
    ("his_title", 1, ["", "", ""], "as many his_title as his in .*, got other lengths in row 1"),
    ("title", 1, None, "text in title of .*, got None in row 1"),
    ("not_cold", None, None, "column 'not_cold' in .*train.parquet"),
]


@pytest.mark.parametrize("column,row,value,message", PUBLISHED_DAMAGE)
def test_damaged_published_files(data: Dataset, column: str, row: int | None, value: Any, message: str):
    rewrite(data.path / "train.parquet", column, row, value)
    with pytest.raises(ValueError, match=message):
        read_published(data.path, False)


def test_published_files_of_another_kind(data: Dataset):
    pq.write_table(pq.read_table(data.path / "test.parquet").slice(0, 0), data.path / "test.parquet")
    with pytest.raises(ValueError, match="rows in .*test.parquet, got none"):
        read_published(data.path, False)
    (data.path / "valid.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="Parquet in .*valid.parquet"):
        read_published(data.path, False)
    assert guess_domain(["Dune", "Emma"]) == "book" and guess_domain(["Dune (1984)", "Emma"]) == "book"

"""Every reader: the same interactions from each format, bad rows with their lines, and one-line errors."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import requires

from collm_fast.config import PrepareConfig
from collm_fast.data.readers import read_raw
from collm_fast.data.readers.raw import text_id

# (user, item, rating, timestamp); titles hold what breaks naive readers.
ROWS = [(7, 3, 5, 100), (7, 12, 3, 90), (8, 3, 4, 95), (8, 5, 1, 95)]
TITLES = {3: "Misérables, Les (1995)", 12: "A|B <UserID>", 5: "Plain\x85title"}


def ml_100k(folder: Path) -> Path:
    folder.mkdir()
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ROWS))
    titles = {**TITLES, 12: "AB"}
    lines = "".join(f"{item}|{title}|01-Jan-1995||url|0|1\n" for item, title in titles.items())
    (folder / "u.item").write_text(lines, encoding="latin-1")
    return folder


def ml_1m(folder: Path) -> Path:
    folder.mkdir()
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ROWS))
    lines = "".join(f"{item}::{title}::Drama|War\n" for item, title in TITLES.items())
    (folder / "movies.dat").write_text(lines, encoding="latin-1", newline="\n")
    return folder


def recbole(folder: Path) -> Path:
    folder.mkdir()
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "x.inter").write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in ROWS))
    lines = "".join(f"{item}\t{title}\t1990\n" for item, title in TITLES.items())
    (folder / "x.item").write_text("item_id:token\tmovie_title:token_seq\tyear:token\n" + lines, encoding="utf-8")
    return folder


def csv_table(folder: Path) -> Path:
    folder.mkdir()
    lines = "".join(f'{u},{i},{r},{t},"{TITLES[i]}"\n' for u, i, r, t in ROWS)
    (folder / "t.csv").write_text("user,item,rating,timestamp,title\n" + lines, encoding="utf-8")
    return folder / "t.csv"


def tsv_table(folder: Path) -> Path:
    folder.mkdir()
    lines = "".join(f"{r}\t{u}\t{t}\t{i}\n" for u, i, r, t in ROWS)
    (folder / "t.tsv").write_text("rating\tuser\ttimestamp\titem\n" + lines, encoding="utf-8-sig")
    return folder / "t.tsv"


def parquet_table(folder: Path) -> Path:
    folder.mkdir()
    user, item, rating, time = zip(*ROWS, strict=True)
    columns = {"user": user, "item": [float(i) for i in item], "rating": rating, "title": [TITLES[i] for i in item]}
    table = pa.table({**columns, "timestamp": pa.array([1000 * t for t in time], pa.timestamp("ms"))})
    pq.write_table(table, folder / "t.parquet")
    return folder / "t.parquet"


FORMATS = {
    "ml-100k": ml_100k,
    "ml-1m": ml_1m,
    "recbole": recbole,
    "table csv": csv_table,
    "table tsv": tsv_table,
    "table parquet": parquet_table,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str):
    raw = read_raw(PrepareConfig(source=name.split()[0], input=FORMATS[name](tmp_path / "in")))  # type: ignore[arg-type]
    rows = list(zip(raw.user.tolist(), raw.item.tolist(), raw.rating.tolist(), raw.timestamp.tolist(), strict=True))
    assert rows == ROWS
    assert raw.user.dtype == raw.timestamp.dtype == np.int64
    if name == "table tsv":
        assert raw.titles == {}
    else:
        assert raw.titles["3"] == TITLES[3] and raw.titles["5"] == TITLES[5]
    assert raw.domain == ("movie" if name.startswith("ml") else "item")
    assert raw.bad.report() == {"rows": 4, "count": 0, "reasons": {}, "first": []}


def test_ml_100k_reads_recbole_files_too(tmp_path: Path):
    raw = read_raw(PrepareConfig(source="ml-100k", input=recbole(tmp_path / "in")))
    assert raw.domain == "movie" and len(raw.user) == 4


@requires("recbole")
def test_the_installed_recbole_has_ml_100k_and_is_not_imported():
    import subprocess
    import sys

    code = (
        "import sys; from collm_fast.config import PrepareConfig; from collm_fast.data.readers import read_raw;"
        "raw = read_raw(PrepareConfig()); assert 'recbole' not in sys.modules;"
        "print(len(raw.user), len(set(raw.user.tolist())), len(set(raw.item.tolist())), raw.titles['1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "100000 943 1682 Toy Story"


def test_ml_100k_without_any_copy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="u.data and u.item, or ml-100k.inter"):
        read_raw(PrepareConfig())


def test_text_ids_stay_text(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text("user,item,rating,timestamp\nann,007,1,1\nbob,12,5,2\n")
    raw = read_raw(PrepareConfig(source="table", input=file))
    assert raw.user.tolist() == ["ann", "bob"] and raw.item.tolist() == ["007", "12"]


def test_titles_from_a_second_file_and_named_columns(tmp_path: Path):
    file, items = tmp_path / "t.csv", tmp_path / "items.csv"
    file.write_text("who,what,stars,when\n1,2,5,9\n")
    items.write_text('what,name\n2,"a ""quoted""\ntitle"\n')
    config = PrepareConfig(
        source="table",
        input=file,
        items=items,
        user_column="who",
        item_column="what",
        rating_column="stars",
        timestamp_column="when",
        title_column="name",
    )
    assert read_raw(config).titles == {"2": 'a "quoted"\ntitle'}


def test_recbole_takes_other_column_names_and_needs_no_titles(tmp_path: Path):
    file = tmp_path / "x.inter"
    file.write_text("u:token\titem_id:token\tlabel:float\ttimestamp:float\n1\t2\t5\t9\n")
    config = PrepareConfig(source="recbole", input=file, user_column="u", rating_column="label", domain="book")
    raw = read_raw(config)
    assert raw.user.tolist() == [1] and raw.titles == {} and raw.domain == "book"
    (tmp_path / "x.item").write_text("item_id:token\tyear:token\n2\t1990\n")
    assert read_raw(config).titles == {}


BAD = {
    "1,2": "expected 4 fields, got 2",
    ",2,3,4": "expected a user id that is not missing or negative, got ''",
    "-1,2,3,4": "expected a user id that is not missing or negative, got '-1'",
    "1,NaN,3,4": "expected an item id that is not missing or negative, got 'NaN'",
    "1,2,many,4": "expected a number as rating, got 'many'",
    "1,2,inf,4": "expected a number as rating, got 'inf'",
    "1,2,3,": "expected a number of seconds as timestamp, got ''",
    "1,2,3,1e30": "expected a number of seconds as timestamp, got '1e30'",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_left_out_and_named(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "t.csv"
    file.write_text("user,item,rating,timestamp\n1,2,3,4\n" + line + "\n" + "1,2,3,4\n" * 8)
    with caplog.at_level(logging.WARNING):
        raw = read_raw(PrepareConfig(source="table", input=file, max_bad_fraction=0.1))
    assert len(raw.user) == 9 and raw.bad.count == 1 and raw.bad.total == 10
    assert raw.bad.first == [{"file": "t.csv", "line": 3, "reason": BAD[line]}]
    assert f"left out 1 of 10 rows: t.csv line 3: {BAD[line]}" in caplog.text
    with pytest.raises(ValueError, match=r"at most 0.01 of the rows of .*t.csv to be bad, got 1 of 10 \(t.csv line 3"):
        read_raw(PrepareConfig(source="table", input=file))


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_bytes(
        b"user,item,rating,timestamp,title\n" + b"a,b,3,4,ok\n" * 4 + b"a\xff,b,3,4,x\n" + b"a,c,3,4,\xff\n"
    )
    raw = read_raw(PrepareConfig(source="table", input=file, max_bad_fraction=0.5))
    assert len(raw.user) == 5 and raw.bad.count == 1 and raw.titles == {"b": "ok"}


def test_a_file_of_bad_rows_is_an_error_whatever_the_limit(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text("user,item,rating,timestamp\n1,2,x,4\n")
    with pytest.raises(ValueError, match="got 1 of 1"):
        read_raw(PrepareConfig(source="table", input=file, max_bad_fraction=0.99))


def test_ids_as_text():
    assert text_id(None) is None and text_id(float("nan")) is None and text_id("a\x00") is None
    assert text_id(3.0) == "3" and text_id(3.5) == "3.5" and text_id(" x ") == "x" and text_id(0) == "0"
    assert text_id("-x") == "-x" and text_id(-4) is None


def _errors(tmp_path: Path) -> dict[str, tuple[PrepareConfig, str]]:
    def table(name: str, text: str, **options: object) -> PrepareConfig:
        (tmp_path / name).write_text(text)
        return PrepareConfig(source="table", input=tmp_path / name, **options)  # type: ignore[arg-type]

    header = "user,item,rating,timestamp\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    half = tmp_path / "half"
    half.mkdir()
    (half / "ratings.dat").write_text("1::2::3::4\n")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "ratings.dat").write_text("1::2::3::4\n")
    (whole / "movies.dat").write_text("one::Title::x\n\n3\n")
    items, short = tmp_path / "i.csv", tmp_path / "short.csv"
    items.write_text("item,name\n1,x\n")
    short.write_text("item,title\n1\n")
    broken = tmp_path / "broken.item"
    broken.write_text("item_id:token\ttitle:token_seq\n1\n")
    (tmp_path / "broken.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t4\n")
    return {
        "missing": (PrepareConfig(source="table", input=tmp_path / "nowhere.csv"), "--input to exist, got"),
        "none": (PrepareConfig(source="table"), "--input for source 'table', got none"),
        "folder": (PrepareConfig(source="table", input=empty), "which is no file"),
        "suffix": (table("t.xls", ""), r"ends in .csv, .tsv, .txt or .parquet, got .*t.xls"),
        "column": (
            table("a.csv", "user,item,stars,timestamp\n"),
            r"'rating' in .*a.csv, got .*'stars'.*--rating_column",
        ),
        "empty": (table("b.csv", header), "expected rows in .*b.csv, got none"),
        "nothing": (table("c.csv", ""), "expected column 'user'"),
        "quote": (table("d.csv", header + '1,2,3,"' + "x" * 200_000), "expected CSV in .*d.csv line 2"),
        "parquet": (table("e.parquet", "no parquet"), "expected Parquet in .*e.parquet"),
        "items": (table("f.csv", header + "1,1,1,1\n", items=items), "'title' in .*i.csv, got 'item', 'name'"),
        "item row": (table("g.csv", header + "1,1,1,1\n", items=short), "2 UTF-8 fields with an item id in .*line 2"),
        "ml-100k": (PrepareConfig(source="ml-100k", input=empty), "exactly one, got .*empty with 0"),
        "ml-1m": (
            PrepareConfig(source="ml-1m", input=half),
            "expected ratings.dat and movies.dat in .* got no movies.dat",
        ),
        "movies": (
            PrepareConfig(source="ml-1m", input=whole),
            "an item id and a title in .*movies.dat line 3, got '3'",
        ),
        "item file": (PrepareConfig(source="recbole", input=tmp_path / "broken.inter"), "in .*broken.item line 2"),
    }


def test_errors_name_the_file_and_the_rule(tmp_path: Path):
    for name, (config, message) in _errors(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            read_raw(config)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("prepare: expected "), name

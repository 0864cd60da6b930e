"""Small tables: both formats, and what a bad file says."""

from __future__ import annotations

import numpy as np
import pytest

from collm_fast.io.tables import read_table, write_table


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    write_table(path, {"user": np.array([3, 1]), "item": ["a", "b,c"], "score": np.array([0.5, 0.25])})
    read = read_table(path, ["user", "item"], "pairs")
    assert read["user"].tolist() == ([3, 1] if suffix == ".parquet" else ["3", "1"]) and read["item"].tolist() == [
        "a",
        "b,c",
    ]
    assert read["score"].tolist() == [0.5, 0.25]


def test_ids_of_a_csv_file_stay_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("user,item,score\n007,1e3,0.5\n 12 ,NA,2\n")
    read = read_table(path, ["user", "item"], "pairs")
    assert read["user"].tolist() == ["007", "12"] and read["item"].tolist() == ["1e3", "NA"]
    assert read["score"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"pairs: expected a file named \*.parquet or \*.csv, got"),
        ("x.parquet", b"PAR1", "pairs: expected Parquet in"),
        ("x.csv", b"", "pairs: expected CSV in"),
        ("x.csv", b"user,thing\n1,2\n", "pairs: expected a column 'item' in .* got user, thing"),
        ("x.csv", b"user,item\n1,2\n3,\n", "pairs: expected a value in column 'item' of .* got none in row 1"),
        ("x.csv", b"user,item\n", "pairs: expected at least one row"),
        ("missing.csv", None, "which does not exist"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_table(path, ["user", "item"], "pairs")
    assert "\n" not in str(error.value)

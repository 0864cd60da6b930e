"""Atomic writes: whole files or nothing, the usual permissions, no temporary file left behind."""

from __future__ import annotations

import os

import pytest

from collm_fast.io.atomic import write_atomic


def test_writes_bytes_text_and_by_function(tmp_path):
    assert write_atomic(tmp_path / "new" / "a.bin", b"\x00\x01").read_bytes() == b"\x00\x01"
    assert write_atomic(tmp_path / "b.txt", "ä").read_text(encoding="utf-8") == "ä"
    assert write_atomic(str(tmp_path / "c.txt"), lambda path: path.write_text("c")).read_text() == "c"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "c.txt", "new"]


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_atomic(tmp_path / "a.txt", "old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_files_have_the_usual_mode(tmp_path):
    mask = os.umask(0o022)
    try:
        assert write_atomic(tmp_path / "a", "x").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)

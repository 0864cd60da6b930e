"""MovieLens as GroupLens distributes it: ml-100k (u.data, u.item) and ml-1m (ratings.dat, movies.dat). Floor F2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from collm_fast.data.readers.raw import BadRows, RawData, assemble, collect, text_id


def _lines(file: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    # Only \n ends a line: latin-1 text may hold \x85, which str.splitlines would take for a line end.
    with file.open(encoding="latin-1", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            text = line.rstrip("\r\n")
            if text:
                yield number, text.split(separator)


def _titles(file: Path, separator: str) -> dict[str, str]:
    titles: dict[str, str] = {}
    for line, fields in _lines(file, separator):
        item = text_id(fields[0])
        if item is None or len(fields) < 2:
            raise ValueError(f"prepare: expected an item id and a title in {file} line {line}, got {fields[0]!r}")
        titles.setdefault(item, fields[1])
    return titles


def _read(ratings: Path, movies: Path, separators: tuple[str, str], max_bad_fraction: float) -> RawData:
    for file in (ratings, movies):
        if not file.is_file():
            raise ValueError(f"prepare: expected {ratings.name} and {movies.name} in {file.parent}, got no {file.name}")
    bad = BadRows()
    columns = collect(_lines(ratings, separators[0]), (0, 1, 2, 3), 4, ratings, bad)
    bad.finish(max_bad_fraction, ratings)
    return assemble(columns, _titles(movies, separators[1]), [ratings, movies], bad, "movie")


def read_ml_100k(folder: Path, max_bad_fraction: float) -> RawData:
    """GroupLens' raw ml-100k folder; files are latin-1."""
    return _read(folder / "u.data", folder / "u.item", ("\t", "|"), max_bad_fraction)


def read_ml_1m(folder: Path, max_bad_fraction: float) -> RawData:
    """GroupLens' raw ml-1m folder; files are latin-1."""
    return _read(folder / "ratings.dat", folder / "movies.dat", ("::", "::"), max_bad_fraction)

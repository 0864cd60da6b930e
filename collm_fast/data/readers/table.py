"""Any CSV, TSV or Parquet file with named columns; titles from a column of it or from a second file. Floor F2."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collm_fast.config import PrepareConfig
from collm_fast.data.readers.raw import BadRows, RawData, assemble, collect, find_column, storable, text_id


def read_table(config: PrepareConfig, path: Path) -> RawData:
    """Read the interactions of `path` by the column names in `config`, and titles from `config.items` if it is given.

    Raises: ValueError for a file that is no CSV or Parquet, a missing column, or too many bad rows.
    """
    header, rows = open_table(path)
    names = {
        "--user_column": config.user_column,
        "--item_column": config.item_column,
        "--rating_column": config.rating_column,
        "--timestamp_column": config.timestamp_column,
    }
    places = [find_column(name, header, path, option) for option, name in names.items()]
    bad, files, titles = BadRows(), [path], dict[str, str]()
    if config.items is None and config.title_column in header:
        rows = _keep_titles(rows, places[1], header.index(config.title_column), titles)
    columns = collect(rows, places, len(header), path, bad)
    bad.finish(config.max_bad_fraction, path)
    if config.items is not None:
        files.append(config.items)
        titles = _item_titles(config.items, config.item_column, config.title_column)
    return assemble(columns, titles, files, bad, "item")


def open_table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[Any]]]]:
    """(column names, rows as (line or row number, fields)) of a CSV, TSV or Parquet file."""
    if not path.is_file():
        raise ValueError(f"prepare: expected a CSV, TSV or Parquet file, got {path}, which is no file")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _open_parquet(path)
    if path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        raise ValueError(f"prepare: expected a file that ends in .csv, .tsv, .txt or .parquet, got {path}")
    rows = _csv_rows(path)
    _, header = next(rows, (1, []))
    return [str(name).strip() for name in header], rows


def _csv_rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
    # A byte that is not UTF-8 becomes a lone surrogate, which text_id and storable refuse: one bad row, not a crash.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        delimiter = "," if path.suffix.lower() == ".csv" else "\t"
        reader = csv.reader(stream, delimiter=delimiter)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except csv.Error as error:
            raise ValueError(f"prepare: expected CSV in {path} line {reader.line_num}, got {error}") from error


def _open_parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, list[Any]]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"prepare: expected Parquet in {path}, got {str(error).splitlines()[0]}") from error
    columns = []
    for column in table.columns:
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
        columns.append(column.to_pylist())
    return table.column_names, ((row, list(fields)) for row, fields in enumerate(zip(*columns, strict=True)))


def _keep_titles(
    rows: Iterator[tuple[int, list[Any]]], at_item: int, at_title: int, titles: dict[str, str]
) -> Iterator[tuple[int, list[Any]]]:
    """Pass the rows on and note the first title of each item on the way."""
    for line, fields in rows:
        if len(fields) > max(at_item, at_title) and fields[at_title] is not None:
            item, title = text_id(fields[at_item]), str(fields[at_title])
            if item is not None and storable(title):
                titles.setdefault(item, title)
        yield line, fields


def _item_titles(path: Path, item_column: str, title_column: str) -> dict[str, str]:
    header, rows = open_table(path)
    at_item = find_column(item_column, header, path, "--item_column")
    at_title = find_column(title_column, header, path, "--title_column")
    titles: dict[str, str] = {}
    for line, fields in rows:
        item = text_id(fields[at_item]) if len(fields) == len(header) else None
        if item is None or fields[at_title] is None or not storable(str(fields[at_title])):
            raise ValueError(f"prepare: expected {len(header)} UTF-8 fields with an item id in {path} line {line}")
        titles.setdefault(item, str(fields[at_title]))
    return titles

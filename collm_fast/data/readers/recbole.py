"""RecBole's atomic files: NAME.inter and, for titles, NAME.item; tab-separated with typed column names. Floor F2."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from collm_fast.data.readers.raw import BadRows, RawData, assemble, collect, find_column, storable, text_id

COLUMNS = ("user_id", "item_id", "rating", "timestamp")


def installed_ml_100k() -> Path | None:
    """The MovieLens-100K folder inside an installed `recbole`, which is found without importing it."""
    spec = importlib.util.find_spec("recbole")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if (folder / "ml-100k.inter").is_file():
            return folder
    return None


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            text = line.rstrip("\r\n")
            if text or number == 1:
                yield number, text.split("\t")


def _header(rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    _, fields = next(rows, (1, [""]))
    return [name.rsplit(":", 1)[0] for name in fields]


def atomic_file(path: Path) -> Path:
    """The .inter file that a path (the file, or a folder with exactly one) means."""
    if path.is_file() and path.suffix == ".inter":
        return path
    found = sorted(path.glob("*.inter")) if path.is_dir() else []
    if len(found) != 1:
        raise ValueError(f"prepare: expected a .inter file or a folder with exactly one, got {path} with {len(found)}")
    return found[0]


def read_recbole(path: Path, max_bad_fraction: float, domain: str, columns: tuple[str, ...] = COLUMNS) -> RawData:
    """Read NAME.inter, and titles from NAME.item where that file has a title or name column."""
    inter = atomic_file(path)
    rows = _rows(inter)
    header = _header(rows)
    places = [find_column(name, header, inter) for name in columns]
    bad = BadRows()
    found = collect(rows, places, len(header), inter, bad)
    bad.finish(max_bad_fraction, inter)
    items = inter.with_suffix(".item")
    if not items.is_file():
        return assemble(found, {}, [inter], bad, domain)
    return assemble(found, _titles(items, columns[1]), [inter, items], bad, domain)


def _titles(file: Path, item_column: str) -> dict[str, str]:
    rows = _rows(file)
    header = _header(rows)
    at_item = find_column(item_column, header, file)
    named = [place for place, name in enumerate(header) if "title" in name.lower() or "name" in name.lower()]
    titles: dict[str, str] = {}
    if not named:
        return titles
    for line, fields in rows:
        item = text_id(fields[at_item]) if len(fields) == len(header) else None
        if item is None or not storable(fields[named[0]]):
            raise ValueError(f"prepare: expected {len(header)} UTF-8 fields with an item id in {file} line {line}")
        titles.setdefault(item, fields[named[0]])
    return titles

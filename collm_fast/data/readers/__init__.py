"""Readers: from a source's own files to `RawData` (raw.py says what that is). Splitting is data/splits.py. Floor F2."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from collm_fast.config import PrepareConfig
from collm_fast.data.readers.movielens import read_ml_1m, read_ml_100k
from collm_fast.data.readers.raw import RawData
from collm_fast.data.readers.recbole import COLUMNS, installed_ml_100k, read_recbole
from collm_fast.data.readers.table import read_table

__all__ = ["RawData", "read_raw"]


def read_raw(config: PrepareConfig) -> RawData:
    """Read `config.input` as `config.source`; every source but `collm`, whose splits are published ready-made."""
    path = config.input
    if path is not None and not path.exists():
        raise ValueError(f"prepare: expected --input to exist, got {path}")
    if config.source == "ml-100k":
        return _ml_100k(path, config.max_bad_fraction)
    if path is None:
        raise ValueError(f"prepare: expected --input for source {config.source!r}, got none")
    if config.source == "ml-1m":
        return read_ml_1m(path, config.max_bad_fraction)
    if config.source == "recbole":
        return read_recbole(path, config.max_bad_fraction, config.domain or "item", _recbole_columns(config))
    return read_table(config, path)


def _ml_100k(path: Path | None, max_bad_fraction: float) -> RawData:
    path = path or installed_ml_100k()
    if path is None:
        raise ValueError(
            "prepare: expected --input with MovieLens-100K (u.data and u.item, or ml-100k.inter), or an installed "
            "recbole package, which carries a copy (pip install --no-deps recbole), got neither"
        )
    if (path / "u.data").is_file():
        return read_ml_100k(path, max_bad_fraction)
    return replace(read_recbole(path, max_bad_fraction, "movie"), domain="movie")


def _recbole_columns(config: PrepareConfig) -> tuple[str, ...]:
    """RecBole's names, except where the user chose others than the defaults of PrepareConfig."""
    default = {field.name: field.default for field in fields(PrepareConfig)}
    names = ("user_column", "item_column", "rating_column", "timestamp_column")
    return tuple(
        usual if getattr(config, name) == default[name] else getattr(config, name)
        for name, usual in zip(names, COLUMNS, strict=True)
    )

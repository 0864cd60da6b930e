"""A run folder on disk: its files, the record of what is done, and who may write into it.

    config.yaml  metrics.json  run.json  history.json  events/  adapter/  mapper.safetensors  cf.safetensors
    predictions/  checkpoints/  report.html  report.md  *.png

metrics.json holds the numbers and nothing else; run.json what else is known of the run (rows, seconds, versions,
fingerprints, finished stages). Contents are made elsewhere. Floor F1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from collm_fast.io.atomic import write_atomic

# What may differ when a run is resumed: none of it changes a number of a part that is already done.
FREE_KEYS = ("resume", "evaluate_only", "checkpoint_minutes", "stage", "ablations", "device", "out")


class RunFolder:
    """One run folder; every write is atomic, `record` is run.json as it stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = self._read_json("run.json")
        self.metrics: dict[str, Any] = self._read_json("metrics.json")

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether `path` holds a run, of `train` or of `fit-cf`."""
        return any((path / name).exists() for name in ("config.yaml", "metrics.json"))

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A folder that `train` wrote.

        Raises: ValueError where there is none.
        """
        if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
            raise ValueError(f"{path}: expected a run folder with config.yaml and run.json, got none")
        return cls(path)

    @classmethod
    def check_new(
        cls, path: Path, config: Mapping[str, Any], resume: bool, defaults: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether to continue what `path` holds; writes nothing.

        Args: defaults: what keys mean that a run of an earlier version does not name.
        Raises: ValueError if it holds a run and may not be continued, or holds one of another configuration.
        """
        first = next((place for place in (path, *path.parents) if place.exists()), path)
        if first.exists() and not first.is_dir():
            raise ValueError(f"out: expected a folder, got the file {first}")
        if not cls.holds_run(path):
            return False
        if not resume:
            raise ValueError(f"out: expected a folder without a run, got {path}; --resume auto continues it")
        held = _completed(read_yaml(path / "config.yaml"), defaults or {})
        for key in sorted(config.keys() | held.keys()):
            if key not in FREE_KEYS and config.get(key) != held.get(key):
                name, now, then = _first_difference(key, config.get(key), held.get(key))
                raise ValueError(f"{name}: expected {then!r} as in the run to be resumed, {path}, got {now!r}")
        return True

    def config(self) -> dict[str, Any]:
        """The nested values of config.yaml.

        Raises: ValueError for a file that is no YAML mapping.
        """
        return read_yaml(self.path / "config.yaml")

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_atomic(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def update(self, **values: Any) -> None:
        """Set keys of run.json; a mapping is merged into the one that is there."""
        for key, value in values.items():
            old = self.record.get(key)
            self.record[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        self.write_json("run.json", self.record)

    def add_metrics(self, row: str, split: str, table: Mapping[str, Any]) -> None:
        self.metrics.setdefault(row, {})[split] = dict(table)
        self.write_json("metrics.json", self.metrics)

    def write_json(self, name: str, value: Any) -> None:
        # allow_nan=False: a NaN in a result is a bug here, and no JSON elsewhere.
        write_atomic(self.path / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        return self._read_json(name)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
        return value


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans; yes, no, on and off are text, as in `loss: yes`."""


_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; yes, no, on and off are text.

    Raises: ValueError naming the file, and the line where it is no YAML.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}: expected YAML, got {getattr(error, 'problem', error)}{where}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: expected a YAML mapping of names, got {type(values).__name__}")
    return values


def _completed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, with what they do not name from `defaults`, in nested mappings too."""
    nested = {
        key: _completed(value, defaults[key])
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return {**defaults, **values, **nested}


def _first_difference(key: str, now: Any, then: Any) -> tuple[str, Any, Any]:
    if isinstance(now, dict) and isinstance(then, dict):
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                return _first_difference(f"{key}.{name}", now.get(name), then.get(name))
    return key, now, then

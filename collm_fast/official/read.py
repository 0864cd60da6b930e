"""An official configuration file with the launcher's `--options` over it, as nested plain values. Floor F4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from collm_fast.config import nearest
from collm_fast.official.fields import KNOWN, leaves


def read_config(path: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """The nested values of an official YAML with `--options` over them, as its launcher merges them.

    Args: options: `key=value` each, dotted, or `key value` in turn; values are read as YAML.
    Raises: ValueError for a file that is no YAML mapping of mappings, or an option that no field has, naming the
        nearest one.
    """
    if not path.is_file():
        raise ValueError(f"cfg-path: expected a YAML file, got {path}, which is no file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"cfg-path: expected YAML in {path}, got {' '.join(str(error).split())}") from error
    sections = ("model", "datasets", "run")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in sections):
        raise ValueError(f"cfg-path: expected the sections {', '.join(sections)} in {path}, got something else")
    datasets = list(found["datasets"])
    known = [*(key.replace("*", name) for key in KNOWN for name in datasets), *(name for name, _ in leaves(found))]
    for key, value in _pairs(options):
        if key not in known:
            raise ValueError(f"options: expected a field of the configuration, got {key!r}{nearest(key, known)}")
        inner = found
        *parents, last = key.split(".")
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return found


def _pairs(options: Sequence[str]) -> Iterator[tuple[str, Any]]:
    texts = list(options)
    if texts and "=" not in texts[0]:  # the launcher's older form
        if len(texts) % 2:
            raise ValueError(f"options: expected key=value or key value, got {texts[-1]!r} alone")
        texts = [f"{key}={value}" for key, value in zip(texts[::2], texts[1::2], strict=True)]
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"options: expected key=value, got {text!r}")
        try:
            yield key, yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"options: expected a YAML value for {key}, got {value!r}") from error

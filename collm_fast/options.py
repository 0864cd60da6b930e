"""From a command's arguments to its configurations: options, `--config` files, and the CPUs to use. Floor F4."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from collm_fast.config import from_mapping, nearest, options, type_name
from collm_fast.io.run_folder import read_yaml


class _Parser(argparse.ArgumentParser):
    """argparse with bad input as ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def parse(command: str, summary: str, classes: Sequence[type[Any]], arguments: Sequence[str]) -> list[Any]:
    """The configurations of a command from its options and `--config` files; later ones win.

    Raises: ValueError for an unknown key (naming the nearest), a bad value or a file that is no YAML mapping.
    """
    parser = _Parser(prog=f"collm-fast {command}", description=summary, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], metavar="FILE.yaml", help="keys below, nested")
    flags = ["--config"]
    for cls in classes:
        for key, kind, default in options(cls):
            names = list(dict.fromkeys((f"--{key.replace('_', '-')}", f"--{key}")))
            flags += names
            shown = f"default: {default}" if default not in ("", None, ()) else None
            # `--json` alone means `--json true`.
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
            parser.add_argument(
                *names, dest=key, default=argparse.SUPPRESS, metavar=type_name(kind), help=shown, **bare
            )
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flag = unknown[0].split("=")[0]
        raise ValueError(f"{command}: expected a known option, got {flag!r}{nearest(flag, flags)}")
    values: dict[str, Any] = {}
    for path in found.config:
        _merge(values, read_yaml(Path(path)))
    del found.config
    for key, value in vars(found).items():
        *parents, last = key.split(".")
        _merge(values, _nested(parents, {last: value}))
    return [from_mapping(cls, part) for cls, part in zip(classes, _divide(classes, values), strict=True)]


def _nested(parents: Sequence[str], inner: dict[str, Any]) -> dict[str, Any]:
    for name in reversed(parents):
        inner = {name: inner}
    return inner


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """`values` over `into`; a mapping is merged key by key, so an option changes one key of a file's mapping."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _divide(classes: Sequence[type[Any]], values: dict[str, Any]) -> list[dict[str, Any]]:
    """The keys of each class; what no class knows goes to the last one, which names it."""
    parts: list[dict[str, Any]] = []
    for cls in classes[:-1]:
        own = {key.split(".")[0] for key, _, _ in options(cls)}
        parts.append({key: values.pop(key) for key in list(values) if key in own})
    return [*parts, values]


def available_cpus(quota: Path) -> int:
    """CPUs by affinity, and by the cgroup quota in the file `quota` where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota.is_file():
        allowed, _, period = quota.read_text().strip().partition(" ")
        if allowed.isdigit() and period.isdigit() and int(period) > 0:
            count = min(count, max(1, -(-int(allowed) // int(period))))
    return count

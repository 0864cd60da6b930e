"""Checkpoints of one training stage: a single safetensors file each, so a checkpoint is there whole or not at all.

What goes into one is `training/loop.py`'s matter; a finished stage's adapter and mapper have files of their own.
Floor F1.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from collm_fast.io.atomic import write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A training state: `tensors` by name, and `state`, plain values that JSON can hold."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/<step>.safetensors` atomically; a checkpoint of the same step is replaced."""
    # Cloned to the CPU: safetensors refuses tensors that share storage, and the file must not depend on a device.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in checkpoint.tensors.items()}
    # One key: safetensors writes several in an order of chance, and equal states should be equal files.
    metadata = {"collm_fast": json.dumps({"step": checkpoint.step, "state": checkpoint.state}, sort_keys=True)}
    return write_atomic(folder / f"{checkpoint.step:08d}.safetensors", lambda path: save_file(tensors, path, metadata))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; its tensors lie on the CPU.

    Raises: ValueError for a file that is not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["collm_fast"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Checkpoint(header["step"], tensors, header["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: expected a checkpoint of collm_fast, got {error}") from error


def latest(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint of `folder`, or None; an unreadable one is named in the log and passed over."""
    for path in sorted(folder.glob("[0-9]*.safetensors"), reverse=True):
        try:
            return load(path)
        except ValueError as error:
            logger.warning("%s; trying the one before", error)
    return None


def newest_step(folder: Path) -> int | None:
    """The step of the newest readable checkpoint of `folder`, the one that `latest` gives; None where there is none."""
    found = latest(folder)
    return None if found is None else found.step


def prune(folder: Path, keep: Iterable[int]) -> None:
    """Delete the checkpoints of every step that is not in `keep`."""
    kept = {f"{step:08d}" for step in keep}
    for path in folder.glob("[0-9]*.safetensors"):
        if path.stem not in kept:
            path.unlink()

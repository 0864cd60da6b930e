"""What run.json says of a run before its parts, and whether a run may be continued by what is there now. Floor F3."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from collm_fast.config import TrainConfig, to_mapping
from collm_fast.data.dataset import Dataset
from collm_fast.io.checkpoints import newest_step
from collm_fast.io.run_folder import RunFolder
from collm_fast.training.stages import Base
from collm_fast.training.subsets import IntArray


def begin(config: TrainConfig, dataset: Dataset, base: Base, rows: dict[str, IntArray], command: str) -> RunFolder:
    """Write what is known of a run before its first part, or check that it is what the run began with.

    Raises: ValueError, with nothing written, for another dataset, language model or prompt, or a stage 1 that would
        come after a stage 2.
    """
    folder = RunFolder(config.out)
    fixed = {
        "data": {
            "path": str(config.data),
            "source": dataset.meta.get("source"),
            "split_rule": dataset.meta.get("split", {}).get("rule"),
            "fingerprint": dataset.fingerprint,
        },
        "llm": {"name": config.llm, "fingerprint": base.fingerprint},
        "prompts": {stage: list(template.texts) for stage, template in base.templates.items()},
    }
    _check_unchanged(folder, config, fixed)
    _check_order(folder, config)
    folder.write_config(to_mapping(config))
    rule = "all its training rows (the collaborative model was fitted to them too, +stats counts their own labels)"
    if config.cie_rows == "held-out":
        rule = "rows that the collaborative model was not fitted to (the latest of each user)"
    before = folder.record.get("commands", [])
    folder.update(
        commands=before if command in before else [*before, command],
        seed=config.seed,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        quantize=config.quantize,
        versions=_versions(),
        **fixed,
        rows={
            **{name: int(index.size) for name, index in rows.items()},
            **{f"{name}_all": len(split) for name, split in dataset.splits.items()},
            "stage2_rule": rule if config.stage != "lora" else None,
        },
    )
    return folder


def _check_unchanged(folder: RunFolder, config: TrainConfig, now: dict[str, Any]) -> None:
    then = folder.record
    for key, what, shown in (("data", "dataset", config.data), ("llm", "model", config.llm)):
        if key in then and then[key]["fingerprint"] != now[key]["fingerprint"]:
            raise ValueError(f"{key}: expected the {what} that the run in {folder.path} began with, got other {shown}")
    for stage, texts in then.get("prompts", {}).items():
        if texts != now["prompts"][stage]:
            raise ValueError(f"prompt.{stage}: expected the text that the run in {folder.path} began with, got another")


def _check_order(folder: RunFolder, config: TrainConfig) -> None:
    """A stage 2 stands on the adapter that was there: one that comes later would change what its row means."""
    if config.stage == "cie" or is_done(folder, "stage1"):
        return
    begun = {*folder.record.get("stages", {}), *(path.name for path in (folder.path / "checkpoints").glob("*"))}
    if begun - {"stage1"}:
        row = min(begun - {"stage1"})
        raise ValueError(f"stage: expected cie, as {row} in {folder.path} began without stage 1, got {config.stage}")


def is_done(folder: RunFolder, row: str) -> bool:
    """Whether a row of the table is trained and scored."""
    return bool(folder.record.get("stages", {}).get(row, {}).get("done"))


def last_step(folder: RunFolder) -> int:
    """The step of the stage that was under way, or of the last finished one; 0 where nothing has begun."""
    stages = [path for path in (folder.path / "checkpoints").glob("*") if any(path.iterdir())]
    if not stages:
        return 0
    return newest_step(max(stages, key=lambda path: max(file.stat().st_mtime_ns for file in path.iterdir()))) or 0


@contextmanager
def undone_on_bad_input(out: Path) -> Iterator[None]:
    """Where the block raises ValueError before a step was saved, what it added to `out` is removed again."""
    existed = out.exists()
    before = set(out.iterdir()) if existed else set()
    try:
        yield
    except ValueError:
        if out.is_dir() and not any(out.glob("checkpoints/*/*")):
            for path in set(out.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not existed:
                out.rmdir()
        raise


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("collm-fast", "torch", "transformers", "tokenizers", "numpy", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

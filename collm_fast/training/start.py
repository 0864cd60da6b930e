"""What a run begins with where it does not begin anew: `start`, the adapter and the mapper of another folder. Floor F3.

Such a folder is a run's, or what `import-official` wrote. A run that is only scored takes no step from there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from collm_fast import metrics
from collm_fast.config import StageConfig, TrainConfig
from collm_fast.data.prompts import Prompts
from collm_fast.evaluate import score_prompts
from collm_fast.io.peft import CONFIG, load_adapter
from collm_fast.models.collm import CoLLM
from collm_fast.models.mapper import Mapper
from collm_fast.training.interrupt import Stop
from collm_fast.training.loop import LoopOptions, LoopResult
from collm_fast.training.stages import load_mapper
from collm_fast.training.state import History
from collm_fast.training.validation import check_finite

ADAPTER, MAPPER = "adapter", "mapper.safetensors"


def _adapter(config: TrainConfig) -> Path | None:
    found = config.start is not None and (config.start / ADAPTER / CONFIG).is_file()
    return config.start / ADAPTER if config.start is not None and found else None


def _mapper(config: TrainConfig) -> Path | None:
    found = config.start is not None and (config.start / MAPPER).is_file()
    return config.start / MAPPER if config.start is not None and found else None


def check_start(config: TrainConfig) -> None:
    """Whether `start` holds what the run needs of it.

    Raises: ValueError for a folder with neither an adapter nor a mapper, and for a run that would score a mapper that
        nobody trained.
    """
    if config.start is not None and _adapter(config) is None and _mapper(config) is None:
        raise ValueError(f"start: expected a folder with {ADAPTER}/ or {MAPPER}, got {config.start}")
    if config.evaluate_only and config.stage != "lora" and _mapper(config) is None:
        raise ValueError(
            f"evaluate_only: expected start to hold {MAPPER} for stage 2, got {config.start or 'no start'}"
        )


def take_adapter(config: TrainConfig, run: Path) -> None:
    """Copy the adapter into a run without a stage 1: its stage 2 stands on it, and the run folder is complete."""
    source, target = _adapter(config), run / ADAPTER
    if config.stage == "cie" and source is not None and not (target / CONFIG).is_file():
        shutil.copytree(source, target, dirs_exist_ok=True)


def begin_adapter(config: TrainConfig, llm: nn.Module) -> None:
    """Give the model's LoRA layers the values of `start`, for a stage 1 that goes on from there.

    Raises: ValueError where they do not fit.
    """
    source = _adapter(config)
    if source is not None:
        load_adapter(llm, source)


def begin_mapper(config: TrainConfig, mapper: Mapper, used_with: dict[str, str]) -> None:
    """Give a new mapper the values of `start`, where that one reads the same inputs.

    Raises: ValueError where it is of another form, or was trained with other data or another language model.
    """
    path = _mapper(config)
    if path is None:
        return
    given = load_mapper(path, used_with)
    if given.config.inputs != mapper.config.inputs:
        return
    wanted, got = (_form(each) for each in (mapper, given))
    if wanted != got:
        raise ValueError(f"start: expected a mapper of {wanted} in {path}, got {got}")
    mapper.load_state_dict(given.state_dict())


def _form(mapper: Mapper) -> str:
    settings = mapper.config
    return f"d={mapper.d}, H={mapper.H}, hidden_factor={settings.hidden_factor}, tokens_per_id={settings.tokens_per_id}"


def only_scored(
    model: CoLLM,
    parameters: dict[str, nn.Parameter],
    train: Prompts,
    valid: Prompts,
    config: StageConfig,
    total: int,
    options: LoopOptions,
    stop: Stop,
) -> LoopResult:
    """`train_stage` without a step: the state that the model has is the one that is kept, and scored."""
    arguments: dict[str, Any] = {"tokens_per_batch": options.tokens_per_batch, "pairs": options.pairs}
    progress = f"{options.name} validation" if options.progress else None
    logits = score_prompts(model, valid, progress=progress, check=stop.check, **arguments)
    check_finite(options.name, "validation", logits, 0)
    auc = metrics.auc(logits, valid.label).value
    return LoopResult(0, 0, auc, logits, History([], [0], [auc]), None, 0)

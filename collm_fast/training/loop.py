"""The training loop: one flat function that a stage's set-up (`stages.py`) calls. Floor F3.

Everything random derives from the seed and the step, and a checkpoint holds the rest, so an interrupted run that is
continued ends, on a CPU, with the bits of one that was not.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from collm_fast import metrics
from collm_fast.config import StageConfig
from collm_fast.data.packing import batches, pack
from collm_fast.data.prompts import Prompts
from collm_fast.evaluate import score_prompts
from collm_fast.io import checkpoints
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import set_step_seed
from collm_fast.ops import check_device_errors
from collm_fast.training.interrupt import Interrupted, Stop
from collm_fast.training.state import History, StageState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopOptions:
    """What the loop needs besides the model, the rows and the stage's optimisation."""

    name: str  # the row of the table, `stage1` or `stage2...`: names seeds, events and checkpoints
    folder: Path  # of the checkpoints
    seed: int
    device: torch.device
    order: Literal["group", "random"] = "group"
    pairs: bool = False
    tokens_per_batch: int = 8192
    checkpoint_minutes: float = 5.0
    resume: bool = False
    progress: bool = True
    events: Any = None  # a TensorBoard SummaryWriter


@dataclass(frozen=True)
class LoopResult:
    """What a stage ended with; the model holds the parameters of `best_step`."""

    steps: int
    best_step: int
    best_auc: float
    valid_logits: np.ndarray
    history: History
    resumed_from: int | None
    prompts: int


def total_steps(config: StageConfig, rows: int, cap: int | None = None) -> int:
    """Optimizer steps of a stage: its epochs over the rows, or fewer where `max_steps` or `cap` says so."""
    steps = math.ceil(config.epochs * rows / config.batch_size)
    return max(1, min(steps, config.max_steps or steps, cap or steps))


def learning_rate(config: StageConfig, step: int, total: int) -> float:
    """Linear warm-up once, then a cosine from lr to min_lr; the warm-up is at most a tenth of the steps."""
    warmup = min(config.warmup_steps, total // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def derived_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one named purpose."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    # Zeros at the end do not count in a SeedSequence: the number of parts, never zero, closes it.
    return int(np.random.SeedSequence([seed, *words, len(words) + 1]).generate_state(1, np.uint64)[0] >> 1)


def train_stage(
    model: CoLLM,
    parameters: dict[str, torch.nn.Parameter],
    train: Prompts,
    valid: Prompts,
    config: StageConfig,
    total: int,
    options: LoopOptions,
    stop: Stop,
) -> LoopResult:
    """Train `parameters` for `total` steps, or until the validation AUC stops rising, and keep the best state.

    Evaluates at step 0 (a state that is never kept), every `eval_every` steps and at the end; saves a checkpoint at
    each of these, every `checkpoint_minutes` and when asked to stop.

    Raises:
        ValueError for a validation sample of one class.
        FloatingPointError for a loss or gradient that is not finite, naming the step and the rows; the parameters are
            not updated.
        Interrupted after a signal, once the state is saved.
    """
    if len(set(valid.label.tolist())) < 2:
        raise ValueError(f"{options.name}: expected validation rows of both labels, got {valid.label.size} of one")
    loop = StageState(parameters, config)
    found = checkpoints.latest(options.folder) if options.resume else None
    if found is not None:
        loop.restore(found)
    resumed_from = found.step if found else None
    bar = tqdm(total=total, initial=loop.step, desc=options.name, unit="step", disable=not options.progress)
    saved, training_seconds, prompts = time.monotonic(), 0.0, 0
    order, epoch = _epoch(train, config, options, loop.epoch), loop.epoch
    with stop.held(), bar:
        while True:
            due = loop.step % config.eval_every == 0 or loop.step == total
            if due and loop.evaluated != loop.step:
                try:
                    logits = score_prompts(
                        model,
                        valid,
                        tokens_per_batch=options.tokens_per_batch,
                        pairs=options.pairs,
                        progress=f"{options.name} validation" if options.progress else None,
                        check=stop.check,
                    )
                except Interrupted:
                    _save(loop, options)
                    raise
                check_finite(options.name, "validation", logits, loop.step)
                value = metrics.auc(logits, valid.label).value
                loop.evaluation(value, logits)
                _event(options, "valid/auc", value, loop.step)
                logger.debug("%s step %d: validation AUC %.4f", options.name, loop.step, value)
                _save(loop, options)
                saved = time.monotonic()
            stale = config.patience is not None and loop.waited >= config.patience
            if loop.step == total or stale:
                break
            if stop.requested:
                _save(loop, options)
                stop.check()

            started = time.monotonic()
            if epoch != loop.epoch:
                order, epoch = _epoch(train, config, options, loop.epoch), loop.epoch
            rows = order[loop.position]
            batch = pack(train, rows, pairs=options.pairs)
            rate = learning_rate(config, loop.step, total)
            for group in loop.optimizer.param_groups:
                group["lr"] = rate
            set_step_seed(model, derived_seed(options.seed, options.name, "dropout", loop.step))
            model.train()
            loss = binary_cross_entropy_with_logits(model(batch), batch.label.to(options.device))
            value = loss.item()
            if not math.isfinite(value):
                raise _not_finite(options.name, "loss", value, loop.step, rows)
            check_device_errors()
            loop.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            limit = math.inf if config.clip_norm is None else config.clip_norm
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), limit).item()
            if not math.isfinite(norm):
                raise _not_finite(options.name, "gradient", norm, loop.step, rows)
            loop.optimizer.step()

            loop.advance(value, len(order))
            prompts += rows.size
            training_seconds += time.monotonic() - started
            speed = prompts / training_seconds
            bar.set_postfix_str(f"loss {value:.3f}, {speed:.1f} prompts/s", refresh=False)
            bar.update()
            _event(options, "train/loss", value, loop.step)
            _event(options, "train/lr", rate, loop.step)
            _event(options, "train/prompts_per_second", speed, loop.step)
            if time.monotonic() - saved > 60.0 * options.checkpoint_minutes:
                _save(loop, options)
                saved = time.monotonic()
    loop.load_best()
    best = loop.best_logits.numpy()
    return LoopResult(loop.step, loop.best_step, loop.best_auc, best, loop.history, resumed_from, prompts)


def check_finite(stage: str, sample: str, logits: np.ndarray, step: int) -> None:
    """Raises: FloatingPointError that names the first row whose score is not finite."""
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise FloatingPointError(
            f"{stage}: expected finite {sample} scores, got {logits[bad]} at step {step}, "
            f"row {bad} of the {sample} sample"
        )


def _not_finite(stage: str, what: str, value: float, step: int, rows: np.ndarray) -> FloatingPointError:
    shown = f"{', '.join(map(str, rows[:16].tolist()))}{', ...' if rows.size > 16 else ''}"
    return FloatingPointError(
        f"{stage}: expected a finite {what}, got {value} at step {step}, rows {shown} of the training sample; "
        "a lower learning rate, --dtype float32 or a clip_norm may help"
    )


def _epoch(train: Prompts, config: StageConfig, options: LoopOptions, epoch: int) -> list[np.ndarray]:
    generator = np.random.default_rng(derived_seed(options.seed, options.name, "order", epoch))
    return batches(train, order=options.order, batch_size=config.batch_size, generator=generator)


def _event(options: LoopOptions, tag: str, value: float, step: int) -> None:
    if options.events is not None:
        options.events.add_scalar(f"{options.name}/{tag}", value, step)


def _save(loop: StageState, options: LoopOptions) -> None:
    checkpoints.save(options.folder, loop.snapshot())
    checkpoints.prune(options.folder, {loop.step, loop.best_step})

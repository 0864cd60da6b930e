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
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from collm_fast.config import StageConfig
from collm_fast.data.packing import Order, PackedBatch, batches, pack
from collm_fast.data.prompts import Prompts
from collm_fast.data.transfer import on_device
from collm_fast.evaluate import score_prompts
from collm_fast.io import checkpoints
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import set_step_seed
from collm_fast.training.graphs import StepGraphs
from collm_fast.training.interrupt import Interrupted, Stop
from collm_fast.training.memory import EVERY_STEPS, give_back_memory
from collm_fast.training.state import History, StageState
from collm_fast.training.updates import Updates
from collm_fast.training.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopOptions:
    """What the loop needs besides the model, the rows and the stage's optimisation."""

    name: str  # the row of the table, `stage1` or `stage2...`: names seeds, events and checkpoints
    folder: Path  # of the checkpoints
    seed: int
    device: torch.device
    order: Literal["group", "random"] = "group"
    group_rows: int | None = None
    pairs: bool = False
    share_prefix: bool = True  # in training; evaluation always shares
    tokens_per_batch: int = 8192  # of one forward, in training and evaluation
    cuda_graphs: bool = False
    sample: NDArray[np.int64] | None = None  # positions of the validation rows that an evaluation scores; None: all
    checkpoint_minutes: float = 5.0
    resume: bool = False
    progress: bool = True
    events: Any = None  # a TensorBoard SummaryWriter


@dataclass(frozen=True)
class LoopResult:
    """What a stage ended with; the model holds the parameters of `best_step`.

    `best_auc` and `valid_logits` are of all validation rows; `interim` is `Validation.record`.
    """

    steps: int
    best_step: int
    best_auc: float
    valid_logits: np.ndarray
    history: History
    resumed_from: int | None
    prompts: int
    interim: dict[str, Any] | None = None


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
    each of these, every `checkpoint_minutes` and when asked to stop. With `options.sample` an evaluation scores these
    validation rows only; at the end all rows are scored for the at most three best states whose AUC on the sample is
    within half the width of its 95 % interval of the best one's, and the best of them by all rows is kept.

    Raises:
        ValueError for validation rows, or a sample, of one class.
        FloatingPointError for a loss or gradient that is not finite, naming the step and the rows; the parameters are
            not updated.
        ValueError with `cuda_graphs` for a model that cannot be captured.
        Interrupted after a signal, once the state is saved.
    """

    def score(model: CoLLM, rows: Prompts) -> NDArray[np.float32]:
        return score_prompts(
            model,
            rows,
            tokens_per_batch=options.tokens_per_batch,
            pairs=options.pairs,
            progress=f"{options.name} validation" if options.progress else None,
            check=stop.check,
        )

    validation = Validation(options.name, valid, options.sample, options.seed, score)
    late = options.device.type == "cuda"
    loop = StageState(parameters, config, validation.candidates, fused=late)
    graphs = StepGraphs(model, parameters.values()) if options.cuda_graphs else None
    found = checkpoints.latest(options.folder) if options.resume else None
    if found is not None:
        loop.restore(found)
    resumed_from = found.step if found else None
    bar = tqdm(total=total, initial=loop.step, desc=options.name, unit="step", disable=not options.progress)
    saved, training_seconds, prompts, shown = time.monotonic(), 0.0, 0, ""
    order, epoch = _epoch(train, config, options, loop.epoch), loop.epoch
    updates = Updates(options.name, loop, config.clip_norm, late=late)

    def tell(*, all_of_them: bool) -> None:
        for step, loss in updates.read(all_of_them=all_of_them):
            loop.history.loss.append(loss)
            _event(options, "train/loss", loss, step + 1)

    with stop.held(), bar:
        while True:
            due = loop.step % config.eval_every == 0 or loop.step == total
            if due and loop.evaluated != loop.step:
                tell(all_of_them=True)
                try:
                    auc, interval = validation.evaluate(model, loop)
                except Interrupted:
                    _save(loop, options)
                    raise
                _event(options, "valid/auc", auc, loop.step)
                shown = f", validation AUC {auc:.4f}"
                if interval is not None:
                    _event(options, "valid/auc_low", interval.low, loop.step)
                    _event(options, "valid/auc_high", interval.high, loop.step)
                    shown += f" [{interval.low:.4f}, {interval.high:.4f}]"
                logger.debug("%s step %d%s", options.name, loop.step, shown)
                _save(loop, options)
                saved = time.monotonic()
            stale = config.patience is not None and loop.waited >= config.patience
            if loop.step == total or stale:
                break
            if stop.requested:
                tell(all_of_them=True)
                _save(loop, options)
                stop.check()

            started = time.monotonic()
            if epoch != loop.epoch:
                order, epoch = _epoch(train, config, options, loop.epoch), loop.epoch
            rows = order[loop.position]
            rate = learning_rate(config, loop.step, total)
            for group in loop.optimizer.param_groups:
                group["lr"] = rate
            # A captured graph adds to memory that it knows: there, gradients are zeros and never None.
            loop.optimizer.zero_grad(set_to_none=graphs is None)
            updates.take(add_gradient(model, train, rows, options, loop.step, graphs), rows)
            loop.advance(len(order))
            tell(all_of_them=False)
            prompts += rows.size
            training_seconds += time.monotonic() - started
            speed = prompts / training_seconds
            told = f"loss {loop.history.loss[-1]:.3f}, " if loop.history.loss else ""
            bar.set_postfix_str(f"{told}{speed:.1f} prompts/s{shown}", refresh=False)
            bar.update()
            _event(options, "train/lr", rate, loop.step)
            _event(options, "train/prompts_per_second", speed, loop.step)
            if loop.step % EVERY_STEPS == 0:
                give_back_memory(options.device)
            if time.monotonic() - saved > 60.0 * options.checkpoint_minutes:
                tell(all_of_them=True)
                _save(loop, options)
                saved = time.monotonic()
        best = validation.choose(model, loop, lambda: _save(loop, options))
    auc, logits = validation.auc(best), best.logits if best.all_logits is None else best.all_logits
    if options.sample is not None:
        _event(options, "valid/auc_all_rows", auc, best.step)
    record = validation.record(loop, best)
    return LoopResult(loop.step, best.step, auc, logits.numpy(), loop.history, resumed_from, prompts, record)


def add_gradient(
    model: CoLLM,
    train: Prompts,
    rows: NDArray[np.int64],
    options: LoopOptions,
    step: int,
    graphs: StepGraphs | None = None,
) -> Tensor:
    """Add the gradient of the mean loss of `rows` to the parameters' own; returns that loss, [] float64, on the device.

        loss = sum_m (rows of m / all rows) mean_m,   m: the batch's parts of at most `tokens_per_batch` packed tokens

    Dropout masks are drawn anew in every part: with dropout, the parts of a batch are not its whole to the bit.
    """
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=options.device)
    for part, batch in enumerate(micro_batches(train, rows, options)):
        purpose = ("dropout", step, part) if part else ("dropout", step)
        set_step_seed(model, derived_seed(options.seed, options.name, *purpose))
        weight = len(batch) / rows.size
        if graphs is not None:
            total += graphs.add_gradient(batch, weight).loss
            continue
        mean = binary_cross_entropy_with_logits(model(batch), on_device(batch.label, options.device))
        loss = mean * weight
        loss.backward()
        total += loss.detach()
    return total


def micro_batches(train: Prompts, rows: NDArray[np.int64], options: LoopOptions) -> list[PackedBatch]:
    """`rows` as packed batches of at most `tokens_per_batch` tokens each; one batch, in the rows' order, if they fit.

    Otherwise they are cut between (user, history) groups where these fit, and a row that is longer is alone.
    """
    kind: dict[str, bool] = {"share_prefix": options.share_prefix, "pairs": options.pairs}
    whole = pack(train, rows, **kind)
    if len(whole.token_ids) <= options.tokens_per_batch:
        return [whole]
    order: Order = "group" if options.share_prefix else "flat"
    parts = batches(train, order=order, max_tokens=options.tokens_per_batch, rows=rows)
    return [pack(train, part, **kind) for part in parts]


def _epoch(train: Prompts, config: StageConfig, options: LoopOptions, epoch: int) -> list[np.ndarray]:
    generator = np.random.default_rng(derived_seed(options.seed, options.name, "order", epoch))
    size, cut = config.batch_size, options.group_rows
    return batches(train, order=options.order, batch_size=size, group_rows=cut, generator=generator)


def _event(options: LoopOptions, tag: str, value: float, step: int) -> None:
    if options.events is not None:
        options.events.add_scalar(f"{options.name}/{tag}", value, step)


def _save(loop: StageState, options: LoopOptions) -> None:
    checkpoints.save(options.folder, loop.snapshot())
    checkpoints.prune(options.folder, {loop.step, *(state.step for state in loop.kept)})

"""The parts of a run in their order: collaborative model, stage 1, stage 2, test scores, report. Floor F3.

A part that is done is recorded in run.json and not repeated; what a stage is made of is `stages.py`'s matter, its steps
are `loop.py`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from collm_fast.config import CFConfig, CFName, MapperConfig, TrainConfig, from_mapping, to_mapping
from collm_fast.data.dataset import Dataset, Split, load_dataset
from collm_fast.evaluate import score_prompts, sigmoid
from collm_fast.io.checkpoints import newest_step
from collm_fast.io.peft import load_adapter, save_adapter
from collm_fast.io.run_folder import RunFolder
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.collm import CoLLM
from collm_fast.models.llm import SMOLLM2
from collm_fast.models.lora import may_draw, set_dropout
from collm_fast.models.mapper import Mapper, id_statistics
from collm_fast.report import write_report
from collm_fast.training.cf import fit_cf, held_out_rows
from collm_fast.training.controls import control_scores
from collm_fast.training.interrupt import Stop
from collm_fast.training.loop import LoopOptions, total_steps, train_stage
from collm_fast.training.record import begin, is_done, last_step, undone_on_bad_input
from collm_fast.training.scores import add_controls, add_scores, baseline_scores
from collm_fast.training.stages import (
    Base,
    fresh_lora,
    fresh_mapper,
    mapper_file,
    prompt_text,
    save_mapper,
    set_trainable,
    statistics,
    with_biases,
)
from collm_fast.training.start import begin_adapter, begin_mapper, check_start, only_scored, take_adapter
from collm_fast.training.subsets import IntArray, choose_rows, given_cf, held_out_of, valid_sample, warn_of_unused
from collm_fast.training.validation import check_finite

logger = logging.getLogger(__name__)


@dataclass
class Work:
    """What every part of one run needs."""

    config: TrainConfig
    dataset: Dataset
    base: Base
    folder: RunFolder
    cf: CFModel
    rows: dict[str, IntArray]  # "stage1", "stage2", "valid", "test"
    stop: Stop
    resume: bool
    progress: bool

    def split(self, name: str) -> Split:
        """The chosen rows of a split; `stage1` and `stage2` are rows of train."""
        return self.dataset.splits[name if name in self.dataset.splits else "train"].take(self.rows[name])


def run_training(
    config: TrainConfig, *, command: str = "", say: Callable[[str], None] = logger.info, progress: bool = True
) -> RunFolder:
    """Do what `collm-fast train` does, or what is left of it.

    Raises: ValueError for bad input, before anything is written; Interrupted after a signal, with the state saved.
    """
    config = _absolute(config)
    defaults = to_mapping(TrainConfig())
    resume = RunFolder.check_new(config.out, to_mapping(config), config.resume == "auto", defaults)
    if resume and _finished(RunFolder(config.out), config):
        folder = RunFolder(config.out)
        say(f"resumed from step {last_step(folder)}: the run in {config.out} is complete")
        return folder
    # Bad input that only shows later leaves no half-written run behind.
    with Stop() as stop, nullcontext() if resume else undone_on_bad_input(config.out):
        check_start(config)
        dataset = load_dataset(config.data)
        given = given_cf(config, dataset, config.out if resume else None)
        rows = choose_rows(config, dataset, held_out_of(config, given))
        base = Base.load(config, dataset)
        if config.stage != "cie":
            fresh_lora(base, config.lora, config.seed)
        folder = begin(config, dataset, base, rows, command)
        take_adapter(config, folder.path)
        if resume:
            say(f"resumed from step {last_step(folder)}")
        with _timed(folder, "collaborative model"):
            cf = _collaborative(config, dataset, given, folder, progress)
        _parts(Work(config, dataset, base, folder, cf, rows, stop, resume, progress))
    return folder


def _finished(folder: RunFolder, config: TrainConfig) -> bool:
    return all(is_done(folder, row) for row, _ in wanted_rows(config)) and (folder.path / "report.html").is_file()


def _absolute(config: TrainConfig) -> TrainConfig:
    """The same configuration with absolute paths: a run is opened and resumed from any folder. Names stay names."""
    names = ("", SMOLLM2, *get_args(CFName))
    llm, cf = (
        text if text in names or not Path(text).exists() else str(Path(text).resolve())
        for text in (config.llm, config.cf)
    )
    start = None if config.start is None else config.start.resolve()
    return replace(config, data=config.data.resolve(), llm=llm, cf=cf, start=start)


def wanted_rows(config: TrainConfig) -> list[tuple[str, MapperConfig | None]]:
    """The rows of the table that the language model fills, in the order they are trained."""
    wanted: list[tuple[str, MapperConfig | None]] = [("stage1", None)] if config.stage in ("lora", "both") else []
    if config.stage in ("cie", "both"):
        for inputs in dict.fromkeys((config.mapper.inputs, *config.ablations)):
            wanted.append((stage2_row(inputs), replace(config.mapper, inputs=inputs)))
    return wanted


def stage2_row(inputs: str) -> str:
    """The name of a stage 2 row: what the mapper reads beside the embedding is part of it."""
    return "stage2" if inputs == "embedding" else f"stage2{inputs}"


def _baselines(work: Work) -> None:
    """The rows that need no language model, on the same validation and test rows."""
    if "test" in work.folder.metrics.get("cf", {}):
        return
    for name in ("valid", "test"):
        split = work.split(name)
        for row, scores in baseline_scores(work.dataset, split, work.cf).items():
            add_scores(work.folder, work.dataset, name, split, row, scores, seed=work.config.seed)


def _collaborative(
    config: TrainConfig, dataset: Dataset, given: CFModel | None, folder: RunFolder, progress: bool
) -> CFModel:
    """The frozen collaborative model of the run: given, or fitted now."""
    cf = given
    if cf is None:
        # One --seed serves the whole run; a seed given for the collaborative model itself wins.
        own = config.collaborative.seed
        seed = config.seed if own is None else own
        settings = from_mapping(CFConfig, {**to_mapping(config.collaborative), "model": config.cf, "seed": seed})
        cf = fit_cf(dataset, settings, out=None, progress=progress)
    else:
        warn_of_unused(config, cf)
    cf.save(folder.path)
    folder.update(cf={"name": cf.name, "given": config.cf, "fingerprint": dataset.fingerprint})
    return cf


def _parts(work: Work) -> None:
    _baselines(work)
    adapter = work.folder.path / "adapter"
    for row, mapper in wanted_rows(work.config):
        work.stop.check()
        if mapper is not None and (adapter / "adapter_config.json").is_file():
            _ensure_adapter(work, adapter)
        if is_done(work.folder, row):
            continue
        with _timed(work.folder, row):
            _stage(work, row, mapper)
    if work.config.stage != "lora":
        train, test = work.split("stage2"), work.split("test")
        known = id_statistics(work.dataset, _seen(work))
        found = control_scores(with_biases(work.cf), known, train, test)
        add_controls(work.folder, test, found, seed=work.config.seed)
    with _timed(work.folder, "report"):
        write_report(work.folder)


def _seen(work: Work) -> NDArray[np.bool_]:
    """The train rows that the collaborative model was fitted to: what statistics may stand on."""
    return ~held_out_rows(work.dataset.splits["train"], work.cf.config.held_out)


def _ensure_adapter(work: Work, adapter: Path) -> None:
    """Stage 2 stands on the saved adapter: the one stage 1 just wrote, or of a finished stage 1 of this folder."""
    from collm_fast.models.lora import lora_layers

    if next(lora_layers(work.base.llm), None) is None:
        fresh_lora(work.base, work.config.lora, work.config.seed)
    load_adapter(work.base.llm, adapter)


def _model(work: Work, mapper_config: MapperConfig | None) -> tuple[CoLLM, Mapper | None]:
    """The untrained model of stage 1 (None), or of stage 2 with a mapper of this form."""
    config, base = work.config, work.base
    if mapper_config is None:
        set_dropout(base.llm, True)
        begin_adapter(config, base.llm)
        return base.model("stage1", config), None
    set_dropout(base.llm, config.stage2_lora_dropout)
    stats = statistics(mapper_config, work.dataset, _seen(work))
    cf = with_biases(work.cf)
    mapper = fresh_mapper(mapper_config, cf.dim, base.hidden_size, stats, config.seed)
    begin_mapper(config, mapper, {"data": work.dataset.fingerprint, "llm": base.fingerprint})
    return base.model("stage2", config, cf, mapper, stats), mapper


def _stage(work: Work, row: str, mapper_config: MapperConfig | None) -> None:
    """Train one row of the table, keep its best state, score the test rows."""
    config, base, folder = work.config, work.base, work.folder
    stage = "stage1" if mapper_config is None else "stage2"
    settings = config.stage1 if mapper_config is None else config.stage2
    train, valid, test = (
        base.prompts(stage, work.split(name), work.dataset, config) for name in (stage, "valid", "test")
    )
    model, mapper = _model(work, mapper_config)
    parameters = set_trainable(model, "lora" if mapper is None else "cie")
    total = 0 if config.evaluate_only else total_steps(settings, len(train.label), config.max_steps)
    if total and settings.warmup_steps > total // 10:
        logger.info("%s: warm-up over %d steps, a tenth of all, not %d", row, total // 10, settings.warmup_steps)
    sample = valid_sample(config, work.split("valid"))
    part = "" if sample is None else f", {sample.size} of them in each evaluation"
    counts = row, total, len(train.label), len(valid.label), part
    logger.info("%s: %d steps over %d prompts, %d validation rows%s", *counts)
    options = LoopOptions(
        name=row,
        folder=folder.path / "checkpoints" / row,
        seed=config.seed,
        device=base.device,
        order=config.order,
        group_rows=config.group_rows,
        pairs="+pair" in row,
        share_prefix=config.lora.dropout_per == "position" or not may_draw(base.llm),
        tokens_per_batch=config.tokens_per_batch,
        cuda_graphs=config.cuda_graphs,
        sample=sample,
        checkpoint_minutes=config.checkpoint_minutes,
        resume=work.resume,
        progress=work.progress,
    )
    with _events(folder, row, work.resume) as events:
        options = replace(options, events=events)
        take_steps = only_scored if config.evaluate_only else train_stage
        result = take_steps(model, parameters, train, valid, settings, total, options, work.stop)
    if mapper is None:
        save_adapter(base.llm, folder.path / "adapter", config.llm, config.lora)
    else:
        name = mapper_file(mapper.config.inputs, config.mapper.inputs)
        save_mapper(folder.path / name, mapper, {"data": work.dataset.fingerprint, "llm": base.fingerprint})
    logits = score_prompts(
        model,
        test,
        tokens_per_batch=config.tokens_per_batch,
        pairs="+pair" in row,
        progress=f"{row} test" if work.progress else None,
        check=work.stop.check,
    )
    check_finite(row, "test", logits, result.best_step)
    for name, values in (("valid", result.valid_logits), ("test", logits)):
        scores = values, sigmoid(values)
        add_scores(folder, work.dataset, name, work.split(name), row, scores, seed=config.seed)
    folder.write_json("history.json", {**folder.read_json("history.json"), row: vars(result.history)})
    examples = folder.record.get("prompt_examples", {})
    record: dict[str, Any] = {
        "done": True,
        "steps": result.steps,
        "best_step": result.best_step,
        "best_auc": result.best_auc,
        "first_auc": result.history.valid_auc[0],
        "train_rows": len(train.label),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
    }
    if result.interim is not None:
        record["interim"] = result.interim
    if mapper is not None:
        biases = ", with the collaborative model's biases" if work.cf.user_bias is not None else ""
        record["inputs"] = mapper.config.inputs + biases
    folder.update(stages={row: record}, prompt_examples={**examples, stage: prompt_text(base.tokenizer, train, 0)})


@contextmanager
def _timed(folder: RunFolder, part: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        if folder.path.is_dir():
            before = folder.record.get("seconds", {}).get(part, 0.0)
            folder.update(seconds={part: round(before + time.monotonic() - started, 2)})


@contextmanager
def _events(folder: RunFolder, row: str, resume: bool) -> Iterator[Any]:
    """A TensorBoard writer of one stage, which on resumption replaces what came after the checkpoint; or None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed: the run has no events")
        yield None
        return
    step = newest_step(folder.path / "checkpoints" / row) if resume else None
    writer = SummaryWriter(str(folder.path / "events" / row), purge_step=None if step is None else step + 1)
    try:
        yield writer
    finally:
        writer.close()

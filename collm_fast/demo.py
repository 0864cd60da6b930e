"""The demo: MovieLens-100K and SmolLM2-135M from raw data to a report, in minutes on two cores. Floor F4.

Its size follows the machine's class alone (bfloat16 products or not), so one class always gives the same run. A demo
that was stopped continues; a finished one is shown again.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from collm_fast.config import CFConfig, CFName, PrepareConfig, PromptConfig, StageConfig, TrainConfig
from collm_fast.data.dataset import Dataset, load_dataset
from collm_fast.data.prepare import prepare
from collm_fast.io.run_folder import RunFolder
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.llm import resolve_device, resolve_dtype
from collm_fast.report import console_text, write_report
from collm_fast.training.cf import fit_cf
from collm_fast.training.loop import total_steps
from collm_fast.training.pipeline import run_training
from collm_fast.training.scores import add_controls
from collm_fast.training.subsets import choose_rows

CF_MODELS: tuple[CFName, ...] = ("mf", "lightgcn")
# Of each user's train rows, the latest tenth is kept from the collaborative models: stage 2 trains on those.
HELD_OUT = 0.1


@dataclass(frozen=True)
class MachineClass:
    """How much a machine does in the demo, and what it needs for it on one core, in seconds."""

    name: str
    prompts: int
    train_prompt: float
    eval_prompt: float


BF16 = MachineClass("bfloat16 products", 1000, 0.08, 0.03)
FLOAT32 = MachineClass("float32 products", 500, 0.13, 0.055)
# A second core adds less than its share: small products, and one thread between them.
CORE_EXPONENT = 0.75
OTHER_SECONDS = 60.0  # data, both collaborative models, loading, report


def demo_config(data: Path, out: Path, llm: str, seed: int, cf: str, size: MachineClass) -> TrainConfig:
    """The demo's training: both stages once over about `size.prompts` prompts, evaluated three times each."""
    steps = -(-size.prompts // 16)
    stage = StageConfig(epochs=1.0, eval_every=-(-steps // 2), patience=None, lr=1e-3)
    # At 1e-3 so few steps ended at validation AUCs between .48 and .78, by rounding alone; at 3e-4 near .75.
    second = replace(stage, lr=3e-4)
    return TrainConfig(
        data=data,
        llm=llm,
        cf=cf,
        out=out,
        seed=seed,
        # Histories come in blocks of 8 rows: whole, a batch of 16 holds two users, and 63 such steps end anywhere.
        group_rows=2,
        loss="yes-no",
        cie_rows="held-out",
        limit_train=size.prompts,
        limit_valid=500,
        limit_eval=1000,
        resume="auto",
        checkpoint_minutes=1.0,
        collaborative=CFConfig(held_out=HELD_OUT),
        prompt=PromptConfig(history_length=5),
        stage1=stage,
        stage2=second,
    )


def run_demo(
    data: Path, out: Path, *, llm: str = "smollm2", seed: int = 2023, fresh: bool = False, say: Callable[[str], None]
) -> RunFolder:
    """Prepare, fit, train, report; or continue, or show what is there.

    Raises: ValueError naming the package to install where data or model are missing.
    """
    if fresh and out.exists():
        say(f"moved the run of before to {_move_aside(out)}")
    device = resolve_device("auto")
    size = BF16 if resolve_dtype("auto", device) == torch.bfloat16 else FLOAT32
    if _is_done(out):
        folder = RunFolder.open(out)
        say(f"The demo in {out} is complete; --fresh makes another one. Its table:\n")
        say(_closing(folder))
        return folder
    dataset = load_dataset(data) if (data / "meta.json").is_file() else None
    say(plan(data, out, llm, seed, size, prepared=dataset is not None))
    if dataset is None:
        dataset = prepare(PrepareConfig(source="ml-100k", out=data))
    models = _collaborative(dataset, out, seed, say)
    best = max(models, key=lambda name: models[name][1])
    say(f"Better by validation AUC, so stage 2 reads it: {best}.")
    config = demo_config(data, out, llm, seed, str(out / "collaborative" / best), size)
    folder = run_training(config, command=_command(data, out, llm, seed), say=say)
    test = dataset.splits["test"].take(choose_rows(config, dataset, HELD_OUT)["test"])
    others = {
        name: model.score(test.uid, test.iid).astype(float) for name, (model, _) in models.items() if name != best
    }
    add_controls(folder, test, others, seed=seed)
    write_report(folder)
    folder.update(demo_done=True)
    say("\n" + _closing(folder))
    return folder


def plan(data: Path, out: Path, llm: str, seed: int, size: MachineClass, *, prepared: bool) -> str:
    """What the demo is about to do, with the estimated time."""
    minutes = estimated_seconds(size, _cores()) / 60
    return "\n".join(
        [
            "The demo:",
            f"  1. data       MovieLens-100K in {data}{' (is there)' if prepared else ''}, split by user",
            f"  2. models     {' and '.join(CF_MODELS)} with biases; a tenth of each user's rows is kept from them",
            f"  3. stage 1    LoRA on {llm}: about {size.prompts} text prompts, {total_steps_of(size)} steps",
            f"  4. stage 2    the mapper, on about {size.prompts} rows that the collaborative model did not see",
            "  5. test       at least 1,000 rows of whole users, scored after each stage",
            f"  6. report     {out / 'report.html'}",
            f"Machine class: {size.name}, {_cores()} cores; seed {seed}.",
            f"Estimated time: about {minutes:.0f} minutes. Ctrl-C saves; the same command continues.",
            "",
        ]
    )


def total_steps_of(size: MachineClass) -> int:
    """Optimizer steps of one demo stage."""
    config = demo_config(Path("d"), Path("o"), "", 0, "mf", size)
    return total_steps(config.stage1, size.prompts)


def estimated_seconds(size: MachineClass, cores: int) -> float:
    """From the rates of a machine class: two stages, each with three validations of 500 and one test of 1,000 rows."""
    training = 2 * size.prompts * size.train_prompt
    scoring = 2 * (3 * 500 + 1000) * size.eval_prompt
    return float((training + scoring) / min(cores, 16) ** CORE_EXPONENT + OTHER_SECONDS)


def _command(data: Path, out: Path, llm: str, seed: int) -> str:
    """The command that repeats the demo."""
    options = {"data": data, "out": out, "seed": seed, "llm": llm}
    return shlex.join(["collm-fast", "demo", *(word for name in options for word in (f"--{name}", str(options[name])))])


def _cores() -> int:
    return min(torch.get_num_threads(), os.cpu_count() or 1)


def _is_done(out: Path) -> bool:
    return (out / "run.json").is_file() and bool(RunFolder(out).record.get("demo_done"))


def _move_aside(out: Path) -> Path:
    number = 1
    while (moved := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    return out.rename(moved)


def _collaborative(
    dataset: Dataset, out: Path, seed: int, say: Callable[[str], None]
) -> dict[str, tuple[CFModel, float]]:
    """Both collaborative models with their validation AUC, fitted now or found."""
    models: dict[str, tuple[CFModel, float]] = {}
    for name in CF_MODELS:
        folder = out / "collaborative" / name
        if not (folder / "metrics.json").is_file():
            config = CFConfig(model=name, dim=64, lr=1e-2, bias=True, held_out=HELD_OUT, seed=seed)
            fit_cf(dataset, config, out=folder, progress=True)
        model = CFModel.load(folder)
        if (model.config.seed, model.fingerprint) != (seed, dataset.fingerprint):
            raise ValueError(f"demo: expected the data and the seed that {folder} was fitted with; --fresh starts over")
        tables: dict[str, Any] = RunFolder(folder).metrics
        auc = tables["cf"]["valid"]["all"]["auc"]
        models[name] = model, auc
        test = tables["cf"]["test"]["all"]
        say(
            f"{name}: validation AUC {auc:.3f}; on all {test['rows']} test rows AUC {test['auc']:.3f}, "
            f"UAUC {test['uauc']:.3f}"
        )
    return models


def _closing(folder: RunFolder) -> str:
    files = ("report.html", "metrics.json", "adapter", "mapper.safetensors", "cf.safetensors")
    places = "\n".join(f"  {folder.path / name}" for name in files)
    seconds = sum(folder.record.get("seconds", {}).values())
    return f"{console_text(folder)}\n\n{seconds / 60:.1f} minutes of training and scoring. Files:\n{places}"

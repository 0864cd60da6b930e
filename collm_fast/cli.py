"""The command line: `collm-fast COMMAND`. What a command does is the library's matter; it is only called. Floor F4.

Every command takes `--config FILE.yaml` and any key of its configuration as an option, nested ones with a dot
(`--stage1.lr 1e-3`). Exit codes: 0 done, 2 bad input (one line on stderr), 3 interrupted with the state saved, 1
anything else.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import collm_fast
from collm_fast.config import BPRConfig, CFConfig, PrepareConfig, TrainConfig, from_mapping, nearest
from collm_fast.io.run_folder import RunFolder
from collm_fast.official.config import ImportConfig
from collm_fast.options import available_cpus, parse
from collm_fast.rank_command import RankConfig


@dataclass(frozen=True)
class FitPlace:
    """Where `fit-cf` reads and writes; the model's own keys are `CFConfig`."""

    data: Path = Path("data/ml-100k")
    out: Path = Path("runs/cf")


@dataclass(frozen=True)
class FitPairsPlace:
    """Where `fit-lightgcn` reads and writes; the training's own keys are `BPRConfig`."""

    pairs: Path | None = None
    test_pairs: Path | None = None
    out: Path = Path("runs/lightgcn")
    top_k: int = 20
    resume: Literal["never", "auto"] = "never"
    device: str = "auto"


@dataclass(frozen=True)
class EvaluateConfig:
    """`collm-fast evaluate`."""

    run: Path = Path("runs/run")
    split: str = "test"
    out: Path | None = None


@dataclass(frozen=True)
class PredictConfig:
    """`collm-fast predict`; `at` is a timestamp, the history is what was liked before it."""

    run: Path = Path("runs/run")
    pairs: Path | None = None
    out: Path | None = None
    at: int | None = None


@dataclass(frozen=True)
class AblateConfig:
    """`collm-fast ablate`: further stage 2 trainings of a finished run, each a row of its table."""

    run: Path = Path("runs/run")
    inputs: tuple[str, ...] = ("+stats", "+pair")


@dataclass(frozen=True)
class EnvConfig:
    """`collm-fast env`."""

    json: bool = False


@dataclass(frozen=True)
class DemoConfig:
    """`collm-fast demo`; `fresh` moves a finished demo aside first."""

    data: Path = Path("data/ml-100k")
    out: Path = Path("runs/demo")
    llm: str = "smollm2"
    seed: int = 2023
    fresh: bool = False


def _prepare(config: PrepareConfig, command: str) -> None:
    from collm_fast.data.prepare import prepare

    dataset = prepare(config)
    counts = {name: len(split) for name, split in dataset.splits.items()}
    bad = dataset.meta.get("bad_rows", {}).get("count", 0)
    print(f"{config.out}: {counts['train']} train, {counts['valid']} valid, {counts['test']} test rows, {bad} bad rows")


def _fit_cf(place: FitPlace, config: CFConfig, command: str) -> None:
    from collm_fast.data.dataset import load_dataset
    from collm_fast.report import console_table
    from collm_fast.training.cf import fit_cf

    fit_cf(load_dataset(place.data), config, out=place.out, progress=True)
    print(console_table(json.loads((place.out / "metrics.json").read_text())))


def _fit_lightgcn(place: FitPairsPlace, config: BPRConfig, command: str) -> None:
    from collm_fast.models.llm import resolve_device
    from collm_fast.training.pairs import fit_pairs

    if place.pairs is None:
        raise ValueError("fit-lightgcn: expected --pairs FILE, got none")
    options: dict[str, Any] = {"held_out": place.test_pairs, "top_k": place.top_k, "resume": place.resume == "auto"}
    device = resolve_device(place.device)
    found = fit_pairs(place.pairs, place.out, config, device=device, progress=True, **options)
    measured = ", ".join(f"{name} {value:.4f}" for name, value in (found["held_out"] or {}).items())
    print(f"{place.out}: {found['users']} users, {found['items']} items" + (f"; {measured}" if measured else ""))


def _train(config: TrainConfig, command: str) -> None:
    from collm_fast.training.pipeline import run_training

    _print_run(run_training(config, command=command, say=print))


def _train_official(arguments: Sequence[str], summary: str, command: str) -> None:
    from collm_fast.official.launch import train_official

    _print_run(train_official(arguments, command=command, summary=summary))


def _import_official(config: ImportConfig, command: str) -> None:
    from collm_fast.io.official import summary_of
    from collm_fast.official.imports import import_official

    written, unused = import_official(config)
    print(f"{written}" + (f"; {len(unused)} tensors not used: {summary_of(unused, 20)}" if unused else ""))


def _print_run(folder: RunFolder) -> None:
    from collm_fast.report import console_text

    print(f"\n{console_text(folder)}\n\nreport: {folder.path / 'report.html'}")


def _evaluate(config: EvaluateConfig, command: str) -> None:
    from collm_fast.io.atomic import write_atomic
    from collm_fast.report import console_table

    if config.out is not None and config.out.is_dir():
        raise ValueError(f"out: expected a file, got the folder {config.out}")
    tables = collm_fast.open_run(config.run).evaluate(config.split, progress=True)
    if config.out is not None:
        write_atomic(config.out, json.dumps(tables, indent=1, allow_nan=False) + "\n")
    print(console_table(tables, config.split))


def _predict(config: PredictConfig, command: str) -> None:
    from collm_fast.io.tables import check_suffix, read_table, write_table

    if config.pairs is None or config.out is None:
        raise ValueError("predict: expected --pairs FILE and --out FILE, got none")
    check_suffix(config.out, "out")
    pairs = read_table(config.pairs, ["user", "item"], "pairs")
    run = collm_fast.open_run(config.run)
    score = run.score(pairs["user"], pairs["item"], config.at)
    # As the dataset has the ids: a CSV of pairs is read as text.
    users = run.dataset.raw_users[run.dataset.user_index(pairs["user"])]
    items = run.dataset.raw_items[run.dataset.item_index(pairs["item"])]
    write_table(config.out, {"user": users, "item": items, "score": score})
    print(f"{config.out}: {score.size} scores")


def _rank(config: RankConfig, command: str) -> None:
    from collm_fast.rank_command import rank_to_file

    print(f"{config.out}: {rank_to_file(config)} rows")


def _ablate(config: AblateConfig, command: str) -> None:
    from collm_fast.training.pipeline import run_training

    values = {**RunFolder.open(config.run).config(), "out": str(config.run), "resume": "auto"}
    inputs = [*values.get("ablations", ()), *config.inputs]
    changed = from_mapping(TrainConfig, {**values, "ablations": list(dict.fromkeys(inputs))})
    if changed.stage == "lora":
        changed = replace(changed, stage="both")
    _print_run(run_training(changed, command=command, say=print))


def _env(config: EnvConfig, command: str) -> None:
    from collm_fast.environment import describe, env

    info = env()
    print(json.dumps(info, indent=1) if config.json else describe(info))


def _demo(config: DemoConfig, command: str) -> None:
    from collm_fast.demo import run_demo

    run_demo(config.data, config.out, llm=config.llm, seed=config.seed, fresh=config.fresh, say=print)


# Name: what it does, its configurations, its function.
COMMANDS: dict[str, tuple[str, tuple[type[Any], ...], Callable[..., None]]] = {
    "demo": ("MovieLens-100K and SmolLM2-135M from raw data to a report, on any machine", (DemoConfig,), _demo),
    "prepare": ("turn raw ratings into a dataset folder", (PrepareConfig,), _prepare),
    "fit-cf": ("fit a collaborative model", (FitPlace, CFConfig), _fit_cf),
    "fit-lightgcn": ("LightGCN on any user-item pairs: recommendations", (FitPairsPlace, BPRConfig), _fit_lightgcn),
    "train": ("train CoLLM: collaborative model, stages, scores, report (also --cfg-path)", (TrainConfig,), _train),
    "evaluate": ("score a run's rows of a split again", (EvaluateConfig,), _evaluate),
    "predict": ("P(yes) for a file of user-item pairs", (PredictConfig,), _predict),
    "rank": ("the best candidates for some or all users", (RankConfig,), _rank),
    "ablate": ("further stage 2 trainings of a finished run", (AblateConfig,), _ablate),
    "import-official": ("weights of the official CoLLM code", (ImportConfig,), _import_official),
    "env": ("versions, devices, and which implementation each op uses", (EnvConfig,), _env),
}
OTHERS = {"bench": "run a benchmark of a checkout, or compare two result files"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    handler = _log_to_stderr()
    try:
        return _run(arguments)
    except ValueError as error:
        print(f"collm-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"collm-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        from collm_fast.training.interrupt import Interrupted

        saved = isinstance(error, Interrupted)
        print(f"interrupted{'; --resume auto continues from what is saved' if saved else ''}", file=sys.stderr)
        return 3 if saved else 1
    finally:
        logging.getLogger("collm_fast").removeHandler(handler)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(collm_fast.__version__)
        return 0
    if name == "bench":
        from collm_fast.bench import run_bench

        return run_bench(rest)
    if name not in COMMANDS:
        raise ValueError(f"expected a command, got {name!r}{nearest(name, [*COMMANDS, *OTHERS])}")
    _one_process(name)
    summary, classes, function = COMMANDS[name]
    command = shlex.join(["collm-fast", *arguments])
    if name == "train" and any(argument.split("=")[0] == "--cfg-path" for argument in rest):
        _use_available_cpus()
        _train_official(rest, summary, command)
        return 0
    configs = parse(name, summary, classes, rest)
    _use_available_cpus()
    function(*configs, command=command)
    return 0


def _one_process(name: str) -> None:
    """Several processes of torchrun would each write the same files."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if name != "env" and processes != "1":
        rule = "one process (torchrun --nproc-per-node 1, or no torchrun), as several GPUs are not there yet"
        raise ValueError(f"{name}: expected {rule}, got WORLD_SIZE {processes}")


def _usage() -> str:
    lines = ["usage: collm-fast COMMAND [options]; collm-fast COMMAND --help lists them", ""]
    texts = {name: summary for name, (summary, _, _) in COMMANDS.items()} | OTHERS
    return "\n".join(lines + [f"  {name:16}{text}" for name, text in texts.items()])


def _log_to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("collm_fast")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def _use_available_cpus() -> None:
    """Not more threads than this process may use: in a container torch starts one for every core of the host."""
    import torch

    available = available_cpus(Path("/sys/fs/cgroup/cpu.max"))
    if available < torch.get_num_threads():
        torch.set_num_threads(available)

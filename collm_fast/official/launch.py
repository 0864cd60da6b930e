"""`collm-fast train --cfg-path FILE.yaml [--options key=value ...]`: the official launcher's command. Floor F4.

What each field becomes is fields.py's matter; here its paths are followed: data are prepared, checkpoints imported, and
then `training/pipeline.py` does what it does for every run.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from collm_fast.config import PrepareConfig, TrainConfig
from collm_fast.data.dataset import SPLITS, file_hash, load_dataset
from collm_fast.data.prepare import prepare
from collm_fast.io.atomic import write_atomic
from collm_fast.io.official import State, mapper_of, read_official, summary_of, tables_of
from collm_fast.io.run_folder import RunFolder
from collm_fast.models.cf.frozen import FILE, CFModel
from collm_fast.official.fields import Plan, model_of, plan_of
from collm_fast.official.imports import take_cf, take_lora, take_mapper
from collm_fast.official.read import read_config
from collm_fast.options import parse
from collm_fast.training.pipeline import run_training
from collm_fast.training.record import undone_on_bad_input
from collm_fast.training.start import ADAPTER, MAPPER

CKPT, PRETRAINED, PROMPT = "model.ckpt", "model.rec_config.pretrained_path", "model.prompt_path"
LLM, OUTPUT, RESUME = "model.llama_model", "run.output_dir", "run.resume_ckpt_path"


@dataclass
class Arguments:
    """The command's arguments: the launcher's own, and those of `collm-fast train`."""

    cfg_path: Path
    options: list[str] = field(default_factory=list)
    allow_pickle: bool = False
    rest: list[str] = field(default_factory=list)


def split_arguments(arguments: Sequence[str]) -> Arguments:
    """Part the launcher's arguments from ours.

    Raises: ValueError for --cfg-path without a file or --options without any.
    """
    found, left = Arguments(Path()), list(arguments)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag == "--cfg-path":
            if not equals and not left:
                raise ValueError("train: expected --cfg-path FILE.yaml, got no file")
            found.cfg_path = Path(value if equals else left.pop(0))
        elif flag == "--options":
            given = [value] if equals else []
            while left and not left[0].startswith("--"):
                given.append(left.pop(0))
            if not given:
                raise ValueError("train: expected --options key=value ..., got none")
            found.options += given
        elif flag in ("--allow-pickle", "--allow_pickle"):
            if not equals and left and left[0].lower() in ("true", "false"):
                value = left.pop(0)
            found.allow_pickle = value.lower() != "false"
        else:
            found.rest.append(flag + equals + value)
    return found


def train_official(
    arguments: Sequence[str], *, command: str, summary: str = "", say: Callable[[str], None] = print
) -> RunFolder:
    """Train or score as an official configuration says; options of `collm-fast train` win over its fields.

    Raises: ValueError for bad input, naming the field and what sets it; as `run_training` otherwise.
    """
    given = split_arguments(arguments)
    values = read_config(given.cfg_path, given.options)
    model_of(values["model"].get("rec_model", "MF"))
    prompt = _prompt_file(values["model"].get("prompt_path"), given.cfg_path)
    plan = plan_of(values, prompt.read_text(encoding="utf-8") if prompt else "")
    _place(plan, prompt)
    with _by_field(plan):
        (config,) = parse("train", summary, (TrainConfig,), given.rest, plan.values)
    if config.resume == "auto" and str(config.out) == plan.values["out"] and RESUME not in plan.paths:
        raise ValueError(f"resume: expected --out FOLDER or --options {RESUME}=FOLDER with it, got neither")
    listing = f"{given.cfg_path}, field by field:\n{plan.text()}\n"
    resume = RunFolder.holds_run(config.out) and config.resume == "auto"
    if RunFolder.holds_run(config.out) and not resume:
        raise ValueError(f"out: expected a folder without a run, got {config.out}; --resume auto continues it")
    with nullcontext() if resume else undone_on_bad_input(config.out):
        config = _follow(plan, config, given.allow_pickle, say)
        say(listing)
        write_atomic(config.out / "official.txt", listing)
        with _named(LLM, "llm: "), _named(CKPT, "load_adapter: "), _named(CKPT, "start: "):
            return run_training(config, command=command, say=say)


@contextmanager
def _named(name: str, prefix: str = "ckpt: ") -> Iterator[None]:
    """Bad input that begins with `prefix` is the field's, and says what sets it."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(prefix):
            raise
        raise _wrong(name, str(error).removeprefix(prefix)) from error


@contextmanager
def _by_field(plan: Plan) -> Iterator[None]:
    """A bad value of one of our keys is one of the field that became it."""
    try:
        yield
    except ValueError as error:
        for name, _, key in plan.done:
            if str(error).startswith(f"{key}: "):
                raise ValueError(f"{name} ({key}){str(error).removeprefix(key)}") from error
        raise


def _wrong(name: str, text: str) -> ValueError:
    return ValueError(f"{name}: {text}; --options {name}=PATH sets it")


def _prompt_file(given: object, cfg_path: Path) -> Path | None:
    """The prompt file, looked for where the command runs and then beside the configuration's folder."""
    if given in (None, ""):
        return None
    here = Path(str(given)).expanduser()
    for place in (here, cfg_path.parent / here, cfg_path.parent.parent / here):
        if place.is_file():
            return place.resolve()
    raise _wrong(PROMPT, f"expected a file of prompts, got {str(given)!r}, which is no file (null: the built-in one)")


def _place(plan: Plan, prompt: Path | None) -> None:
    """The paths that `TrainConfig` has a key for."""
    stage = "stage1" if plan.values["stage"] == "lora" else "stage2"
    if prompt is not None:
        template = plan.paths["model.prompt_template"]
        plan.put(f"prompt.{stage}", f"@{prompt}" if template == "{}" else _wrapped(prompt, template))
    folder = Path(plan.paths.get(OUTPUT, "runs")) / time.strftime("%Y%m%d%H%M%S")
    resumed = plan.paths.get(RESUME)
    if resumed is not None:
        folder = Path(resumed)
        if not RunFolder.holds_run(folder):
            text = (
                f"expected a run folder of collm_fast, got {resumed}: the optimizer's state of an official checkpoint"
            )
            raise _wrong(RESUME, f"{text} is not read, --options {CKPT}=FILE begins with its weights")
        plan.put("resume", "auto")
    plan.put("out", str(folder))
    places = [path for name, path in plan.paths.items() if name.startswith("datasets.")]
    plan.put("data", next((path for path in places if Path(path).exists()), places[0] if places else "none"))


def _wrapped(prompt: Path, template: str) -> str:
    """The prompt within its template; several wordings would need a file of their own."""
    lines = dict.fromkeys(line for line in prompt.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(lines) != 1:
        rule = f"'{{}}' with the {len(lines)} wordings of {prompt}"
        raise ValueError(f"model.prompt_template: expected {rule}, got {template!r}; write them wrapped into the file")
    return template.replace("{}", next(iter(lines)))


def _follow(plan: Plan, config: TrainConfig, allow_pickle: bool, say: Callable[[str], None]) -> TrainConfig:
    """The configuration with data that are prepared and checkpoints that are imported."""
    state = _check_paths(plan, config)
    data = _dataset(plan, config, allow_pickle)
    own = config.out / "official"
    return _collaborative(plan, _begin(plan, replace(config, data=data), state, own, say), state, own, say)


def _check_paths(plan: Plan, config: TrainConfig) -> State:
    """Every path is there; returns the tensors of model.ckpt (none where it is a folder, or not given)."""
    llm, out = Path(config.llm).expanduser(), config.out
    is_path = llm.is_absolute() or config.llm.startswith((".", "~")) or config.llm.count("/") > 1
    if is_path and not llm.exists():
        raise _wrong(LLM, f"expected a model's folder, a FILE.gguf or a hub name, got {config.llm}, which is not there")
    first = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not first.is_dir() or not os.access(first, os.W_OK):
        raise _of(plan, "out", OUTPUT, f"expected a folder to write into, got {out.parent}", config)
    if not config.data.is_dir():
        name = next((name for name in plan.paths if name.startswith("datasets.")), "datasets.movie_ood.path")
        text = f"expected the folder of the published files, got {config.data}, which is not there"
        raise _of(plan, "data", name, text, config)
    if config.cf == plan.kind and PRETRAINED in plan.paths and not Path(plan.paths[PRETRAINED]).exists():
        text = f"expected a .pth of the official code or a folder of fit-cf, got {plan.paths[PRETRAINED]}, which is not"
        raise _wrong(PRETRAINED, f"{text} there (not_have: {plan.kind} is fitted first)")
    if config.start is not None or CKPT not in plan.paths:
        _require_mapper(config, config.start is not None, "none")
        return {}
    path = Path(plan.paths[CKPT])
    if path.is_dir():
        _require_mapper(config, (path / MAPPER).is_file(), str(path))
        return {}
    if not path.is_file():
        text = f"expected a .pth of the official code or a run folder of collm_fast, got {path}, which is not there"
        raise _wrong(CKPT, f"{text} (null: begin without)")
    with _named(CKPT):
        state = read_official(path)
        _require_mapper(config, bool(mapper_of(state)[0]), str(path))
    return state


def _of(plan: Plan, key: str, name: str, text: str, config: TrainConfig) -> ValueError:
    """A bad path of the field `name`, or of our own key where an option set that."""
    own = Path(plan.values[key]) != getattr(config, key)
    return ValueError(f"{key}: {text}") if own else _wrong(name, text)


def _require_mapper(config: TrainConfig, there: bool, got: str) -> None:
    if config.evaluate_only and config.stage != "lora" and not there:
        rule = "expected a checkpoint with a mapper (llama_proj) to score"
        raise _wrong(CKPT, f"{rule}, got {got} (--options run.evaluate=False trains one)")


def _dataset(plan: Plan, config: TrainConfig, allow_pickle: bool) -> Path:
    """A prepared dataset: the folder itself, or one made of its files once and kept beside the run."""
    source = config.data
    if (source / "meta.json").is_file():
        return source
    files = [
        next((file for file in (source / f"{name}.parquet", source / f"{name}_ood2.pkl") if file.is_file()), None)
        for name in SPLITS
    ]
    pickled = [file for file in files if file is not None and file.suffix == ".pkl"]
    if pickled and not allow_pickle:
        rule = "expected --allow-pickle to read pickles (through a restricted unpickler)"
        raise ValueError(f"data: {rule}, got {pickled[0]} without it")
    digest = hashlib.sha256("".join(file_hash(file) for file in files if file is not None).encode())
    out = config.out.absolute().parent / f"data-{digest.hexdigest()[:12]}"
    if not (out / "meta.json").is_file():
        prepare(PrepareConfig(source="collm", input=source, out=out, allow_pickle=bool(pickled)))
    return out


def _begin(plan: Plan, config: TrainConfig, state: State, own: Path, say: Callable[[str], None]) -> TrainConfig:
    """`start`, from model.ckpt: a folder of ours as it is, an official file imported into `own`."""
    if config.start is not None or CKPT not in plan.paths:
        return config
    path = Path(plan.paths[CKPT])
    if not state:
        if not (path / MAPPER).is_file() and not (path / ADAPTER).is_dir():
            raise _wrong(CKPT, f"expected a folder with {ADAPTER}/ or {MAPPER}, got {path}")
        return replace(config, start=path)
    with _named(CKPT):
        lora = take_lora(state, own, config.llm, config.lora)
        mapper = take_mapper(state, own, config.mapper.tokens_per_id) if config.stage != "lora" else set()
        tables = tables_of(state, plan.kind)[1]
        if not lora | mapper | tables:
            rule = "expected LoRA matrices (llama_model_lora.*.lora_A) or a mapper (llama_proj.*)"
            raise ValueError(f"ckpt: {rule} in {path}, got {summary_of(state)}")
    unused = state.keys() - lora - mapper - tables
    if unused:
        say(f"{path}: {len(unused)} tensors not used: {summary_of(unused)}")
    return replace(config, start=own) if lora | mapper else config


def _collaborative(plan: Plan, config: TrainConfig, state: State, own: Path, say: Callable[[str], None]) -> TrainConfig:
    """`cf`, from pretrained_path or the checkpoint: what the official code would have loaded last."""
    if config.cf != plan.kind:
        return config
    name, path = PRETRAINED, plan.paths.get(PRETRAINED)
    whole = tables_of(state, plan.kind)[0] is not None and (path is None or not plan.freeze_rec)
    if whole:
        name, path = CKPT, plan.paths[CKPT]
    if path is None:
        return config
    given = own
    with _named(name):
        if Path(path).is_dir() or Path(path).name == FILE:
            given = Path(path)
        else:
            tensors = state if whole else read_official(Path(path))
            dataset = load_dataset(config.data)
            used = take_cf(
                tensors, "lightgcn" if plan.kind == "lightgcn" else "mf", dataset, config.collaborative.num_layers, own
            )
            if not used:
                raise ValueError(f"ckpt: expected the tables of {plan.kind} in {path}, got {summary_of(tensors)}")
            if not whole and tensors.keys() - used:
                say(f"{path}: not used: {summary_of(tensors.keys() - used)}")
    dim, wanted = CFModel.load(given).dim, config.collaborative.dim
    if wanted is not None and dim != wanted:
        raise ValueError(f"model.rec_config.embedding_size: expected {dim} as in {path}, got {wanted}")
    return replace(config, cf=str(given))

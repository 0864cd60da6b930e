"""Every default in one place: frozen dataclasses that validate themselves.

The command line (cli.py), the Python API (run.py) and the run folder's config.yaml all carry exactly these fields.
Floor F0: imports nothing of the package.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

CFName = Literal["mf", "lightgcn", "sasrec", "din"]
MapperInput = Literal["embedding", "+stats", "+pair", "+stats+pair"]
Loss = Literal["yes", "yes-no"]
Stage = Literal["lora", "cie", "both"]
CacheOn = Literal["device", "host"]


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    """`name` is the field's own; `from_mapping` puts the keys above it in front."""
    if not ok:
        raise ValueError(f"{name}: expected {rule}, got {value!r}")


def _require_seed(seed: int | None) -> None:
    _require(seed is None or 0 <= seed < 2**63, "seed", "in [0, 2^63)", seed)


@dataclass(frozen=True)
class PrepareConfig:
    """What `collm-fast prepare` does to raw data. `split=None` and `history=None` mean the source's own default."""

    source: Literal["ml-100k", "ml-1m", "collm", "amazon", "recbole", "table"] = "ml-100k"
    input: Path | None = None
    out: Path = Path("data/ml-100k")
    split: Literal["calendar", "user"] | None = None
    # row: the history grows at every row (the paper). block: rows of a user share the history of their block's start.
    history: Literal["row", "block"] | None = None
    history_block: int = 8
    like_threshold: float = 4.0
    user_column: str = "user"
    item_column: str = "item"
    rating_column: str = "rating"
    timestamp_column: str = "timestamp"
    title_column: str = "title"
    # What the items are; chooses the built-in prompts. None: as the source says ("item" where it does not).
    domain: Literal["movie", "book", "item"] | None = None
    items: Path | None = None  # `table` only: a CSV or Parquet file with the item and title columns
    max_bad_fraction: float = 0.01
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        _require(self.history_block >= 1, "history_block", "at least 1", self.history_block)
        _require(0 <= self.max_bad_fraction < 1, "max_bad_fraction", "in [0, 1)", self.max_bad_fraction)


@dataclass(frozen=True)
class CFConfig:
    """A collaborative model and its training. None means the model's own recipe (`models/cf`)."""

    model: CFName = "mf"
    dim: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    loss: Literal["bce", "bpr"] = "bce"
    bias: bool = False
    # official: N(0, 1), as published; it stalls for some seeds. scaled: never does, and is the default.
    init: Literal["scaled", "official"] = "scaled"
    num_layers: int = 2
    batch_size: int = 2048
    max_epochs: int = 2000
    patience: int = 100
    # The fraction of each user's train rows, latest first, that the model never sees: stage 2 can train on those.
    held_out: float = 0.0
    seed: int | None = None  # None: the run's; of `fit-cf`: 2023

    def __post_init__(self) -> None:
        _require(self.dim is None or self.dim >= 1, "dim", "at least 1", self.dim)
        _require(self.num_layers >= 0, "num_layers", "at least 0", self.num_layers)
        _require(0 <= self.held_out < 1, "held_out", "in [0, 1)", self.held_out)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(self.patience >= 1, "patience", "at least 1", self.patience)
        _require(self.max_epochs >= 1, "max_epochs", "at least 1", self.max_epochs)
        _require(self.lr is None or self.lr > 0, "lr", "above 0", self.lr)
        _require(self.weight_decay is None or self.weight_decay >= 0, "weight_decay", ">= 0", self.weight_decay)
        _require_seed(self.seed)


@dataclass(frozen=True)
class BPRConfig:
    """LightGCN on plain (user, item) pairs (training/bpr.py); the defaults are those of the authors' PyTorch code."""

    dim: int = 64
    num_layers: int = 3
    lr: float = 1e-3
    # l2 / 2 times the squared layer-0 rows of a sample's three nodes, a mean over the batch.
    l2: float = 1e-4
    batch_size: int = 2048
    epochs: int = 1000
    init_std: float = 0.1
    # What intermediate layers are stored in: bfloat16 halves their traffic at a relative error of 4e-4.
    storage_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    edge_dropout: float = 0.0  # the probability that a step does without an undirected edge
    evaluate_every: int = 10
    checkpoint_every: int = 10
    seed: int = 2020

    def __post_init__(self) -> None:
        for name in ("dim", "batch_size", "epochs", "evaluate_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.num_layers >= 0, "num_layers", "at least 0", self.num_layers)
        _require(self.lr > 0, "lr", "above 0", self.lr)
        _require(self.l2 >= 0, "l2", "at least 0", self.l2)
        _require(self.init_std > 0, "init_std", "above 0", self.init_std)
        _require(0 <= self.edge_dropout < 1, "edge_dropout", "in [0, 1)", self.edge_dropout)
        _require_seed(self.seed)


@dataclass(frozen=True)
class PromptConfig:
    """The two prompts; a text, or `@FILE` with one template a line. None means the built-in of the dataset's domain."""

    stage1: str | None = None
    stage2: str | None = None
    history_length: int = 10
    yes: str = "Yes"
    no: str = "No"

    def __post_init__(self) -> None:
        _require(self.history_length >= 0, "history_length", "at least 0", self.history_length)


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's names and the paper's values (section 5.1)."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    # position: a mask for each packed token, so rows that share a prefix share its masks, too. sample: every row draws
    # its own, as an unpacked batch does; training then computes no prefix once for several rows. Measured on
    # MovieLens-100K in blocks of 8 rows: 2.6 times the time of a step in the order `group`, 1.06 at `random`.
    dropout_per: Literal["position", "sample"] = "position"
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        _require(1 <= self.r <= 256, "r", "in [1, 256]", self.r)
        _require(self.alpha > 0, "alpha", "above 0", self.alpha)
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _require(len(self.target_modules) > 0, "target_modules", "at least one module name", self.target_modules)


@dataclass(frozen=True)
class MapperConfig:
    """The CIE mapper Linear(d, factor d) - ReLU - Linear(factor d, H tokens_per_id); section 4.2 of the paper."""

    hidden_factor: int = 10
    tokens_per_id: int = 1
    inputs: MapperInput = "embedding"

    def __post_init__(self) -> None:
        _require(self.hidden_factor >= 1, "hidden_factor", "at least 1", self.hidden_factor)
        _require(1 <= self.tokens_per_id <= 255, "tokens_per_id", "in [1, 255]", self.tokens_per_id)


@dataclass(frozen=True)
class StageConfig:
    """One stage's optimisation: AdamW, linear warm-up once, cosine from lr to min_lr over max_steps."""

    lr: float = 1e-3
    min_lr: float = 8e-5
    warmup_steps: int = 200
    weight_decay: float = 1e-3
    batch_size: int = 16
    epochs: float = 10.0
    max_steps: int | None = None
    eval_every: int = 200
    patience: int | None = 10  # evaluations without a better validation AUC; None never stops early
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "above 0", self.lr)
        _require(0 <= self.min_lr <= self.lr, "min_lr", "in [0, lr]", self.min_lr)
        _require(self.warmup_steps >= 0, "warmup_steps", "at least 0", self.warmup_steps)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(self.epochs > 0, "epochs", "above 0", self.epochs)
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", "at least 1", self.max_steps)
        _require(self.eval_every >= 1, "eval_every", "at least 1", self.eval_every)
        _require(self.patience is None or self.patience >= 1, "patience", "at least 1 or none", self.patience)
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "above 0 or none", self.clip_norm)


@dataclass(frozen=True)
class TrainConfig:
    """Everything `collm-fast train` and `collm_fast.train` need."""

    data: Path = Path("data/ml-100k")
    llm: str = ""
    cf: str = "mf"  # a model's name (fitted first) or the folder that `fit-cf` wrote
    out: Path = Path("runs/run")
    stage: Stage = "both"
    seed: int = 2023
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    # The frozen linear layers in 8 or 4 bits, through bitsandbytes: a quarter or an eighth of float32's memory.
    quantize: Literal["int8", "nf4"] | None = None
    loss: Loss = "yes"
    # group: rows of one (user, history) stay together and share their prefix; random: the official order. Where groups
    # are large, group costs accuracy: .03 to .07 AUC in 75 steps on MovieLens-100K, see benchmarks/results/README.md.
    order: Literal["group", "random"] = "group"
    # In the order group, at most so many rows of one (user, history) together: fewer mix more users into a batch.
    group_rows: int | None = None
    # all: the paper's way. held-out: stage 2 trains on the rows the collaborative model never saw (cf.held_out > 0).
    cie_rows: Literal["all", "held-out"] = "all"
    # Until so many rows are reached: whole (user, history) groups of train, whole users of valid and test, seeded.
    limit_train: int | None = None
    limit_valid: int | None = None  # None: as limit_eval
    limit_eval: int | None = None
    # Evaluations during a stage score so many of the validation rows, a fixed sample of whole users; at the end all
    # rows are scored for the at most three best states that the sample's interval cannot tell apart. None: all, always.
    valid_rows: int | None = None
    max_steps: int | None = None  # caps every stage
    resume: Literal["never", "auto"] = "never"
    # A run's folder, or one of import-official: stage 1 begins with its adapter, stage 2 stands on it and begins with
    # its mapper. With evaluate_only no step is taken from there.
    start: Path | None = None
    evaluate_only: bool = False
    checkpoint_minutes: float = 5.0
    # The official code leaves LoRA dropout on in stage 2 although LoRA is frozen there.
    stage2_lora_dropout: bool = False
    # Packed tokens of one forward. A training batch of more is cut between its (user, history) groups, and the parts'
    # gradients are added up: the batch stays what `batch_size` says, only the memory is bounded.
    tokens_per_batch: int = 8192
    # Stage 2: keys and values of the text before the user's row, kept across steps and evaluations. Pays where most of
    # these prefixes fit (the fixed validation rows, small training sets); each is then run by itself the first time.
    kv_cache_gb: float = 0.0
    kv_cache_on: CacheOn = "device"  # host: in pinned memory beside a GPU
    # On a GPU in half precision: forward and backward as one captured CUDA graph for each shape of a batch. For
    # models so small that launching their kernels takes longer than running them; not together with kv_cache_gb.
    cuda_graphs: bool = False
    trust_remote_code: bool = False
    ablations: tuple[MapperInput, ...] = ()  # further stage 2 runs, each a row `stage2+...` of the table
    collaborative: CFConfig = field(default_factory=CFConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mapper: MapperConfig = field(default_factory=MapperConfig)
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self) -> None:
        for name in ("group_rows", "limit_train", "limit_valid", "limit_eval", "valid_rows", "max_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        _require_seed(self.seed)
        _require(self.checkpoint_minutes >= 0, "checkpoint_minutes", "at least 0", self.checkpoint_minutes)
        _require(self.tokens_per_batch >= 1, "tokens_per_batch", "at least 1", self.tokens_per_batch)
        _require(0 <= self.kv_cache_gb < float("inf"), "kv_cache_gb", "at least 0", self.kv_cache_gb)
        _require(not (self.cuda_graphs and self.kv_cache_gb), "cuda_graphs", "true only without kv_cache_gb", True)
        # A fitted model brings its own held-out fraction; run.py checks that one.
        _require(
            self.cie_rows == "all" or self.collaborative.held_out > 0 or self.cf not in get_args(CFName),
            "cie_rows",
            "held-out only with collaborative.held_out above 0",
            self.cie_rows,
        )


Config = TypeVar("Config")


def from_mapping(cls: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Build a configuration from nested plain values (YAML, command-line options, keyword arguments).

    Raises: ValueError naming the dotted key and the rule; for an unknown key also the nearest known one.
    """
    known = get_type_hints(cls)
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(_unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in known]))
        built[key] = _convert(known[key], value, f"{prefix}{key}")
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: nested values that YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return to_mapping(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {item.name: plain(getattr(config, item.name)) for item in fields(config)}


def options(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf of a configuration as (dotted key, type, default)."""
    defaults = cls()
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind):
            yield from options(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", kind, getattr(defaults, name)


def type_name(kind: Any) -> str:
    """A type as messages and `--help` name it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (Union, types.UnionType):
        return "|".join("none" if arg is type(None) else type_name(arg) for arg in args)
    if origin is tuple:
        return f"list of {type_name(args[0])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true|false", "Path": "path"}[kind.__name__]


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?` for the known name nearest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_key(key: str, known: list[str]) -> str:
    return f"config: expected a known key, got {key!r}{nearest(key, known)}"


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as the declared type; text is read as a number only where a number is declared."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        if isinstance(value, Mapping):
            return from_mapping(kind, value, f"{key}.")  # type: ignore[arg-type]
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        raise ValueError(f"{key}: expected a mapping of its keys, got {value!r}")
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, key)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, (list, tuple, str)):
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return tuple(_convert(args[0], part, key) for part in parts)
    if kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if math.isfinite(number) and (kind is float or number.is_integer()):
                return float(number) if kind is float else int(value)
        except (TypeError, ValueError):
            pass
    if (kind is str and isinstance(value, str)) or (kind is Path and isinstance(value, (str, Path)) and str(value)):
        return kind(value)
    raise ValueError(f"{key}: expected {type_name(kind)}, got {value!r}")

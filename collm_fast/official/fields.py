"""What becomes of every field of an official configuration: the keys of `TrainConfig`, and a list that says so. F4.

The YAML itself is read.py's matter; the paths are followed by launch.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm_fast.data.templates import FORBIDDEN

# Fields with one place here, whatever else the file says; `{stage}` is stage1 or stage2.
RENAMED = {
    "model.llama_model": "llm",
    "model.proj_token_num": "mapper.tokens_per_id",
    "model.proj_mid_times": "mapper.hidden_factor",
    "model.lora_config.r": "lora.r",
    "model.lora_config.alpha": "lora.alpha",
    "model.lora_config.dropout": "lora.dropout",
    "model.lora_config.target_modules": "lora.target_modules",
    "run.init_lr": "{stage}.lr",
    "run.min_lr": "{stage}.min_lr",
    "run.weight_decay": "{stage}.weight_decay",
    "run.warmup_steps": "{stage}.warmup_steps",
    "run.batch_size_train": "{stage}.batch_size",
    "run.iters_per_epoch": "{stage}.eval_every",
    "run.seed": "seed",
}
# Fields that mean nothing here, and why.
IGNORED = {
    "model.model_type": "the defaults are collm_fast's",
    "model.max_txt_len": "no prompt is ever cut",
    "model.proj_drop": "the official mapper has no dropout either",
    "model.end_sym": "only the answer's first token is read",
    "model.user_num": "the data's",
    "model.item_num": "the data's",
    "model.low_resource": "--dtype chooses the precision",
    "model.device_8bit": "--dtype chooses the precision",
    "model.rec_config.user_num": "the data's",
    "model.rec_config.item_num": "the data's",
    "model.rec_config.dataset": "a name",
    "model.rec_config.keep_prob": "read only with dropout",
    "model.rec_config.A_n_fold": "the graph is one piece",
    "model.rec_config.A_split": "the graph is one piece",
    "model.rec_config.pretrain": "the tables are loaded or fitted whole",
    "model.rec_config.init_emb": "the recipe's",
    "datasets.*.data_type": "a name",
    "run.warmup_lr": "the warm-up begins at lr / warmup_steps and happens once",
    "run.batch_size_eval": "scoring packs by tokens: --tokens-per-batch",
    "run.num_workers": "rows are packed in the training process",
    "run.world_size": "one process",
    "run.dist_url": "one process",
    "run.distributed": "one process",
}
# Fields that `_Plan` decides on.
DECIDED = (
    *("model.arch", "model.freeze_rec", "model.freeze_proj", "model.freeze_lora", "model.prompt_path"),
    *("model.prompt_template", "model.ans_type", "model.rec_model", "model.lora_config.use_lora", "model.ckpt"),
    *("model.rec_config.pretrained_path", "model.rec_config.embedding_size", "model.rec_config.embed_size"),
    *("model.rec_config.gcn_layers", "model.rec_config.dropout", "datasets.*.path", "datasets.*.build_info.storage"),
    *("run.task", "run.lr_sched", "run.max_epoch", "run.mode", "run.output_dir", "run.amp", "run.resume_ckpt_path"),
    *("run.evaluate", "run.train_splits", "run.valid_splits", "run.test_splits", "run.device"),
)
KNOWN = (*RENAMED, *IGNORED, *DECIDED)
# What the official trainer does without a field: rows at random, no clipping, and 20 evaluations of patience.
TRAINER = {"clip_norm": None, "patience": 20}
MODELS = ("mf", "lightgcn")
LATER_MODELS = {
    "sasrec": "SASRec",
    "din": "DIN",
    "dcn": "DCN",
    "soft_prompt": "soft prompts (a learned row for all users and one for all items)",
    "personlized_prompt": "personalised prompts (a learned row of the language model's width for every id)",
}


@dataclass
class Plan:
    """A configuration as this package sees it.

    values: nested, for `TrainConfig`, the paths as they were given; done: field, value and what became of it;
    paths: what launch.py follows, by field.
    """

    values: dict[str, Any] = field(default_factory=dict)
    done: list[tuple[str, Any, str]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    kind: str = "mf"
    freeze_rec: bool = True

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key of `values`."""
        *parents, last = key.split(".")
        inner = self.values
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value

    def text(self) -> str:
        """The list of what was done with every field, one a line."""
        width = max(len(name) for name, _, _ in self.done)
        return "\n".join(f"  {name:{width}}  {_short(value):30}  {what}" for name, value, what in self.done)


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def model_of(given: object) -> str:
    """The name here of the collaborative model that `model.rec_model` names.

    Raises: ValueError for one that this version does not have, saying what it is.
    """
    name = str(given).lower()
    if name in MODELS:
        return name
    what = LATER_MODELS.get(name)
    reason = f": {what}, which a later version brings" if what else ", which the official code does not have either"
    raise ValueError(f"model.rec_model: expected MF or lightgcn, got {str(given)!r}{reason}")


def plan_of(config: Mapping[str, Any], prompt: str = "") -> Plan:
    """Translate a configuration that `read_config` gave; `prompt` is the text of its prompt file.

    Raises: ValueError, naming the field, for what this version does not have.
    """
    return _Planner(config, prompt).plan


class _Planner:
    """One pass over the fields; each is taken once, and what it became is noted."""

    def __init__(self, config: Mapping[str, Any], prompt: str) -> None:
        self.plan = Plan()
        self.left = dict(leaves(config))
        self.given = set(self.left)
        if len(config["datasets"]) != 1:
            raise ValueError(f"datasets: expected one data set, got {', '.join(config['datasets'])}")
        (self.data,) = config["datasets"]
        self._refuse()
        evaluate = self._flag("run.evaluate", False)
        self._stage(evaluate, prompt)
        self._collaborative()
        self._paths(evaluate)
        self._trainer()
        self._plain()

    def take(self, name: str, default: Any = None) -> Any:
        return self.left.pop(name, default)

    def note(self, name: str, value: Any, what: str, always: bool = False) -> None:
        """Say what a field became; one that the file does not have is passed over, unless it matters."""
        if always or name in self.given:
            self.plan.done.append((name, value, what))

    def _flag(self, name: str, default: bool) -> bool:
        value = self.left.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")
        return value

    def _only(self, name: str, allowed: Sequence[Any], what: str, missing: str) -> Any:
        """A field with a few values: the first is the default, and any other is not there."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {value!r}{missing}")
        self.note(name, value, what)
        return value

    def _refuse(self) -> None:
        """What there is no counterpart of is said before anything else."""
        later = ", which a later version brings"
        given = self.take("model.rec_model", "MF")
        self.plan.kind = kind = model_of(given)
        self.note("model.rec_model", given, f"cf: {kind}")
        self._only("model.arch", ("mini_gpt4rec_v2",), "the hybrid model", later)
        self._only("run.task", ("rec_pretrain", "rec_pretrain_task"), "training and its scores", later)
        self._only("run.lr_sched", ("linear_warmup_cosine_lr",), "linear warm-up once, then a cosine", later)
        self._only("model.rec_config.dropout", (False,), "no edge dropout", later)

    def _stage(self, evaluate: bool, prompt: str) -> None:
        """What trains; what is only scored is told by the prompt, since both may be frozen then."""
        frozen = {
            name: self._flag(f"model.freeze_{name}", default) for name, default in (("lora", False), ("proj", False))
        }
        if evaluate and prompt:
            stage = "cie" if any(tag in prompt for tag in FORBIDDEN[1]) else "lora"
        elif frozen["lora"] != frozen["proj"]:
            stage = "lora" if frozen["proj"] else "cie"
        else:
            got = "both train at once, which a later version brings" if not frozen["lora"] else "nothing trains"
            raise ValueError(
                f"model.freeze_lora, model.freeze_proj: expected one of them true and one false, got {got}"
            )
        mode = self._only("run.mode", ("v2", "v1"), "the freeze flags name the stage; the loss is that of v2", "")
        if mode == "v1" and stage == "cie":
            raise ValueError("run.mode: expected v2 with freeze_lora true (stage 2), got 'v1'")
        self.plan.put("stage", stage)
        self.stage = "stage1" if stage == "lora" else "stage2"
        for name, value in frozen.items():
            self.take(f"model.freeze_{name}")
            self.note(f"model.freeze_{name}", value, f"stage: {stage}")
        lora = self._flag("model.lora_config.use_lora", True)
        if not lora and stage == "lora":
            raise ValueError("model.lora_config.use_lora: expected True for stage 1, which trains LoRA, got False")
        self.take("model.lora_config.use_lora")
        self.note("model.lora_config.use_lora", lora, "stage 2 has an adapter where model.ckpt holds one")
        self.plan.freeze_rec = self._flag("model.freeze_rec", True)
        self.take("model.freeze_rec")
        frozen_here = "" if self.plan.freeze_rec else ": to train it along is not there yet"
        self.note("model.freeze_rec", self.plan.freeze_rec, f"the collaborative model stays frozen{frozen_here}")
        self.plan.put("evaluate_only", self.take("run.evaluate", False))
        self.note("run.evaluate", evaluate, "evaluate_only")

    def _collaborative(self) -> None:
        place = "model.rec_config."
        wide, own = self.take(place + "embedding_size"), self.take(place + "embed_size")
        dim = own if self.plan.kind == "lightgcn" and own is not None else wide
        if dim is not None:
            self.plan.put("collaborative.dim", dim)
        for name, value in (("embedding_size", wide), ("embed_size", own)):
            if value is not None:
                self.note(place + name, value, "collaborative.dim")
        layers = self.take(place + "gcn_layers")
        if layers is not None:
            self.plan.put("collaborative.num_layers", layers)
            self.note(place + "gcn_layers", layers, "collaborative.num_layers")
        self.plan.put("cf", self.plan.kind)

    def _path(self, name: str, what: str, absent: str) -> None:
        value = self.take(name)
        if value in (None, "", "not_have"):
            self.note(name, value, absent, always=name == "model.ckpt")
        else:
            self.plan.paths[name] = str(Path(str(value)).expanduser())
            self.note(name, value, what)

    def _paths(self, evaluate: bool) -> None:
        fitted = "cf: fitted first, or the checkpoint's"
        self._path("model.rec_config.pretrained_path", "cf: imported, or the folder of fit-cf", fitted)
        whole = "start: its adapter and mapper" if not evaluate else "start: what is scored"
        self._path("model.ckpt", whole, "start: none, the language model without an adapter")
        self._path("run.resume_ckpt_path", "out, with resume: auto", "resume: as --resume says")
        self._path("run.output_dir", "out: a folder of this run in it", "out: runs/<time>")
        self._path(
            f"datasets.{self.data}.build_info.storage", "data: prepared once beside the run", "data: datasets.*.path"
        )
        self._path(f"datasets.{self.data}.path", "data, where storage is not there", "none")
        self._path("model.prompt_path", f"prompt.{self.stage}", f"prompt.{self.stage}: the built-in of the domain")
        template = self._text("model.prompt_template", "{}", "around every line of the prompt file")
        if template.count("{}") != 1 or re.search(r"{[^}]+}", template):
            raise ValueError(f"model.prompt_template: expected a text with one {{}}, got {template!r}")
        self.plan.paths["model.prompt_template"] = template

    def _text(self, name: str, default: str, what: str) -> str:
        value = self.take(name)
        self.note(name, value, what)
        return default if value in (None, "") else str(value)

    def _trainer(self) -> None:
        epochs, every = (self._number(name) for name in ("run.max_epoch", "run.iters_per_epoch"))
        if epochs and every:
            self.plan.put(f"{self.stage}.max_steps", epochs * every)
            # Never what ends the stage: max_steps does.
            self.plan.put(f"{self.stage}.epochs", epochs * every * (self._number("run.batch_size_train") or 1))
            self.note("run.max_epoch", epochs, f"{self.stage}.max_steps: {epochs * every} (times iters_per_epoch)")
        elif epochs:
            self.plan.put(f"{self.stage}.epochs", epochs)
            self.note("run.max_epoch", epochs, f"{self.stage}.epochs")
        self.take("run.max_epoch")
        for name, value in TRAINER.items():
            self.plan.put(f"{self.stage}.{name}", value)
            self.note("(not a field)", "", f"{self.stage}.{name}: {value}, as the official trainer", always=True)
        self.plan.put("order", "random")
        faster = "order: random, as the official trainer; --order group is faster"
        self.note("(not a field)", "", faster, always=True)
        answers = {"v2": ("Yes", "No"), "v1": ("former", "latter")}
        answer = self._only("model.ans_type", tuple(answers), "prompt.yes, prompt.no", "")
        for name, word in zip(("yes", "no"), answers[answer], strict=True):
            self.plan.put(f"prompt.{name}", word)
        amp = self._flag("run.amp", True)
        self.take("run.amp")
        self.plan.put("dtype", "auto" if amp else "float32")
        self.note("run.amp", amp, f"dtype: {'auto' if amp else 'float32'}")
        device = self._text("run.device", "cuda", "device: the first GPU, else the CPU, for cuda")
        self.plan.put("device", "auto" if device == "cuda" else device)
        for name, known in (("train", {"train"}), ("valid", {"valid"})):
            splits = self.take(f"run.{name}_splits", [name])
            if set(splits) != known:
                raise ValueError(f"run.{name}_splits: expected ['{name}'], got {splits!r}")
            self.note(f"run.{name}_splits", splits, "the same")
        self.note("run.test_splits", self.take("run.test_splits"), "valid and test, each with its warm and cold rows")

    def _number(self, name: str) -> int | None:
        value = self.left.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        return value

    def _plain(self) -> None:
        for name in list(self.left):
            general = re.sub(r"^datasets\.[^.]+", "datasets.*", name)
            value = self.take(name)
            if general in RENAMED:
                key = RENAMED[general].format(stage=self.stage)
                if value is not None:
                    self.plan.put(key, value)
                self.note(name, value, key)
            else:
                self.note(name, value, f"ignored: {IGNORED.get(general, 'no meaning here')}")
        self.plan.done.sort(key=lambda row: (row[0].startswith("("), row[0]))


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 30 else f"...{text[-27:]}"

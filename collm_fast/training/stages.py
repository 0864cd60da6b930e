"""What a stage trains, and how its model is put together from the language model, the adapter and the mapper.

The steps are `loop.py`'s, the order of the parts `pipeline.py`'s. Floor F3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from collm_fast.config import LoraConfig, MapperConfig, PromptConfig, TrainConfig, from_mapping, to_mapping
from collm_fast.data.dataset import Dataset, Split
from collm_fast.data.prompts import Prompts, PromptTemplate, cached_tokenize, tokenize
from collm_fast.io.atomic import write_atomic
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.collm import CoLLM
from collm_fast.models.llm import answer_ids, cache_folder, fingerprint, load_llm, resolve_device, resolve_dtype
from collm_fast.models.lora import add_lora
from collm_fast.models.mapper import IdStatistics, Mapper, id_statistics
from collm_fast.training.loop import derived_seed
from collm_fast.training.memory import bound_caches

# What a stage trains, by the last words of its parameters' names; everything else is frozen.
TRAINABLE = {"lora": ("lora_A", "lora_B"), "cie": ("mapper",)}


def set_trainable(model: nn.Module, stage: str) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those of the stage; returns these by name.

    Raises: ValueError for a stage without any, such as `lora` on a model without adapters.
    """
    words = set(TRAINABLE[stage])
    chosen = {}
    for name, parameter in model.named_parameters():
        trains = not words.isdisjoint(name.split("."))
        parameter.requires_grad_(trains)
        if trains:
            chosen[name] = parameter
    if not chosen:
        raise ValueError(f"stage {stage}: expected a model with {' or '.join(TRAINABLE[stage])}, got one without")
    return chosen


@dataclass
class Base:
    """A loaded language model with what every stage needs of it."""

    llm: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    templates: dict[str, PromptTemplate]  # "stage1", "stage2"
    answers: dict[str, tuple[int, int]]  # ids of yes and no, by stage

    @classmethod
    def load(cls, config: TrainConfig, dataset: Dataset, prompts: Mapping[str, Sequence[str]] | None = None) -> Base:
        """`prompts` are the texts of each stage as a run recorded them; None reads the configuration's.

        Raises: ValueError for a model, a template or answers that cannot be used.
        """
        templates = {
            name: PromptTemplate.from_texts(prompts[name], stage=stage)
            if prompts is not None
            else PromptTemplate.load(getattr(config.prompt, name), dataset.domain, stage=stage)
            for name, stage in (("stage1", 1), ("stage2", 2))
        }
        bound_caches()
        device = resolve_device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams and events are of the current device
        dtype = resolve_dtype(config.dtype, device)
        trusted, quantize = config.trust_remote_code, config.quantize
        llm, tokenizer = load_llm(config.llm, dtype=dtype, device=device, trust_remote_code=trusted, quantize=quantize)
        answers = {name: _answer_ids(tokenizer, name, template, config.prompt) for name, template in templates.items()}
        return cls(llm, tokenizer, device, dtype, fingerprint(llm, tokenizer), templates, answers)

    def model(
        self,
        stage: str,
        config: TrainConfig,
        cf: CFModel | None = None,
        mapper: Mapper | None = None,
        stats: IdStatistics | None = None,
    ) -> CoLLM:
        """The hybrid model of `stage1` (text only) or `stage2` over this language model; `cf` as `with_biases`."""
        yes, no = self.answers[stage]
        if stage == "stage1":
            cf = mapper = stats = None
        # In stage 1 the language model changes with every step: no prefix keeps its values.
        kept = 0.0 if mapper is None else config.kv_cache_gb
        model = CoLLM(
            self.llm,
            yes_id=yes,
            no_id=no,
            loss=config.loss,
            cf=cf,
            mapper=mapper,
            stats=stats,
            kv_cache_gb=kept,
            kv_cache_on=config.kv_cache_on,
        )
        return model.to(self.device)

    @property
    def hidden_size(self) -> int:
        """The width of the language model's embedding rows."""
        return int(self.llm.get_input_embeddings().weight.shape[1])

    def prompts(
        self, stage: str, split: Split, dataset: Dataset, config: TrainConfig, *, cache: bool = True
    ) -> Prompts:
        """The rows of a split as tokens of the stage's prompt; `cache` keeps them for the next run."""
        inputs = split, self.templates[stage], self.tokenizer, dataset.titles
        length, tokens = config.prompt.history_length, config.mapper.tokens_per_id
        if not cache:
            return tokenize(*inputs, history_length=length, tokens_per_id=tokens)
        folder = cache_folder() / "prompts"
        return cached_tokenize(folder, *inputs, history_length=length, tokens_per_id=tokens)


def _answer_ids(tokenizer: Any, stage: str, template: PromptTemplate, prompt: PromptConfig) -> tuple[int, int]:
    """The ids of yes and no, which every wording must share: a model has one row of the vocabulary for each."""
    found = {answer_ids(tokenizer, end, prompt.yes, prompt.no) for end in template.ends}
    if len(found) != 1:
        raise ValueError(f"prompt.{stage}: expected wordings with the same answer tokens, got {sorted(found)}")
    return found.pop()


def fresh_lora(base: Base, config: LoraConfig, seed: int) -> None:
    """Add LoRA layers, drawn from the seed alone."""
    add_lora(base.llm, config, torch.Generator().manual_seed(derived_seed(seed, "lora", "init")))


def with_biases(cf: CFModel) -> CFModel:
    """The model the mapper reads: biases become columns, [e_u, b_u, 1] and [e_i, 1, b_i]; every score stays as it is.

    Without them the mapper would miss what the model knows best, how much an item is liked and a user likes. A model
    without biases is read as it is, the paper's form.
    """
    if cf.user_bias is None or cf.item_bias is None:
        return cf
    user = torch.cat((cf.user, cf.user_bias[:, None], torch.ones_like(cf.user_bias)[:, None]), dim=1)
    item = torch.cat((cf.item, torch.ones_like(cf.item_bias)[:, None], cf.item_bias[:, None]), dim=1)
    return replace(cf, user=user, item=item, user_bias=None, item_bias=None)


def fresh_mapper(config: MapperConfig, d: int, H: int, stats: IdStatistics | None, seed: int) -> Mapper:
    """A mapper drawn from the seed alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "mapper", config.inputs))
        return Mapper(d, H, config, stats.dim if stats else 0)


def statistics(config: MapperConfig, dataset: Dataset, seen: NDArray[np.bool_]) -> IdStatistics | None:
    """The statistics a `+stats` mapper reads, over the train rows that the collaborative model was fitted to."""
    return id_statistics(dataset, seen) if "+stats" in config.inputs else None


def mapper_file(inputs: str, main: str) -> str:
    """The name of a mapper in its run folder, given what the run's main one reads: an ablation's says what it reads."""
    if inputs == main:
        return "mapper.safetensors"
    return f"mapper{'-embedding' if inputs == 'embedding' else inputs}.safetensors"


def save_mapper(path: Path, mapper: Mapper, made_for: dict[str, str]) -> None:
    """Write a mapper with its form and the fingerprints of the data and the llm it was trained with."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in mapper.state_dict().items()}
    form = {"config": to_mapping(mapper.config), "d": mapper.d, "H": mapper.H, "stats_dim": mapper.stats_dim}
    # One key: safetensors writes several in an order of chance, and equal mappers should be equal files.
    metadata = {"collm_fast": json.dumps({"form": form, "made_for": made_for}, sort_keys=True)}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_mapper(path: Path, used_with: dict[str, str] | None = None) -> Mapper:
    """Read what `save_mapper` wrote; `used_with` are the fingerprints of the data and the llm at hand (None: any).

    Raises: ValueError naming the file, or what the mapper was not trained with.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["collm_fast"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        form, made_for = header["form"], header["made_for"]
        mapper = Mapper(form["d"], form["H"], from_mapping(MapperConfig, form["config"]), form["stats_dim"])
        mapper.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"mapper: expected a mapper of collm_fast in {path}, got {error}") from error
    for name, fingerprint_now in (used_with or {}).items():
        # An imported one does not say what it was trained with.
        if made_for.get(name, fingerprint_now) != fingerprint_now:
            raise ValueError(f"mapper: expected {path} to be trained with this {name}, got another one's")
    return mapper


def prompt_text(tokenizer: Any, prompts: Prompts, row: int) -> str:
    """One prompt as text, its injected rows by their names."""
    names = {1: "⟨user⟩", 2: "⟨item⟩", 3: "⟨target item⟩"}
    part = slice(prompts.offsets[row], prompts.offsets[row + 1])
    text = ""
    run: list[int] = []
    for token, role, place in zip(
        prompts.token_ids[part], prompts.slot_role[part], prompts.slot_part[part], strict=True
    ):
        if role == 0:
            run.append(int(token))
            continue
        text += tokenizer.decode(run) + (names[int(role)] if place == 0 else "")
        run = []
    return text + str(tokenizer.decode(run))

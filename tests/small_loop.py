"""A small stage of training for the tests of the loop: a random language model with LoRA, and stops at will."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from small_llm import ITEMS, USERS, H, random_prompts, small_model

from collm_fast.config import CFConfig, LoraConfig, MapperConfig, StageConfig
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import add_lora
from collm_fast.models.mapper import Mapper
from collm_fast.training.interrupt import Stop
from collm_fast.training.loop import LoopOptions, train_stage
from collm_fast.training.stages import set_trainable

CONFIG = StageConfig(lr=1e-2, batch_size=4, epochs=3, eval_every=4, patience=None, warmup_steps=2)


def lora_model(dropout: float = 0.1, **sizes: int) -> CoLLM:
    llm = small_model("llama", **sizes)
    add_lora(llm, LoraConfig(r=4, dropout=dropout), torch.Generator().manual_seed(1))
    return CoLLM(llm, yes_id=5, no_id=6)


def mapper_model(*, head_dim: int | None = None, **changes: Any) -> CoLLM:
    """Stage 2: a mapper of random weights over random collaborative tables, no LoRA."""
    generator = torch.Generator().manual_seed(2)
    user, item = (torch.randn(rows, 4, generator=generator) for rows in (USERS, ITEMS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        mapper = Mapper(4, H, MapperConfig(hidden_factor=2), 0)
    cf = CFModel("mf", CFConfig(), user, item)
    sizes = {} if head_dim is None else {"head_dim": head_dim}
    return CoLLM(small_model("llama", **sizes), yes_id=5, no_id=6, cf=cf, mapper=mapper, **changes)


def options(folder, **changes) -> LoopOptions:
    base = LoopOptions(name="stage1", folder=folder, seed=3, device=torch.device("cpu"), progress=False)
    return dataclasses.replace(base, **changes)


def run(folder, *, config=CONFIG, stop=None, model=None, valid=None, total=11, **changes):
    model = model or lora_model()
    parameters = set_trainable(model, "lora")
    train = random_prompts(0, groups=8, slots=False)
    valid = valid if valid is not None else random_prompts(1, groups=6, slots=False)
    result = train_stage(model, parameters, train, valid, config, total, options(folder, **changes), stop or Stop())
    return result, {name: value.detach().clone() for name, value in parameters.items()}


class StopAfter(Stop):
    """Asks to stop once the loop has looked `steps` times."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass

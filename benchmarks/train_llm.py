"""The language models of the training benchmark: one set of frozen weights under our layers and under PEFT's.

Here: shapes with random weights, loading, copies that share their weights, adapters and mappers of equal values. Not
here: the ways to compute (`train_peers.py`) and the rows they compute on (`train_rows.py`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from collm_fast.config import LoraConfig, MapperConfig
from collm_fast.models.llm import load_llm
from collm_fast.models.lora import add_lora
from collm_fast.models.mapper import Mapper

LORA = LoraConfig(dropout=0.0)
# The width of the collaborative embeddings: MF's on MovieLens-1M.
D = 256
# Random weights serve for speed; `tiny` is for --quick.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "llama",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-1.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-7b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
}


def random_llm(shape: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A frozen model of one of `SHAPES` with seeded weights."""
    import transformers

    family, sizes = SHAPES[shape]
    config = transformers.AutoConfig.for_model(family, max_position_embeddings=8192, **sizes)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def open_llm(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A shape of `SHAPES`, or whatever `load_llm` opens."""
    return random_llm(name, dtype, device) if name in SHAPES else load_llm(name, dtype=dtype, device=device)[0]


def sharing_copy(model: Any) -> Any:
    """A copy of the modules over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass
class Adapted:
    """A model with its adapters, the mapper (stage 2 alone has one) and the tables it reads.

    `lora` holds A and B of every layer in the model's order.
    """

    llm: Any
    lora: list[nn.Parameter]
    mapper: Mapper | None
    user: Tensor
    item: Tensor
    yes_id: int
    no_id: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the stage trains."""
        return self.lora if self.mapper is None else list(self.mapper.parameters())

    def freeze(self) -> None:
        """Only what the stage trains has a gradient: the LoRA layers, or the mapper above frozen ones."""
        self.llm.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @property
    def tables(self) -> Any:
        return SimpleNamespace(user=self.user, item=self.item)


@dataclass(frozen=True)
class Start:
    """The values every implementation starts from: tables of the collaborative model, a mapper, ids of the answers."""

    user: Tensor
    item: Tensor
    mapper: Mapper
    yes_id: int
    no_id: int


def start(num_users: int, num_items: int, H: int, answers: tuple[int, int], device: torch.device) -> Start:
    """Seeded N(0, 0.1) tables and a fresh mapper."""
    generator = torch.Generator().manual_seed(7)
    user, item = (torch.randn(n, D, generator=generator).mul_(0.1).to(device) for n in (num_users, num_items))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        mapper = Mapper(D, H, MapperConfig()).to(device)
    return Start(user, item, mapper, *answers)


def with_our_layers(base: Any, begin: Start, stage: int) -> Adapted:
    """Our LoRA layers over a sharing copy; B is not zero, or A would have no gradient."""
    llm = sharing_copy(base)
    generator = torch.Generator().manual_seed(9)
    lora: list[nn.Parameter] = []
    for layer in add_lora(llm, LORA, generator):
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator).mul_(0.02))
        lora += [layer.lora_A, layer.lora_B]
    return _adapted(llm, lora, begin, stage)


def with_peft(base: Any, begin: Start, ours: Adapted, stage: int) -> Adapted:
    """PEFT's layers, with its defaults (float32 adapters), over a sharing copy, with the values of ours."""
    import peft

    settings = peft.LoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=list(LORA.target_modules)
    )
    model = peft.get_peft_model(sharing_copy(base), settings).eval()
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    lora = [pair["default"].weight for module in layers for pair in (module.lora_A, module.lora_B)]
    with torch.no_grad():
        for parameter, value in zip(lora, ours.lora, strict=True):
            parameter.copy_(value)
    return _adapted(model, lora, begin, stage)


def _adapted(llm: Any, lora: list[nn.Parameter], begin: Start, stage: int) -> Adapted:
    mapper = copy.deepcopy(begin.mapper) if stage == 2 else None
    found = Adapted(llm, lora, mapper, begin.user, begin.item, begin.yes_id, begin.no_id)
    found.freeze()
    return found

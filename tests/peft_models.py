"""Small PEFT models for the tests of collm_fast.peft: a layer, a language model, and a dropout that draws our masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from small_llm import small_model
from torch import Tensor, nn

from collm_fast import reference
from collm_fast.peft import FastLoraLinear

IDS = torch.arange(32).reshape(2, 16) * 7 % 90


def with_adapters(base: nn.Module, fast: bool, *, autocast_adapter_dtype: bool = True, **options: Any) -> Any:
    """A PEFT model of our layer or of PEFT's; equal arguments give equal parameters, and no lora_B is zero."""
    config = peft.LoraConfig(**options)
    if fast:
        config._register_custom_module({nn.Linear: FastLoraLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return model.train()


def small(fast: bool, dtype: torch.dtype = torch.float32, *, bias: bool = True, **options: Any) -> Any:
    """One linear layer [40, 24] with an adapter; `lora_bias_rule` is PEFT's option `bias`."""
    rule = options.pop("lora_bias_rule", "none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 40, bias=bias)).to(dtype)
    return with_adapters(base, fast, target_modules=["0"], bias=rule, **options)


def llm(fast: bool | None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random Llama of three layers with adapters on q and v; fast=None: without any."""
    base = small_model("llama").to(dtype)
    if fast is None:
        return base
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}
    return with_adapters(base, fast, **{**settings, **options})


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]


class OurMask(nn.Module):
    """Stands where PEFT has its dropout: takes a seed as our layer does, and multiplies by the mask of that seed."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
        mask = reference.dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], self.p)
        return x * mask.reshape(x.shape).to(x)

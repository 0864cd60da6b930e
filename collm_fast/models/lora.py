"""The module that holds LoRA's parameters, and how a language model gets it.

The arithmetic is `collm_fast.ops.lora_linear` and, where layers read the same x, `lora_linear_group`; PEFT folders are
read and written by io/peft.py. Floor F2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collm_fast.config import LoraConfig
from collm_fast.data.transfer import on_device
from collm_fast.ops.lora import lora_linear
from collm_fast.ops.lora_group import project_group

_WORD64 = 0xFFFFFFFFFFFFFFFF


class LoraLinear(nn.Module):
    """A frozen `nn.Linear` and its trainable low-rank update.

        y = base(x) + alpha / r * dropout(x) lora_A^T lora_B^T

    Args:
        base: the layer [N, K]; its parameters are frozen. A subclass of nn.Linear whose forward is its own (a
            quantised one) computes x W^T by that.
        r, alpha, dropout: PEFT's meaning. Dropout acts only in training, and only after `set_step_seed`.
        generator: draws lora_A, as PEFT does (Kaiming uniform with a = sqrt 5); lora_B starts at zero.
    Attributes: lora_A [r, K] and lora_B [N, r], float32 (float64 over a float64 base); seed, int64 [1], not saved.
    Raises: ValueError for a base that is no nn.Linear, or for r or dropout out of range.
    """

    def __init__(
        self, base: nn.Linear, r: int, alpha: float, dropout: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise ValueError(f"LoraLinear: expected base to be an nn.Linear, got {type(base).__name__}")
        LoraConfig(r=r, alpha=alpha, dropout=dropout)  # validates
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.dropout_on = True
        device, dtype = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        # Drawn on the CPU, so that one seed gives one model on every device.
        lora_A = torch.empty(r, base.in_features, dtype=dtype)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=dtype, device=device))
        self.register_buffer("seed", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)
        self.seed: Tensor

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    @property
    def draws(self) -> bool:
        """Whether a forward draws a dropout mask now."""
        return self.training and self.dropout_on and self.dropout > 0.0

    # Code that inspects a projection (transformers does) finds what an nn.Linear has.
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if type(self.base).forward is not nn.Linear.forward:
            y: Tensor = self.base(x)
            return y + self._update(x)
        return lora_linear(
            x,
            self.base.weight,
            self.base.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            dropout_p=self.dropout,
            seed=self.seed,
            training=self.training and self.dropout_on,
        )

    def _update(self, x: Tensor) -> Tensor:
        """scaling * dropout(x) lora_A^T lora_B^T, [..., N], where only the base's own forward can multiply by W."""
        # Over r rows of zeros the op gives dropout(x) lora_A^T alone: one mask for every base, and none that is stored.
        zeros = x.new_zeros(self.r, self.in_features)
        identity = torch.eye(self.r, dtype=self.lora_A.dtype, device=x.device)
        training = self.training and self.dropout_on
        A, B, p, seed = self.lora_A, self.lora_B, self.dropout, self.seed
        s = lora_linear(x, zeros, None, A, identity, 1.0, dropout_p=p, seed=seed, training=training)
        return nn.functional.linear(s, (self.scaling * B).to(s.dtype))

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}"


def project_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], with the same masks; in one step where a LoRA layer is among frozen ones."""
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    if not adapted or not _share_a_step(layers, adapted):
        return [layer(x) for layer in layers]
    bases: list[Any] = [getattr(layer, "base", layer) for layer in layers]
    one, draws = adapted[0], adapted[0].draws
    return project_group(
        x,
        [base.weight for base in bases],
        [base.bias for base in bases],
        [getattr(layer, "lora_A", None) for layer in layers],
        [getattr(layer, "lora_B", None) for layer in layers],
        one.scaling,
        one.dropout if draws else 0.0,
        [getattr(layer, "seed", one.seed) for layer in layers] if draws else [],
        [0] * len(layers),
    )


def _share_a_step(layers: Sequence[nn.Module], adapted: Sequence[LoraLinear]) -> bool:
    """Whether every layer's own forward is what a group computes, under one scaling and one rate of dropout."""
    bases: list[nn.Module] = [layer.base if isinstance(layer, LoraLinear) else layer for layer in layers]
    # Another class may compute something else (a quantised base); a hook wants to be called.
    plain = all(type(base) is nn.Linear and not any(p.requires_grad for p in base.parameters()) for base in bases)
    hooked = any(is_hooked(module) for module in (*layers, *bases))
    return plain and not hooked and len({(layer.scaling, layer.dropout, layer.draws) for layer in adapted}) == 1


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(name, layer) of every LoRA layer, in the model's own order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def add_lora(model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None) -> list[LoraLinear]:
    """Freezes the model and replaces its target layers, in place, by LoRA layers.

    Args:
        model: any module; its targets are `nn.Linear`.
        config: rank, alpha, dropout and targets. A target matches a module of that name or one whose dotted name ends
            in it, as in PEFT.
        generator: draws every lora_A in the model's order; None: torch's global one.
    Returns: the new layers in the model's order.
    Raises: ValueError for a target that nothing matches (the message lists what exists), for one that is no
        nn.Linear, and for a model that has LoRA layers already.
    """
    if next(lora_layers(model), None) is not None:
        raise ValueError("add_lora: expected a model without LoRA layers, got one that has them")
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for target in config.target_modules:
        matches = {name: m for name, m in modules.items() if name == target or name.endswith(f".{target}")}
        if not matches:
            exist = sorted({name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, nn.Linear)})
            raise ValueError(f"add_lora: expected target_modules among {', '.join(exist)}, got {target!r}")
        found |= matches
    for name, module in found.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(f"add_lora: expected every target to be an nn.Linear, got {name}: {type(module).__name__}")
    model.requires_grad_(False)
    layers = []
    for name in modules:
        base = found.get(name)
        if isinstance(base, nn.Linear):
            layer = LoraLinear(base, config.r, config.alpha, config.dropout, generator).train(base.training)
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, layer)
            layers.append(layer)
    return layers


def set_step_seed(model: nn.Module, step_seed: int) -> None:
    """Gives every LoRA layer the dropout seed of one training step.

    A seed depends only on step_seed and the layer's place in the model, and differs between layers. The buffers are
    filled in place, all by one copy: a compiled or captured step sees the new masks without being compiled again.
    """
    seeds = [layer.seed for _, layer in lora_layers(model)]
    if not seeds:
        return
    words = [_splitmix64((step_seed + (place + 1) * 0x9E3779B97F4A7C15) & _WORD64) for place in range(len(seeds))]
    signed = torch.tensor([word - 2**64 if word >= 2**63 else word for word in words])
    torch._foreach_copy_(seeds, on_device(signed, seeds[0].device).split(1))


def set_dropout(model: nn.Module, on: bool) -> None:
    """Turns the dropout of every LoRA layer on (in training) or off."""
    for _, layer in lora_layers(model):
        layer.dropout_on = on


def may_draw(model: nn.Module) -> bool:
    """Whether a LoRA layer of the model draws dropout masks when it trains."""
    return any(layer.dropout_on and layer.dropout > 0.0 for _, layer in lora_layers(model))


def _splitmix64(z: int) -> int:
    # Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014): a bijection of 64 bits.
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD64
    return z ^ z >> 31

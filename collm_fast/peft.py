"""PEFT's LoRA layer computed by `collm_fast.ops.lora_linear`, for new PEFT models and for those that exist already.

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    config._register_custom_module({nn.Linear: collm_fast.peft.FastLoraLinear})
    model = peft.get_peft_model(model, config)

    collm_fast.accelerate_lora(model)       # or: an existing PEFT model, in place

Parameters, names, folders, merging and switching are PEFT's own. The layers of this package's trainer are
models/lora.py. This module imports peft, so nothing imports it before it is asked for. Floor F2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from collm_fast.models.lora import is_hooked
from collm_fast.ops.lora import lora_linear

# torchao, tensor parallelism and sharding put other subclasses of Tensor in a layer.
_DENSE = (nn.Parameter, Tensor)


class FastLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's `lora.Linear` whose forward and backward are `collm_fast.ops.lora_linear`.

        y = x W^T + b + scaling * dropout(x) lora_A^T lora_B^T

    The dropout mask depends on one 64-bit seed that each forward in training takes from torch's default generator of
    x's device, without waiting for it: `torch.manual_seed` repeats a run and activation checkpointing repeats a mask.
    The mask is never stored; kept for backward are x, x lora_A^T [..., r] in float32 and the parameters themselves.
    PEFT's own forward, with PEFT's results, serves what the op does not: merged or disabled adapters, none or several
    at once, `adapter_names`, variants such as DoRA, `lora_bias`, trained base weights, ranks above 256, hooks on the
    parts of a layer. A bias that is trained (PEFT's bias="lora_only" and "all") is added after the op.

    Raises: ValueError for a base whose forward is not that of nn.Linear (a quantised one), or fan_in_fan_out.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        # Hooks may come and go: they are looked at in each call.
        if getattr(type(base_layer), "forward", None) is not nn.Linear.forward:
            got = type(base_layer).__name__
            raise ValueError(f"FastLoraLinear: expected a base layer that computes as nn.Linear does, got {got}")
        if config.fan_in_fan_out:
            raise ValueError("FastLoraLinear: expected fan_in_fan_out=False over an nn.Linear, got True")
        super().__init__(base_layer, adapter_name, config=config, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., K] -> [..., N]."""
        adapter = None if args or kwargs else _adapter_to_compute(self, x)
        if adapter is None:
            # Not super(): a restored layer may still be called through a method that was bound before.
            y: Tensor = Linear.forward(self, x, *args, **kwargs)
            return y
        base, dropout, bias = self.base_layer, adapter.dropout, self.base_layer.bias
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if p > 0.0 else None
        trained_bias = bias is not None and bias.requires_grad
        y = lora_linear(
            x,
            base.weight,
            None if trained_bias else bias,
            adapter.lora_A.weight,
            adapter.lora_B.weight,
            self.scaling[adapter.name],
            dropout_p=p,
            seed=seed,
            training=p > 0.0,
        )
        return y + bias.to(y.dtype) if trained_bias else y


@dataclass(repr=False)
class AcceleratedLora:
    """What `accelerate_lora` did, and the way back; a context manager that goes back at its end.

    Attributes:
        converted: the names of the layers that are computed by this package now.
        left: name: why, of the LoRA layers that stayed as they were.
    """

    converted: list[str]
    left: dict[str, str]
    _layers: list[nn.Module] = field(default_factory=list)

    def restore(self) -> None:
        """Gives the converted layers PEFT's class again; parameters and state stay."""
        for layer in self._layers:
            if type(layer) is FastLoraLinear:
                layer.__class__ = Linear
        self._layers = []

    def __repr__(self) -> str:
        # Each reason once, with its first layer.
        whys = list(self.left.values())
        first = {why: name for name, why in reversed(self.left.items())}
        left = "".join(f"; {whys.count(why)} left ({first[why]}, ...): {why}" for why in dict.fromkeys(whys))
        return f"AcceleratedLora: {len(self.converted)} of {len(self.converted) + len(whys)} layers converted{left}"

    def __enter__(self) -> AcceleratedLora:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def accelerate_lora(model: nn.Module) -> AcceleratedLora:
    """Lets this package compute the LoRA layers of a PEFT model, in place.

    Only the class of a layer changes (`peft.tuners.lora.Linear` to `FastLoraLinear`): parameters stay the same
    objects, so an optimizer made earlier goes on, and names, modes, hooks and adapters stay.

    Args:
        model: a PEFT model, or any module that contains one.
    Returns: the layers that were converted, those that were left and why, and `restore()`.
    Raises: ValueError for a model without PEFT LoRA layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        got = type(model).__name__
        raise ValueError(f"accelerate_lora: expected a model with PEFT LoRA layers, got {got} without any")
    left = {name: why for name, layer in layers.items() if (why := _why_left(layer)) is not None}
    converted = {name: layer for name, layer in layers.items() if name not in left}
    for layer in converted.values():
        layer.__class__ = FastLoraLinear
    return AcceleratedLora(list(converted), left, list(converted.values()))


def _why_left(layer: Any) -> str | None:
    """Why a LoRA layer cannot be converted; None where at least one of its adapters gains."""
    if isinstance(layer, FastLoraLinear):
        return "it is a FastLoraLinear already"
    if type(layer) is not Linear:
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}, not a peft.tuners.lora.layer.Linear"
    if "forward" in layer.__dict__:
        return "its forward is wrapped"
    obstacle = _base_obstacle(layer.base_layer)
    if obstacle is not None:
        return obstacle
    dtype = layer.base_layer.weight.dtype
    obstacles = [_adapter_obstacle(layer, _Adapter.of(layer, name), dtype) for name in layer.lora_A]
    return None if None in obstacles else next(iter(obstacles), "it has no adapter")


class _Adapter(NamedTuple):
    """The parts of one adapter of a layer."""

    name: str
    lora_A: Any
    lora_B: Any
    dropout: Any

    @classmethod
    def of(cls, layer: Linear, name: str) -> _Adapter:
        return cls(name, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])


def _adapter_to_compute(layer: FastLoraLinear, x: Tensor) -> _Adapter | None:
    """The one active adapter, where the op serves it; None: PEFT's forward. Runs at every call."""
    if layer.disable_adapters or layer.merged or x.device.type not in ("cpu", "cuda"):
        return None
    names = layer.lora_A.keys()
    active = [name for name in layer.active_adapters if name in names]
    if len(active) != 1 or _base_obstacle(layer.base_layer) is not None:
        return None
    adapter = _Adapter.of(layer, active[0])
    return adapter if _adapter_obstacle(layer, adapter, _compute_dtype(x)) is None else None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the op computes with x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs kind.forward and nothing else."""
    return type(module).forward is kind.forward and not is_hooked(module)


def _base_obstacle(base: nn.Module) -> str | None:
    if not _is_plain(base, nn.Linear):
        return f"its base layer, a {type(base).__name__}, computes something else than nn.Linear or has hooks"
    weight = base.weight
    if type(weight) not in _DENSE:
        return f"its base weight is a {type(weight).__name__}"
    return "its base weight is trained" if weight.requires_grad else None


def _adapter_obstacle(layer: Linear, adapter: _Adapter, dtype: torch.dtype) -> str | None:
    """Why the op does not compute with this adapter on an input of this dtype."""
    name, lora_A, lora_B, dropout = adapter
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    if not isinstance(layer.scaling[name], float | int):
        return f"adapter {name!r} has a {type(layer.scaling[name]).__name__} for scaling (compiled hot-swapping)"
    if not (_is_plain(lora_A, nn.Linear) and _is_plain(lora_B, nn.Linear)):
        return f"adapter {name!r} computes something else than two nn.Linear or has hooks"
    if lora_A.bias is not None or lora_B.bias is not None:
        return f"adapter {name!r} has a bias of its own (lora_bias)"
    A, B = lora_A.weight, lora_B.weight
    if type(A) not in _DENSE or type(B) not in _DENSE:
        return f"adapter {name!r} is a {type(A).__name__} and a {type(B).__name__}"
    if A.shape[0] > 256:
        return f"adapter {name!r} has rank {A.shape[0]}, above 256"
    if B.dtype != A.dtype or (A.dtype != dtype and (A.dtype != torch.float32 or dtype == torch.float64)):
        return f"adapter {name!r} is in {A.dtype} where x is in {dtype}"
    if _is_plain(dropout, nn.Identity):
        return None
    if not _is_plain(dropout, nn.Dropout):
        return f"adapter {name!r} has a {type(dropout).__name__} for dropout"
    return None if round(dropout.p * 65536) < 65536 else f"adapter {name!r} has dropout {dropout.p}"

"""LoRA adapters as PEFT folders: adapter_model.safetensors and adapter_config.json, readable by stock PEFT.

Knows the file format only; the layers are models/lora.py, recognised by their lora_A and lora_B. Floor F1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from collm_fast.config import LoraConfig, from_mapping
from collm_fast.io.atomic import write_atomic

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What PEFT puts before a module's name in a causal language model.
_PREFIX = "base_model.model."
# Settings of PEFT that change what an adapter computes, with the only value served here.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def _adapter_tensors(model: nn.Module, op: str) -> dict[str, nn.Parameter]:
    """The file's key of every LoRA parameter of the model."""
    tensors = {}
    for name, module in model.named_modules():
        for part in ("lora_A", "lora_B"):
            parameter = getattr(module, part, None)
            if isinstance(parameter, nn.Parameter):
                tensors[f"{_PREFIX}{name}.{part}.weight"] = parameter
    if not tensors:
        raise ValueError(f"{op}: expected a model with LoRA layers (add_lora), got {type(model).__name__} without any")
    return tensors


def save_adapter(model: nn.Module, folder: str | Path, base_name: str, config: LoraConfig) -> Path:
    """Writes the model's LoRA layers as a PEFT adapter folder.

    `peft.PeftModel.from_pretrained(base, folder)` computes the same function.

    Args:
        model: the language model itself, after `add_lora`.
        folder: created when missing; each file is replaced atomically, the weights first.
        base_name: the base model's folder or name, recorded for whoever loads the adapter.
        config: the configuration given to `add_lora`.
    Returns: the folder.
    Raises: ValueError for a model without LoRA layers.
    """
    tensors = {key: p.detach().cpu().contiguous() for key, p in _adapter_tensors(model, "save_adapter").items()}
    return write_adapter(tensors, folder, base_name, config)


def write_adapter(tensors: dict[str, Tensor], folder: str | Path, base_name: str, config: LoraConfig) -> Path:
    """Writes LoRA matrices, by PEFT's keys, as `save_adapter` does those of a model; returns the folder."""
    folder = Path(folder)
    # PEFT writes an integral alpha as an integer.
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    settings = _PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.target_modules),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return folder


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The LoraConfig of a PEFT adapter folder, for `add_lora`.

    rsLoRA's alpha / sqrt(r) comes back as the alpha that gives the same scaling as alpha / r.
    Raises: ValueError for a file that is missing or no JSON object, or for a setting that our layers do not compute
        (DoRA, per-module ranks, trained biases).
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"read_adapter_config: expected a PEFT adapter folder with {CONFIG}, got {folder}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"read_adapter_config: expected JSON in {path}, got {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"read_adapter_config: expected a JSON object in {path}, got {type(settings).__name__}")
    for name, value in _PLAIN.items():
        got = settings.get(name, value)
        if name != "use_rslora" and got != value and (got or value):
            raise ValueError(f"read_adapter_config: expected {name}={value!r} in {path}, got {got!r}")
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"read_adapter_config: expected target_modules to be a list in {path}, got {targets!r}")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float):
            raise ValueError(f"read_adapter_config: expected a number {name} in {path}, got {settings.get(name)!r}")
    # A rank below 1 is named by LoraConfig.
    stretch = math.sqrt(max(settings["r"], 1)) if settings.get("use_rslora") else 1
    values = {
        "r": settings["r"],
        "alpha": settings["lora_alpha"] * stretch,
        "dropout": settings.get("lora_dropout") or 0.0,
        "target_modules": targets,
    }
    return from_mapping(LoraConfig, values, f"{path}: ")


def load_adapter(model: nn.Module, folder: str | Path) -> LoraConfig:
    """Copies a PEFT adapter folder into the model's LoRA layers.

    Args:
        model: the language model itself, after `add_lora` with the folder's configuration (`read_adapter_config`).
        folder: written by `save_adapter` or by PEFT.
    Returns: the folder's configuration.
    Raises: ValueError, before anything is copied, for missing or unexpected keys, shapes or a scaling that differ, or
        values that are not finite.
    """
    config, path = read_adapter_config(folder), Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"load_adapter: expected a PEFT adapter folder with {WEIGHTS}, got {folder}")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_adapter: expected a safetensors file, got {path}: {error}") from error
    wanted = _adapter_tensors(model, "load_adapter")
    _check_keys(path, wanted, stored)
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(getattr(module, "lora_A", None), nn.Parameter) and scaling != config.alpha / config.r:
            rule = f"scaling {scaling} of {name}"
            raise ValueError(f"load_adapter: expected {rule} in {path.parent}, got {config.alpha / config.r}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(stored[key])
    return config


def _check_keys(path: Path, wanted: dict[str, nn.Parameter], stored: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    what = [
        f"{len(keys)} {kind} ({keys[0]})" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    ]
    if what:
        raise ValueError(f"load_adapter: expected the model's {len(wanted)} keys in {path}, got {' and '.join(what)}")
    for key, parameter in wanted.items():
        if stored[key].shape != parameter.shape:
            rule = f"{key} of shape {list(parameter.shape)}"
            raise ValueError(f"load_adapter: expected {rule} in {path}, got {list(stored[key].shape)}")
        if not bool(torch.isfinite(stored[key]).all()):
            raise ValueError(f"load_adapter: expected finite values of {key} in {path}, got others")

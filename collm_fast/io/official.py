"""Checkpoints of the official CoLLM code: their tensors, by the names they have here.

Read with weights_only: a file that could run code is refused. Where the tensors go is official/imports.py. Floor F1.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]
# The key of a LoRA matrix, under the wrapper of the official model or as PEFT has it; newer PEFT adds its name.
_LORA = re.compile(r"(?:llama_model_lora\.)?(base_model\.model\..+)\.(lora_[AB])(?:\.default)?\.weight")
_MAPPER = {
    f"llama_proj.{place}.{part}": f"{name}.{part}"
    for place, name in ((0, "first"), (2, "second"))
    for part in ("weight", "bias")
}
# The two tables of each collaborative model; within a checkpoint of the whole they lie under `rec_encoder.`.
_TABLES = {
    "mf": ("user_embedding.weight", "item_embedding.weight"),
    "lightgcn": ("embedding_user.weight", "embedding_item.weight"),
}


def read_official(path: Path) -> State:
    """The tensors of an official checkpoint (`{"model": ...}`) or of a plain state dict, by their keys.

    Raises: ValueError for a file that is missing, is no such file, or needs more than weights_only reads.
    """
    if not path.is_file():
        raise ValueError(f"ckpt: expected a .pth file of the official code, got {path}, which is no file")
    try:
        # Mapped: a checkpoint holds the whole language model, of which nothing is read.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        more = f"{name[1]}, which could run code" if name else "no such file"
        raise ValueError(f"ckpt: expected tensors that torch reads with weights_only in {path}, got {more}") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"ckpt: expected a file that torch.save wrote, got {path}: {reason[0]}") from error
    state = found["model"] if isinstance(found, dict) and isinstance(found.get("model"), dict) else found
    if not isinstance(state, dict):
        raise ValueError(f"ckpt: expected a state dict in {path}, got {type(state).__name__}")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"ckpt: expected tensors in {path}, got none under {len(state)} keys")
    return tensors


def lora_of(state: State) -> tuple[State, set[str]]:
    """(LoRA matrices in float32 by PEFT's keys, the keys they had), both empty where there are none.

    Raises: ValueError for a matrix without its other half, ranks that differ, or values that are not finite.
    """
    found: State = {}
    used = set()
    for key, value in state.items():
        match = _LORA.fullmatch(key)
        if match:
            used.add(key)
            found[f"{match[1]}.{match[2]}.weight"] = _finite(key, value)
    ranks = set()
    for key, value in found.items():
        other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
        if other not in found:
            raise ValueError(f"ckpt: expected {other} beside {key}, got none")
        _require_matrix(key, value)
        ranks.add(value.shape[0 if "lora_A" in key else 1])
    if len(ranks) > 1:
        raise ValueError(f"ckpt: expected LoRA matrices of one rank, got {sorted(ranks)}")
    return found, used


def mapper_of(state: State) -> tuple[State, set[str]]:
    """(the mapper's parameters in float32 by our names, the keys they had), both empty where there are none.

    Raises: ValueError for parts that are missing or do not fit one another, or a `llama_proj` of another kind.
    """
    keys = {key for key in state if key.startswith("llama_proj.")}
    if not keys:
        return {}, set()
    if keys != _MAPPER.keys():
        raise ValueError(f"ckpt: expected llama_proj of {', '.join(_MAPPER)}, got {', '.join(sorted(keys))}")
    found = {name: _finite(key, state[key]) for key, name in _MAPPER.items()}
    for name in ("first", "second"):
        weight, bias = found[f"{name}.weight"], found[f"{name}.bias"]
        _require_matrix(f"{name}.weight", weight)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"ckpt: expected {name}.bias of [{weight.shape[0]}], got {list(bias.shape)}")
    (hidden, d), outer = found["first.weight"].shape, found["second.weight"].shape[1]
    if outer != hidden or hidden % d:
        got = f"{list(found['first.weight'].shape)} and {list(found['second.weight'].shape)}"
        raise ValueError(f"ckpt: expected llama_proj of [k d, d] and [H, k d], got {got}")
    return found, keys


def tables_of(state: State, kind: str) -> tuple[tuple[Tensor, Tensor] | None, set[str]]:
    """((user [U, D], item [I, D]) in float32, the keys they had) of "mf" or "lightgcn"; (None, empty) without them.

    LightGCN's are those before propagation. Raises: ValueError for one table without the other, or of another width.
    """
    for prefix in ("", "rec_encoder."):
        keys = [prefix + name for name in _TABLES[kind]]
        present = [key for key in keys if key in state]
        if len(present) == 1:
            raise ValueError(f"ckpt: expected {' and '.join(keys)}, got {present[0]} alone")
        if present:
            user, item = (_finite(key, state[key]) for key in keys)
            for key, table in zip(keys, (user, item), strict=True):
                _require_matrix(key, table)
            if user.shape[1] != item.shape[1]:
                got = f"{list(user.shape)} and {list(item.shape)}"
                raise ValueError(f"ckpt: expected tables of one width, got {got}")
            return (user, item), set(keys)
    return None, set()


def summary_of(keys: Iterable[str], limit: int = 6) -> str:
    """Keys in one line: the first ones by name, the others counted."""
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _finite(key: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise ValueError(f"ckpt: expected finite numbers in {key}, got {value.dtype} with others")
    return value.to(torch.float32).contiguous()


def _require_matrix(key: str, value: Tensor) -> None:
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"ckpt: expected a matrix in {key}, got {list(value.shape)}")

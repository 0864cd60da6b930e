"""`collm-fast import-official`: a checkpoint of the official code as the folders and files that a run has. Floor F4.

What the file holds is read by io/official.py; launch.py calls the parts for a whole configuration.
"""

from __future__ import annotations

from pathlib import Path

import torch

from collm_fast.config import CFConfig, CFName, LoraConfig, MapperConfig
from collm_fast.data.dataset import Dataset, load_dataset
from collm_fast.graph import BipartiteGraph
from collm_fast.io.official import State, lora_of, mapper_of, read_official, summary_of, tables_of
from collm_fast.io.peft import write_adapter
from collm_fast.models.cf.frozen import FILE, CFModel
from collm_fast.models.cf.lightgcn import LightGCN
from collm_fast.models.mapper import Mapper
from collm_fast.official.config import ImportConfig
from collm_fast.training.cf import MODELS, freeze
from collm_fast.training.stages import save_mapper
from collm_fast.training.start import ADAPTER, MAPPER


def import_official(config: ImportConfig) -> tuple[Path, set[str]]:
    """Write `kind` of an official checkpoint into the folder `out`; (what was written, the keys that were not used).

    lora becomes adapter/ (PEFT's format), mapper mapper.safetensors, mf and lightgcn cf.safetensors.

    Raises: ValueError, with nothing written, for a file that cannot be read with weights_only, has not what is wanted,
        or does not fit the dataset; for a kind of a later version; for an `out` that already holds it.
    """
    kind = config.kind
    if config.ckpt is None or config.out is None:
        raise ValueError("import-official: expected --ckpt FILE.pth, --kind and --out FOLDER, got none")
    if kind not in ("lora", "mapper", *MODELS):
        known = f"lora, mapper, {' or '.join(MODELS)}"
        raise ValueError(f"kind: expected {known}, got {kind!r}, which a later version brings")
    target = config.out / {"lora": ADAPTER, "mapper": MAPPER}.get(kind, FILE)
    if target.exists():
        raise ValueError(f"out: expected a folder without {target.name}, got {config.out}")
    if kind in MODELS and config.data is None:
        raise ValueError(f"data: expected --data DATA (the dataset whose ids the tables have) for {kind}, got none")
    state = read_official(config.ckpt)
    if kind == "lora":
        settings = LoraConfig(alpha=config.alpha, dropout=config.dropout)
        used = take_lora(state, config.out, config.llm, settings)
    elif kind == "mapper":
        used = take_mapper(state, config.out, config.tokens_per_id)
    else:
        assert config.data is not None and (kind == "mf" or kind == "lightgcn")
        used = take_cf(state, kind, load_dataset(config.data), config.num_layers, config.out)
    if not used:
        names = {"lora": "llama_model_lora.*.lora_A", "mapper": "llama_proj.*"}.get(kind, f"the tables of {kind}")
        raise ValueError(f"ckpt: expected {names} in {config.ckpt}, got {summary_of(state)}")
    return target, state.keys() - used


def take_lora(state: State, out: Path, base_name: str, config: LoraConfig) -> set[str]:
    """Write the LoRA matrices as out/adapter; returns their keys, an empty set where there are none.

    Rank and target modules are the checkpoint's; alpha and dropout, which it does not hold, are `config`'s.
    """
    tensors, used = lora_of(state)
    if tensors:
        rank = next(value.shape[0] for key, value in tensors.items() if ".lora_A." in key)
        targets = tuple(sorted({key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors}))
        found = LoraConfig(r=int(rank), alpha=config.alpha, dropout=config.dropout, target_modules=targets)
        write_adapter(tensors, out / ADAPTER, base_name, found)
    return used


def take_mapper(state: State, out: Path, tokens_per_id: int) -> set[str]:
    """Write llama_proj as out/mapper.safetensors; returns its keys, an empty set where there is none.

    Raises: ValueError for an output that `tokens_per_id` does not divide.
    """
    tensors, used = mapper_of(state)
    if tensors:
        hidden, d = tensors["first.weight"].shape
        rows = tensors["second.weight"].shape[0]
        if tokens_per_id < 1 or rows % tokens_per_id:
            raise ValueError(f"tokens_per_id: expected a divisor of the mapper's {rows} outputs, got {tokens_per_id}")
        form = MapperConfig(hidden_factor=hidden // d, tokens_per_id=tokens_per_id)
        mapper = Mapper(d, rows // tokens_per_id, form)
        mapper.load_state_dict(tensors)
        # The file does not say which data and which language model it was trained with.
        save_mapper(out / MAPPER, mapper, {})
    return used


def take_cf(state: State, kind: CFName, dataset: Dataset, num_layers: int, out: Path) -> set[str]:
    """Write the tables as out/cf.safetensors, LightGCN's propagated over the liked train rows; returns their keys.

    Raises: ValueError for tables of other sizes than the dataset's.
    """
    tables, used = tables_of(state, kind)
    if tables is None:
        return used
    user, item = tables
    got, wanted = (len(user), len(item)), (dataset.num_users, dataset.num_items)
    if got != wanted:
        rule = f"{wanted[0]} users and {wanted[1]} items, as {dataset.path} has (padding included)"
        raise ValueError(f"ckpt: expected tables of {rule}, got {got[0]} and {got[1]}")
    # N(0, 1), as the official code began; nothing reads it of a fitted model.
    config = CFConfig(model=kind, dim=int(user.shape[1]), num_layers=num_layers, init="official")
    if kind == "lightgcn":
        train = dataset.splits["train"]
        liked = train.label == 1
        graph = BipartiteGraph.from_interactions(train.uid[liked], train.iid[liked], *wanted)
        model = LightGCN(*wanted, config, graph)
        with torch.no_grad():
            model.embedding.copy_(torch.cat((user, item)))
        fitted = freeze(model, config, dataset.fingerprint)
    else:
        fitted = CFModel(kind, config, user, item, fingerprint=dataset.fingerprint)
    fitted.save(out)
    return used

"""Files as the official CoLLM code has them, small and made here: splits, configurations, prompts, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

USERS, ITEMS = 12, 10
# Fields as the published files have them: exponents without a dot are text in YAML.
MODEL: dict[str, Any] = {
    "arch": "mini_gpt4rec_v2",
    "model_type": "pretrain_vicuna",
    "freeze_rec": True,
    "freeze_proj": False,
    "freeze_lora": True,
    "max_txt_len": 1024,
    "proj_token_num": 1,
    "proj_drop": 0,
    "proj_mid_times": 10,
    "end_sym": "###",
    "prompt_template": "{}",
    "llama_model": "/home/someone/vicuna",
    "user_num": -100,
    "item_num": -100,
    "ans_type": "v2",
    "rec_model": "MF",
    "lora_config": {"use_lora": True, "r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"], "dropout": 0.05},
    "rec_config": {"user_num": -100, "item_num": -100, "embedding_size": 4, "pretrained_path": "not_have"},
}
RUN: dict[str, Any] = {
    "task": "rec_pretrain",
    "lr_sched": "linear_warmup_cosine_lr",
    "init_lr": "1e-3",
    "min_lr": "8e-5",
    "warmup_lr": "1e-5",
    "mode": "v2",
    "weight_decay": "1e-3",
    "max_epoch": 2,
    "iters_per_epoch": 2,
    "batch_size_train": 4,
    "batch_size_eval": 64,
    "num_workers": 4,
    "warmup_steps": 200,
    "seed": 42,
    "output_dir": "/home/someone/log",
    "amp": True,
    "resume_ckpt_path": None,
    "evaluate": False,
    "train_splits": ["train"],
    "valid_splits": ["valid"],
    "test_splits": ["test", "valid"],
    "device": "cuda",
    "world_size": 1,
    "dist_url": "env://",
    "distributed": True,
}
# A line each, all equal, the backslash and n as two characters, no newline at the end.
TEXT_PROMPT = "\n".join(["#Question: Liked: <ItemTitleList>. Would <TargetItemTitle> be? \\n#Answer:"] * 2)
ID_PROMPT = "\n".join(
    ["#Question: Liked: <ItemTitleList>, user <UserID>. <TargetItemTitle> with <TargetItemID>? \\n#Answer:"] * 2
)


def write_yaml(path: Path, storage: Path | str, model: Any = None, run: Any = None, data: str = "movie_ood") -> Path:
    """A configuration with changes in its sections `model` and `run`; a nested mapping is merged."""
    sections: dict[str, Any] = {
        "model": {**MODEL, "lora_config": {**MODEL["lora_config"]}, "rec_config": {**MODEL["rec_config"]}},
        "datasets": {data: {"path": str(storage), "data_type": "default", "build_info": {"storage": str(storage)}}},
        "run": dict(RUN),
    }
    for section, changes in (("model", model or {}), ("run", run or {})):
        for key, value in changes.items():
            own = sections[section].get(key)
            sections[section][key] = {**own, **value} if isinstance(own, dict) else value
    path.write_text(yaml.safe_dump(sections))
    return path


def write_published(folder: Path, seed: int = 0) -> Path:
    """train, valid and test as Parquet: running histories of liked items that begin with the padding [0], ['']."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    liked: dict[int, list[int]] = {user: [0] for user in range(1, USERS + 1)}
    for name, rows_each in (("train", 6), ("valid", 3), ("test", 3)):
        columns: dict[str, list[Any]] = {
            key: [] for key in ("uid", "iid", "label", "timestamp", "his", "his_title", "title", "not_cold")
        }
        for user in liked:
            for _ in range(rows_each):
                item, label = int(rng.integers(1, ITEMS + 1)), int(rng.integers(2))
                titles = ["" if each == 0 else f"Film {each} (1999)" for each in liked[user]]
                time, title = 1000 + len(columns["uid"]), f"Film {item} (1999)"
                row = (user, item, label, time, list(liked[user]), titles, title, 1)
                for key, value in zip(columns, row, strict=True):
                    columns[key].append(value)
                liked[user] += [item] * label
        # The largest ids occur, so that every seed has the same tables.
        columns["iid"][0], columns["title"][0], columns["label"][:2] = ITEMS, f"Film {ITEMS} (1999)", [1, 0]
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def lora_state(hidden: int, rank: int = 2, layers: int = 3, kv: int = 16, name: str = ".default") -> dict[str, Any]:
    """LoRA matrices of q_proj and v_proj under the official wrapper, with the frozen weights that lie beside them."""
    state = {}
    for layer in range(layers):
        for module, out in (("q_proj", hidden), ("v_proj", kv)):
            key = f"llama_model_lora.base_model.model.model.layers.{layer}.self_attn.{module}"
            state[f"{key}.lora_A{name}.weight"] = torch.randn(rank, hidden).half() * 0.1
            state[f"{key}.lora_B{name}.weight"] = torch.randn(out, rank).half() * 0.1
            state[f"{key}.weight"] = torch.zeros(out, hidden).half()
    return state


def mapper_state(d: int, hidden: int, times: int = 10, tokens: int = 1) -> dict[str, Any]:
    """llama_proj: Linear(d, times d), ReLU, Linear(times d, tokens hidden)."""
    return {
        "llama_proj.0.weight": torch.randn(times * d, d),
        "llama_proj.0.bias": torch.randn(times * d),
        "llama_proj.2.weight": torch.randn(tokens * hidden, times * d) * 0.1,
        "llama_proj.2.bias": torch.randn(tokens * hidden),
    }


def cf_state(kind: str, d: int = 4, prefix: str = "") -> dict[str, Any]:
    """The tables of MF or LightGCN, padding included."""
    names = {"mf": ("user_embedding", "item_embedding"), "lightgcn": ("embedding_user", "embedding_item")}[kind]
    return {
        f"{prefix}{name}.weight": torch.randn(size + 1, d) for name, size in zip(names, (USERS, ITEMS), strict=True)
    }


def save_checkpoint(path: Path, state: dict[str, Any]) -> Path:
    """As the official runner saves one: the model beside its optimizer, configuration and epoch."""
    beside = {"optimizer": {"state": {}, "param_groups": []}, "config": {"run": {}}, "scaler": None, "epoch": 3}
    torch.save({"model": state, **beside}, path)
    return path

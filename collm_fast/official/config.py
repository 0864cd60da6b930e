"""What `collm-fast import-official` is asked; what it does is imports.py. Floor F4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ImportConfig:
    """`collm-fast import-official`; what a checkpoint does not tell is asked for, with the paper's values."""

    ckpt: Path | None = None
    kind: Literal["lora", "mapper", "mf", "lightgcn", "sasrec", "din"] = "lora"
    out: Path | None = None
    data: Path | None = None  # mf and lightgcn: the dataset whose ids their tables have
    llm: str = ""  # lora: the base model's name, for who loads the adapter
    alpha: float = 16.0
    dropout: float = 0.05
    tokens_per_id: int = 1
    num_layers: int = 2  # lightgcn

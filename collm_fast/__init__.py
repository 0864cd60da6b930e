"""CoLLM for everyone who has a recommender and a language model: fused ops, a trainer, a command line.

`collm_fast.ops` and `collm_fast.BipartiteGraph` come with the import; whatever needs transformers, pyarrow or
matplotlib is loaded when it is first asked for, so that the import stays quick and never touches a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from collm_fast import graph, metrics, ops, ranking, reference
from collm_fast.graph import BipartiteGraph

if TYPE_CHECKING:
    from collm_fast import peft
    from collm_fast.distributed import ShardedGraph, sharded_propagate, sharded_rows
    from collm_fast.environment import env
    from collm_fast.peft import AcceleratedLora, accelerate_lora
    from collm_fast.run import Run, open_run, train
    from collm_fast.training.bpr import fit_lightgcn

# Name: the module that has it. These import more than torch.
_LAZY = {
    "AcceleratedLora": "collm_fast.peft",
    "accelerate_lora": "collm_fast.peft",
    "peft": "collm_fast.peft",
    "env": "collm_fast.environment",
    "Run": "collm_fast.run",
    "open_run": "collm_fast.run",
    "train": "collm_fast.run",
    "fit_lightgcn": "collm_fast.training.bpr",
    "ShardedGraph": "collm_fast.distributed",
    "sharded_propagate": "collm_fast.distributed",
    "sharded_rows": "collm_fast.distributed",
}

__all__ = [
    "AcceleratedLora",
    "BipartiteGraph",
    "Run",
    "ShardedGraph",
    "__version__",
    "accelerate_lora",
    "env",
    "fit_lightgcn",
    "graph",
    "metrics",
    "open_run",
    "ops",
    "peft",
    "ranking",
    "reference",
    "sharded_propagate",
    "sharded_rows",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(_LAZY[name])
        return module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

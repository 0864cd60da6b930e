"""LightGCN: matrix factorisation over embeddings averaged over the layers of the interaction graph.

The product with the graph is `collm_fast.ops.lightgcn_propagate`. Training is training/cf.py. Floor F2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from collm_fast.config import CFConfig
from collm_fast.graph import BipartiteGraph
from collm_fast.models.cf.mf import MF
from collm_fast.ops import lightgcn_propagate

# What CFConfig's None means here: CoLLM's choice for MovieLens-1M (arXiv 2310.19488, section 5.1).
RECIPE: dict[str, Any] = {"dim": 64, "lr": 1e-2, "weight_decay": 1e-4}
# Published and without trouble: both values of `init` mean it.
INIT_STD = 0.1


class LightGCN(MF):
    """Logits of (user, item) pairs from propagated embeddings.

        E = 1/(K+1) sum_{k=0..K} (D^-1/2 A D^-1/2)^k E_0,   score(u, i) = <E_u, E_i> [+ b_u + b_i + offset]

    Args:
        num_users, num_items: table sizes; id 0 is padding.
        config: dim, num_layers and bias are read; dim None means 64.
        graph: the liked train interactions.
    Raises: ValueError without a graph, or with one of other sizes.
    Source: He et al., LightGCN (SIGIR 2020), equations 3 to 8.
    """

    def __init__(self, num_users: int, num_items: int, config: CFConfig, graph: BipartiteGraph | None = None) -> None:
        if graph is None:
            raise ValueError("LightGCN: expected the graph of the liked interactions, got None")
        if (graph.num_users, graph.num_items) != (num_users, num_items):
            sizes = f"{graph.num_users} and {graph.num_items}"
            raise ValueError(f"LightGCN: expected a graph of {num_users} users and {num_items} items, got {sizes}")
        super().__init__(num_users, num_items, config)
        self.graph, self.num_layers = graph, config.num_layers

    @staticmethod
    def recipe() -> dict[str, Any]:
        """dim, lr and weight_decay where the configuration says None."""
        return RECIPE

    @staticmethod
    def init_std(config: CFConfig) -> float:
        """Standard deviation of the initial embeddings."""
        return INIT_STD

    def nodes(self, rows: Tensor | None = None) -> Tensor:
        """[U + I, D], or [R, D] of the nodes `rows` [R] alone: the propagated embeddings, users before items."""
        return lightgcn_propagate(self.embedding, self.graph, self.num_layers, rows=rows)

"""Matrix factorisation: one embedding a user and an item, scored by their product.

LightGCN (lightgcn.py) is this model over propagated embeddings. Training is training/cf.py. Floor F2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collm_fast.config import CFConfig
from collm_fast.data.sampler import Batch
from collm_fast.graph import BipartiteGraph

# What CFConfig's None means here: CoLLM's choice for MovieLens-1M (arXiv 2310.19488, section 5.1).
RECIPE: dict[str, Any] = {"dim": 256, "lr": 1e-3, "weight_decay": 1e-4}
# Standard deviations of the initial embeddings. N(0, 1) gives logits of the size sqrt(dim): it takes hundreds of
# epochs of weight decay to unlearn them, and some seeds look worse on validation for longer than the patience.
INIT_STD = {"scaled": 0.003, "official": 1.0}


def pair_scores(nodes: Tensor, slots: Tensor) -> Tensor:
    """[C - 1, b]: the products of column 0 of `slots` [C, b] with each other column; `slots` are rows of `nodes`."""
    column = F.embedding(slots, nodes)
    return (column[:1] * column[1:]).sum(-1)


class MF(nn.Module):
    """Logits of (user, item) pairs from a product of embeddings.

        score(u, i) = <e_u, e_i> [+ b_u + b_i + offset]

    Args:
        num_users, num_items: table sizes; id 0 is padding.
        config: dim, init and bias are read; dim None means 256.
        graph: unused here; LightGCN's interactions.
    Source: Koren, Bell and Volinsky, Matrix factorization techniques for recommender systems (Computer 42, 2009).
    """

    def __init__(self, num_users: int, num_items: int, config: CFConfig, graph: BipartiteGraph | None = None) -> None:
        super().__init__()
        self.num_users, self.num_items = num_users, num_items
        dim = config.dim or self.recipe()["dim"]
        # One table, users before items: the nodes of the graph, and one tensor for the optimizer.
        self.embedding = nn.Parameter(torch.empty(num_users + num_items, dim))
        self.bias = nn.Parameter(torch.zeros(num_users + num_items)) if config.bias else None
        self.offset = nn.Parameter(torch.zeros(())) if config.bias else None
        self.std = self.init_std(config)

    @staticmethod
    def recipe() -> dict[str, Any]:
        """dim, lr and weight_decay where the configuration says None."""
        return RECIPE

    @staticmethod
    def init_std(config: CFConfig) -> float:
        """Standard deviation of the initial embeddings."""
        return INIT_STD[config.init]

    @torch.no_grad()
    def reset(self, generator: torch.Generator, seen_users: Tensor, seen_items: Tensor) -> None:
        """Draw the embeddings N(0, std^2); ids that no training row mentions get zero.

        Weight decay drives such rows to zero anyway, on its way through values that mean nothing; zero rows stay
        zero, so a cold pair scores its biases alone, for every seed.

        Args: seen_users [num_users] bool, seen_items [num_items] bool.
        """
        self.embedding.normal_(0.0, self.std, generator=generator)
        self.embedding[~torch.cat((seen_users, seen_items))] = 0.0

    def nodes(self, rows: Tensor | None = None) -> Tensor:
        """[U + I, D], or [R, D] of the nodes `rows` [R] alone: what is scored, users before items."""
        return self.embedding if rows is None else F.embedding(rows, self.embedding)

    def score(self, uid: Tensor, iid: Tensor) -> Tensor:
        """Logits [n] of int64 ids [n]; differentiable."""
        return self.score_nodes(self.nodes(), uid, iid)

    def score_nodes(self, nodes: Tensor, uid: Tensor, iid: Tensor) -> Tensor:
        """`score` where `nodes()` is at hand already."""
        slots = torch.stack((uid, iid + self.num_users))
        return self._with_bias(pair_scores(nodes, slots), self.bias, slots)[0]

    def score_batch(self, batch: Batch) -> Tensor:
        """Logits [C - 1, b] of column 0's users with the items of each other column; reads the batch's rows only."""
        bias = None if self.bias is None else F.embedding(batch.rows, self.bias[:, None])[:, 0]
        return self._with_bias(pair_scores(self.nodes(batch.rows), batch.slots), bias, batch.slots)

    def _with_bias(self, logit: Tensor, bias: Tensor | None, slots: Tensor) -> Tensor:
        if bias is None or self.offset is None:
            return logit
        column = F.embedding(slots, bias[:, None])[..., 0]
        return logit + (column[:1] + column[1:]) + self.offset

    @torch.no_grad()
    def tables(self) -> tuple[Tensor, Tensor]:
        """(user [U, D], item [I, D]) float32, detached copies of what is scored."""
        nodes = self.nodes()
        return nodes[: self.num_users].clone(), nodes[self.num_users :].clone()

    @torch.no_grad()
    def biases(self) -> tuple[Tensor | None, Tensor | None, float]:
        """(user [U] or None, item [I] or None, offset), detached copies."""
        if self.bias is None or self.offset is None:
            return None, None, 0.0
        return self.bias[: self.num_users].clone(), self.bias[self.num_users :].clone(), float(self.offset)

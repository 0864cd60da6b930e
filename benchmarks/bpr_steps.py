"""One training step of LightGCN by BPR, in our way and in that of the authors' PyTorch code.

A step is forward, backward and Adam on a batch that was drawn before the clock runs; it returns the loss and the
gradients of the user and of the item table. Not here: drawing the batches (`lightgcn_gowalla.py` times whole epochs,
the drawing included) and the cases (`bench_propagate.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

from collm_fast import BipartiteGraph
from collm_fast.config import BPRConfig
from collm_fast.data.sampler import Batch, batches_of, sample_triples
from collm_fast.training.bpr import backward_from, bpr_backward

# The embedding of all nodes from that of layer 0.
Propagate = Callable[[Tensor], Tensor]


def draw(graph: BipartiteGraph, config: BPRConfig, device: torch.device) -> tuple[Batch, Tensor]:
    """A batch as ours reads it, and the same samples as nodes [3, b]: user, positive, negative."""
    nodes = torch.from_numpy(sample_triples(graph, config.batch_size, seed=config.seed))
    nodes[1:] += graph.num_users
    (batch,) = batches_of(nodes, graph.num_nodes, config.batch_size, device)
    return batch, nodes.to(device)


def ours(x: Tensor, graph: BipartiteGraph, batch: Batch, config: BPRConfig) -> harness.Impl:
    """What `fit_lightgcn` does for a batch."""
    table = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=config.lr, fused=True)

    def step() -> list[Tensor]:
        loss = bpr_backward(table, graph, batch, config)
        optimizer.step()
        assert table.grad is not None
        return [loss, *table.grad.split([graph.num_users, graph.num_items])]

    return step


def untrimmed_backward(table: Tensor, batch: Batch, config: BPRConfig, propagate: Propagate) -> Tensor:
    """`bpr_backward` by a product that computes every row of every layer."""
    table.grad = None
    return backward_from(propagate(table).index_select(0, batch.rows), table, batch, config)


def untrimmed(x: Tensor, graph: BipartiteGraph, batch: Batch, config: BPRConfig, propagate: Propagate) -> harness.Impl:
    """The same step, untrimmed."""
    table = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=config.lr, fused=True)

    def step() -> list[Tensor]:
        loss = untrimmed_backward(table, batch, config, propagate)
        optimizer.step()
        assert table.grad is not None
        return [loss, *table.grad.split([graph.num_users, graph.num_items])]

    return step


def authors(x: Tensor, graph: BipartiteGraph, nodes: Tensor, config: BPRConfig, propagate: Propagate) -> harness.Impl:
    """The step of github.com/gusye1234/LightGCN-PyTorch: two tables joined at every step, the layer-0 rows by autograd,
    torch's Adam as it comes."""
    users, items = (part.clone().requires_grad_() for part in x.split([graph.num_users, graph.num_items]))
    optimizer = torch.optim.Adam([users, items], lr=config.lr)
    user, positive, negative = nodes[0], nodes[1] - graph.num_users, nodes[2] - graph.num_users

    def step() -> list[Tensor]:
        everyone = propagate(torch.cat((users, items)))
        final_users, final_items = everyone.split([graph.num_users, graph.num_items])
        u, p, n = final_users[user], final_items[positive], final_items[negative]
        ego = (F.embedding(user, users), F.embedding(positive, items), F.embedding(negative, items))
        decay = 0.5 * sum(rows.norm(2).pow(2) for rows in ego) / float(len(user))
        loss = F.softplus((u * n).sum(1) - (u * p).sum(1)).mean() + config.l2 * decay
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert users.grad is not None and items.grad is not None
        return [loss.detach(), users.grad, items.grad]

    return step


def exact(x: Tensor, graph: BipartiteGraph, nodes: Tensor, config: BPRConfig, propagate: Propagate) -> list[Tensor]:
    """Loss and gradients of the first step in float64; `propagate` computes in float64 and is its own adjoint."""
    user, positive, negative = (propagate(x)[node] for node in nodes)
    difference = (user * (negative - positive)).sum(1)
    own = [x.double()[node] for node in nodes]
    loss = F.softplus(difference).mean() + config.l2 / 2 * sum((rows * rows).sum() for rows in own) / nodes.shape[1]
    slope = (torch.sigmoid(difference) / nodes.shape[1])[:, None]
    through = torch.zeros_like(x, dtype=torch.float64)
    grad = torch.zeros_like(through)
    for node, part, rows in zip(nodes, (slope * (negative - positive), -slope * user, slope * user), own, strict=True):
        through.index_add_(0, node, part)
        grad.index_add_(0, node, rows * (config.l2 / nodes.shape[1]))
    grad += propagate(through)
    return [loss, *grad.split([graph.num_users, graph.num_items])]

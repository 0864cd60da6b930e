"""50 BPR steps of LightGCN against the formulation of the authors' PyTorch code, with the same samples.

The naive side is written here from the paper: a sparse matrix with stored values, all layers stacked, every row
propagated at every step, the L2 term through autograd, plain Adam.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import data_folder, requires
from torch.nn import functional as F

from collm_fast.config import BPRConfig
from collm_fast.data.sampler import batches_of, sample_triples
from collm_fast.graph import BipartiteGraph
from collm_fast.training.bpr import bpr_backward

STEPS = 50


def naive_losses(graph: BipartiteGraph, start: torch.Tensor, triples: np.ndarray, config: BPRConfig) -> list[float]:
    node = torch.repeat_interleave(torch.arange(graph.num_nodes), graph.crow.diff())
    value = graph.crow.diff().double().rsqrt()[torch.stack((node, graph.col.long()))].prod(0).to(start.dtype)
    size = (graph.num_nodes, graph.num_nodes)
    adjacency = torch.sparse_coo_tensor(
        torch.stack((node, graph.col.long())), value, size, check_invariants=True
    ).coalesce()
    users = start[: graph.num_users].clone().requires_grad_()
    items = start[graph.num_users :].clone().requires_grad_()
    optimizer = torch.optim.Adam([users, items], lr=config.lr)
    losses = []
    for u, i, j in torch.from_numpy(triples).split(config.batch_size, dim=1):
        layers = [torch.cat((users, items))]
        for _ in range(config.num_layers):
            layers.append(torch.sparse.mm(adjacency, layers[-1]))
        user, item = torch.stack(layers, dim=1).mean(dim=1).split((graph.num_users, graph.num_items))
        positive, negative = (user[u] * item[i]).sum(1), (user[u] * item[j]).sum(1)
        regularisation = users[u].norm(2).pow(2) + items[i].norm(2).pow(2) + items[j].norm(2).pow(2)
        loss = F.softplus(negative - positive).mean() + config.l2 * 0.5 * regularisation / len(u)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_losses(graph: BipartiteGraph, start: torch.Tensor, triples: np.ndarray, config: BPRConfig) -> list[float]:
    table = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=config.lr, fused=True)
    losses = []
    nodes = triples + np.array([[0], [graph.num_users], [graph.num_users]])
    for batch in batches_of(nodes, graph.num_nodes, config.batch_size):
        losses.append(bpr_backward(table, graph, batch, config).item())
        optimizer.step()
    return losses


def compared(graph: BipartiteGraph, config: BPRConfig) -> tuple[np.ndarray, np.ndarray]:
    start = torch.empty(graph.num_nodes, config.dim)
    start.normal_(0.0, config.init_std, generator=torch.Generator().manual_seed(config.seed))
    triples = sample_triples(graph, STEPS * config.batch_size, seed=config.seed)
    return np.array(our_losses(graph, start, triples, config)), np.array(naive_losses(graph, start, triples, config))


@pytest.mark.parametrize("l2", [1e-4, 0.05])
def test_the_loss_curve_equals_the_naive_one(l2: float):
    rng = np.random.default_rng(0)
    users = rng.integers(0, 200, 3000)
    # Popular items, and items of either kind of user; user 200 and item 150 occur nowhere.
    items = np.minimum((75 * rng.random(3000) ** 3).astype(int) * 2 + users % 2, 149)
    graph = BipartiteGraph.from_interactions(users, items, 201, 151)
    ours, naive = compared(graph, BPRConfig(dim=16, lr=0.01, batch_size=256, l2=l2))
    assert naive[-1] < 0.8 * naive[0]
    np.testing.assert_allclose(ours, naive, rtol=2e-5)


@requires("data")
def test_the_first_steps_on_gowalla_equal_the_naive_one():
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(data_folder() / "gowalla-lightgcn" / "train.parquet")
    graph = BipartiteGraph.from_interactions(table["user"].to_numpy(), table["item"].to_numpy(), 29_858, 40_981)
    assert graph.num_edges == 810_128
    config = replace(BPRConfig(), dim=16)
    start = torch.empty(graph.num_nodes, 16).normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    triples = sample_triples(graph, 3 * config.batch_size, seed=1)
    np.testing.assert_allclose(
        our_losses(graph, start, triples, config), naive_losses(graph, start, triples, config), rtol=1e-6
    )

"""LightGCN over several processes: tables whose rows are divided among ranks, over torch.distributed.

A rank owns a range of users and a range of items (`ShardedGraph`, sharding.py): their rows of the graph and of every
table. A layer needs rows of other ranks, the halo; each is sent once a layer, in the storage dtype. A bipartite graph
propagates as two chains that never meet (users -> items -> users ..., items -> users -> items ...), so while the rows
of one chain travel, the other chain is summed: only the first exchange has nothing to hide behind.

    # torchrun --nproc-per-node 8 train.py
    dist.init_process_group("nccl")                          # "gloo" for CPU tensors
    device = torch.device("cuda", dist.get_node_local_rank())
    graph = ShardedGraph.of(BipartiteGraph.load(path, mmap=True), device=device)   # keeps this rank's part
    x = graph.shard(first_embeddings).requires_grad_()       # and Adam([x]): its state is divided, too
    rows = torch.cat((users, num_users + positives, num_users + negatives))   # this rank's part of the batch
    user, positive, negative = sharded_propagate(x, graph, 3, rows=rows).chunk(3)
    loss = softplus((user * (negative - positive)).sum(1)).sum() / batch_size   # all ranks': their sum
    loss.backward()                                          # every row's gradient arrives at its owner

What ranks send is exchange.py; one layer of one rank is ops/layer.py; all layers on one device are ops/propagate.py.
Works on any backend that has all_to_all: gloo for CPU tensors, NCCL for CUDA ones. Floor F1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from collm_fast.exchange import Chain, Halo, Request, full_halos, sparse_halos
from collm_fast.ops import gather_rows
from collm_fast.ops._arguments import require
from collm_fast.ops.layer import lightgcn_layer
from collm_fast.sharding import ITEMS, USERS, ShardedGraph, agree

__all__ = ["ShardedGraph", "sharded_propagate", "sharded_rows"]

_LOW = (torch.float32, torch.bfloat16, torch.float16)


class _Linear(torch.autograd.Function):
    """y = M x of a linear map that all ranks apply together; the gradient is the adjoint map, applied together too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.maps = adjoint, apply
        return apply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _linear(grad, *ctx.maps), None, None


def _linear(x: Tensor, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = _Linear.apply(x, apply, adjoint)  # type: ignore[no-untyped-call]
    return result


def _propagate(
    x: Tensor,
    graph: ShardedGraph,
    num_layers: int,
    storage: torch.dtype,
    *,
    rows: Sequence[Tensor] | None = None,
    nonzero: Sequence[Tensor] | None = None,
) -> Tensor:
    """The result for this rank's rows. rows: for those positions of each side only, users before items; the last layer
    sums their edges alone. nonzero: x is zero elsewhere; the first layer sends and sums no more than those.
    """
    sizes = [side.num_rows for side in graph.sides]
    wanted = sizes if rows is None else [part.numel() for part in rows]
    out = x.new_empty(sum(wanted), x.shape[1])
    own, result = x.split(sizes), out.split(wanted)

    def layer(side: int, target: Tensor, chain: Chain | None, last: bool, some: Tensor | None = None) -> None:
        part, mean = graph.sides[side], 1.0 / (num_layers + 1) if last else None
        table, slot = (None, None) if chain is None else (chain.table, chain.slot)
        graph_tensors = part.crow, part.col, part.inv_sqrt_degree
        lightgcn_layer(target, table, own[side], *graph_tensors, mean=mean, rows=some, slot=slot)

    def last_layer(side: int, chain: Chain | None) -> None:
        layer(side, result[side], chain, True, None if rows is None else rows[side])

    if num_layers == 0:
        for side in (USERS, ITEMS):
            last_layer(side, None)
        return out
    full = full_halos(graph)
    # Tables are used again: the allocator would keep more of them than ever live at once.
    free: tuple[list[Tensor], list[Tensor]] = ([], [])

    def next_table(side: int, chain: Chain | None, halo: Halo, some: Tensor | None = None) -> Chain:
        fits = free[side] and halo is full[side]
        table = free[side].pop() if fits else x.new_empty(halo.num_rows, x.shape[1], dtype=storage)
        layer(side, table[: halo.num_own], chain, False, some)
        return Chain(graph, side, table, halo)

    first = full if nonzero is None else sparse_halos(graph, nonzero)
    chains = [
        next_table(side, None, first[side], None if nonzero is None else nonzero[side]) for side in (USERS, ITEMS)
    ]
    for k in range(1, num_layers + 1):
        for number, chain in enumerate(chains):
            side = 1 - chain.side
            chain.wait()
            if k == num_layers:
                last_layer(side, chain)
            else:
                chains[number] = next_table(side, chain, full[side])
            if chain.slot is None:
                free[chain.side].append(chain.table)
    return out


def _check(
    op: str,
    x: Tensor,
    graph: ShardedGraph,
    rows: Tensor | None,
    num_layers: int = 0,
    storage_dtype: torch.dtype | None = None,
) -> torch.dtype:
    """The storage dtype, once every rank has found its arguments good and equal to the others'."""
    wide = x.dtype == torch.float64
    storage = storage_dtype or torch.promote_types(x.dtype, torch.float32)
    error = None
    try:
        require(x.dim() == 2 and x.shape[0] == graph.num_local, op, f"x_local of shape [{graph.num_local}, D]", x)
        require(x.dtype in _LOW or (wide and not x.is_cuda), op, "x_local in float32, bfloat16 or float16", x.dtype)
        require(x.device == graph.device, op, f"x_local on {graph.device}", x.device)
        require(num_layers >= 0, op, "num_layers >= 0", num_layers)
        rule = "storage_dtype None or " + ("float64 where x is" if wide else "one of float32, bfloat16, float16")
        require(storage in ((torch.float64,) if wide else _LOW), op, rule, storage)
        if rows is not None:
            require(rows.dim() == 1 and rows.dtype == torch.int64, op, "rows of shape [B] in int64", rows)
            require(rows.device == graph.device, op, f"rows on {graph.device}", rows.device)
            bad = rows[(rows < 0) | (rows >= graph.num_nodes)].tolist()
            require(not bad, op, f"rows in [0, {graph.num_nodes})", bad[0] if bad else None)
    except ValueError as found:
        error = found
    dtypes = (*_LOW, torch.float64)
    numbers = [dtypes.index(dtype) if dtype in dtypes else -1 for dtype in (x.dtype, storage)]
    agree(
        op,
        graph.group,
        graph.device,
        error,
        D=x.shape[-1] if x.dim() else 0,
        dtype=numbers[0],
        num_layers=num_layers,
        storage_dtype=numbers[1],
        use_of_rows=int(rows is not None),
        # A rank without a gradient would never come to the backward that the others wait in.
        requires_grad=int(torch.is_grad_enabled() and x.requires_grad),
    )
    return storage


def sharded_propagate(
    x_local: Tensor,
    graph: ShardedGraph,
    num_layers: int,
    *,
    storage_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`lightgcn_propagate` on a graph and a table that are divided among processes.

        out = 1/(K+1) sum_{k=0..K} (D^-1/2 A D^-1/2)^k x;   h_k = x + S A S h_{k-1}, out = h_K / (K+1)

    Every rank of the group calls it together, and also its backward (the operator is self-adjoint: the same call).
    The bits do not depend on the number of ranks. A layer sends `graph.bytes_per_layer(D, storage)` bytes, and K layers
    K times that. Scratch: two tables [own rows | halo] and what is being sent, all in the storage dtype, at any K.

    Args:
        x_local: [n, D] this rank's rows (`graph.shard(x)`), float32, bfloat16 or float16 (float64 on the CPU).
        graph: this rank's `ShardedGraph`.
        num_layers: K >= 0.
        storage_dtype: what intermediate layers are stored and sent in, as in `lightgcn_propagate`; bfloat16 halves
            the traffic at a relative error of about 4e-4.
        rows: [B] int64 nodes of the whole graph, in [0, N), repeats allowed, another B on every rank if need be: return
            those rows, whoever owns them, without the work for other rows in the last layer, nor (sums and exchange) in
            the first one backwards.
    Returns: [n, D], or [B, D] with `rows`, in x's dtype. Differentiable in x_local, twice if need be.
    Raises: ValueError on every rank if one has a bad argument, or if D, a dtype, num_layers or whether a gradient is
        wanted differ between ranks.
    Source: He et al., LightGCN (arXiv 2002.02126), equations 7 and 8.
    """
    storage = _check("sharded_propagate", x_local, graph, rows, num_layers, storage_dtype)

    def propagate(x: Tensor) -> Tensor:
        return _propagate(x, graph, num_layers, storage)

    if rows is None:
        return _linear(x_local, propagate, propagate)
    request = Request.of(graph, rows)
    distinct, place = request.distinct(graph)

    def wanted(x: Tensor) -> Tensor:
        return request.exchange(graph, gather_rows(_propagate(x, graph, num_layers, storage, rows=distinct), place))

    def adjoint(grad: Tensor) -> Tensor:
        return _propagate(request.give_back(graph, grad), graph, num_layers, storage, nonzero=distinct)

    return _linear(x_local, wanted, adjoint)


def sharded_rows(x_local: Tensor, graph: ShardedGraph, rows: Tensor) -> Tensor:
    """Rows of a table that is divided among processes: out[b] = x[rows[b]], whoever owns the row.

    Every rank of the group calls it together, and also its backward, which sums a row's gradients on its owner in one
    fixed order. A rank that wants nothing passes no rows; `arange(N)` on one rank collects the whole table there.

    Args:
        x_local: [n, D] this rank's rows, as in `sharded_propagate`.
        rows: [B] int64 nodes of the whole graph, in [0, N), repeats allowed, another B on every rank if need be.
    Returns: [B, D] in x's dtype. Differentiable in x_local, twice if need be.
    Raises: ValueError on every rank if one has a bad argument, or if D, the dtype or whether a gradient is wanted
        differ between ranks.
    """
    _check("sharded_rows", x_local, graph, rows)
    request = Request.of(graph, rows)
    return _linear(x_local, lambda x: request.fetch(graph, x), lambda grad: request.give_back(graph, grad))

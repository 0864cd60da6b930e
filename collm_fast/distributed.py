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

One layer of one rank is ops/layer.py; all layers on one device are ops/propagate.py. Works on any backend that has
all_to_all: gloo for CPU tensors, NCCL for CUDA ones. Floor F1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from collm_fast.ops import gather_rows, scatter_rows
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


class _Chain:
    """The newest table of one of the two chains: [own rows | halo] of one side, whose halo is on its way."""

    def __init__(self, graph: ShardedGraph, side: int, table: Tensor) -> None:
        part = graph.sides[side]
        self.side, self.table = side, table
        # Kept until the exchange is over: a backend may still be reading it.
        self._sent = table.index_select(0, part.send)
        halo = table[part.num_rows :]
        self._work = dist.all_to_all_single(
            halo, self._sent, part.halo_counts, part.send_counts, group=graph.group, async_op=True
        )

    def wait(self) -> Tensor:
        with record_function("sharded_propagate: wait for the halo"):
            self._work.wait()
        return self.table


def _propagate(
    x: Tensor, graph: ShardedGraph, num_layers: int, storage: torch.dtype, rows: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The result for this rank's rows; `rows`: for those positions of each side only, users before items."""
    sizes = [side.num_rows for side in graph.sides]
    wanted = sizes if rows is None else [part.numel() for part in rows]
    out = x.new_empty(sum(wanted), x.shape[1])
    own, result = x.split(sizes), out.split(wanted)

    def layer(side: int, target: Tensor, table: Tensor | None, last: bool) -> None:
        part, some = graph.sides[side], rows[side] if last and rows is not None else None
        mean = 1.0 / (num_layers + 1) if last else None
        lightgcn_layer(target, table, own[side], part.crow, part.col, part.inv_sqrt_degree, mean=mean, rows=some)

    if num_layers == 0:
        for side in (USERS, ITEMS):
            layer(side, result[side], None, True)
        return out
    free: tuple[list[Tensor], list[Tensor]] = ([], [])

    def start(side: int, table: Tensor | None) -> _Chain:
        part = graph.sides[side]
        size = (part.num_rows + part.num_halo, x.shape[1])
        target = free[side].pop() if free[side] else x.new_empty(size, dtype=storage)
        layer(side, target[: part.num_rows], table, False)
        return _Chain(graph, side, target)

    chains = [start(USERS, None), start(ITEMS, None)]
    for k in range(1, num_layers + 1):
        for number, chain in enumerate(chains):
            table, side = chain.wait(), 1 - chain.side
            if k == num_layers:
                layer(side, result[side], table, True)
            else:
                chains[number] = start(side, table)
            free[chain.side].append(table)
    return out


@dataclass(frozen=True, eq=False)
class _Request:
    """Which rows this rank asks for and which it is asked for.

    Fields:
        place: [B] int32, where each wanted row lies among the distinct ones.
        ask_counts, give_counts: [P] distinct rows that come from and go to each rank.
        give: [sum give_counts] int32, local rows, grouped by the rank that asked.
    """

    place: Tensor
    ask_counts: list[int]
    give_counts: list[int]
    give: Tensor

    @classmethod
    def of(cls, graph: ShardedGraph, rows: Tensor) -> _Request:
        users, items = (torch.tensor(side.bounds, device=rows.device) for side in graph.sides)
        is_item = rows >= graph.num_users
        owner_of_user = torch.searchsorted(users[1:], rows, right=True)
        owner = torch.where(is_item, torch.searchsorted(items[1:], rows, right=True), owner_of_user)
        distinct, place = torch.unique(owner * graph.num_nodes + rows, return_inverse=True)
        owner, node = distinct // max(1, graph.num_nodes), distinct % max(1, graph.num_nodes)
        # A local table holds an owner's users, then its items.
        at_item = node - items[owner] + (users[owner + 1] - users[owner])
        local = torch.where(node >= graph.num_users, at_item, node - users[owner])
        asked = torch.bincount(owner, minlength=graph.world_size)
        given = torch.empty_like(asked)
        dist.all_to_all_single(given, asked, group=graph.group)
        counts = asked.tolist(), given.tolist()
        give = local.new_empty(sum(counts[1]))
        dist.all_to_all_single(give, local, counts[1], counts[0], group=graph.group)
        return cls(place.int(), *counts, give.int())

    def fetch(self, graph: ShardedGraph, table: Tensor) -> Tensor:
        """[B, D]: the wanted rows of a table that is divided among the ranks, [n, D]."""
        return self.exchange(graph, gather_rows(table, self.give))

    def fetch_propagated(self, graph: ShardedGraph, x: Tensor, num_layers: int, storage: torch.dtype) -> Tensor:
        """`fetch` of the propagated table, whose last layer sums the edges of the wanted rows alone."""
        distinct, place = torch.unique(self.give.long(), return_inverse=True)
        num_users = graph.sides[USERS].num_rows
        is_user = distinct < num_users
        wanted = _propagate(x, graph, num_layers, storage, (distinct[is_user], distinct[~is_user] - num_users))
        return self.exchange(graph, gather_rows(wanted, place.int()))

    def exchange(self, graph: ShardedGraph, given: Tensor) -> Tensor:
        """[B, D] from the rows that this rank gives, in the order in which it was asked."""
        got = given.new_empty(sum(self.ask_counts), given.shape[1])
        dist.all_to_all_single(got, given, self.ask_counts, self.give_counts, group=graph.group)
        return gather_rows(got, self.place)

    def give_back(self, graph: ShardedGraph, grad: Tensor) -> Tensor:
        """The adjoint of `fetch`, [B, D] -> [n, D]: a row sums over its places, on its owner, in one fixed order."""
        sums = scatter_rows(grad, self.place, sum(self.ask_counts))
        got = grad.new_empty(sum(self.give_counts), grad.shape[1])
        dist.all_to_all_single(got, sums, self.give_counts, self.ask_counts, group=graph.group)
        return scatter_rows(got, self.give, graph.num_local)


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
    K times that. Scratch: at most three of the four half tables [own rows | halo] that two chains would have, and what
    is being sent, all in the storage dtype.

    Args:
        x_local: [n, D] this rank's rows (`graph.shard(x)`), float32, bfloat16 or float16 (float64 on the CPU).
        graph: this rank's `ShardedGraph`.
        num_layers: K >= 0.
        storage_dtype: what intermediate layers are stored and sent in, as in `lightgcn_propagate`; bfloat16 halves
            the traffic at a relative error of about 4e-4.
        rows: [B] int64 nodes of the whole graph, in [0, N), repeats allowed, another B on every rank if need be: return
            those rows, whoever owns them, without the work for other rows in the last layer.
    Returns: [n, D], or [B, D] with `rows`, in x's dtype. Differentiable in x_local, twice if need be.
    Raises: ValueError on every rank if one has a bad argument, or if D, a dtype or num_layers differ between ranks.
    Source: He et al., LightGCN (arXiv 2002.02126), equations 7 and 8.
    """
    storage = _check("sharded_propagate", x_local, graph, rows, num_layers, storage_dtype)

    def propagate(x: Tensor) -> Tensor:
        return _propagate(x, graph, num_layers, storage)

    if rows is None:
        return _linear(x_local, propagate, propagate)
    request = _Request.of(graph, rows)
    return _linear(
        x_local,
        lambda x: request.fetch_propagated(graph, x, num_layers, storage),
        lambda grad: propagate(request.give_back(graph, grad)),
    )


def sharded_rows(x_local: Tensor, graph: ShardedGraph, rows: Tensor) -> Tensor:
    """Rows of a table that is divided among processes: out[b] = x[rows[b]], whoever owns the row.

    Every rank of the group calls it together, and also its backward, which sums a row's gradients on its owner in one
    fixed order. A rank that wants nothing passes no rows; `arange(N)` on one rank collects the whole table there.

    Args:
        x_local: [n, D] this rank's rows, as in `sharded_propagate`.
        rows: [B] int64 nodes of the whole graph, in [0, N), repeats allowed, another B on every rank if need be.
    Returns: [B, D] in x's dtype. Differentiable in x_local, twice if need be.
    Raises: ValueError on every rank if one has a bad argument, or if D or the dtype differ between ranks.
    """
    _check("sharded_rows", x_local, graph, rows)
    request = _Request.of(graph, rows)
    return _linear(x_local, lambda x: request.fetch(graph, x), lambda grad: request.give_back(graph, grad))

"""What ranks send each other: the rows of a layer's tables that cross, and rows of a table that a rank asks for.

Who owns which row is sharding.py; the layers are distributed.py, which alone uses this. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from collm_fast.ops import gather_rows, scatter_rows
from collm_fast.sharding import USERS, ShardedGraph


@dataclass(frozen=True, eq=False)
class Halo:
    """Which rows of one side's table go out and come in with a layer: the table is [own rows | rows that come in].

    Fields:
        num_own: own rows in the table.
        send: [sum send_counts] positions of own rows, grouped by the rank that needs them.
        send_counts, halo_counts: [P] rows that go to and come from each rank.
        slot: None: the table has a row for each position that columns name; else [n + halo] int32, its row of each
            position, -1 where that row is zero.
    """

    num_own: int
    send: Tensor
    send_counts: list[int]
    halo_counts: list[int]
    slot: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.num_own + sum(self.halo_counts)


def full_halos(graph: ShardedGraph) -> list[Halo]:
    """Of each side, all rows that others read."""
    return [Halo(side.num_rows, side.send, side.send_counts, side.halo_counts) for side in graph.sides]


def sparse_halos(graph: ShardedGraph, nonzero: Sequence[Tensor]) -> list[Halo]:
    """Of each side, those rows that others read and that are not zero: `nonzero` names them by position, ascending.

    A rank learns which of its halo rows come, by their places in what it would receive in full; two small exchanges.
    """
    ranks = torch.arange(graph.world_size, device=graph.device)
    outgoing = []
    for side, own in zip(graph.sides, nonzero, strict=True):
        slot = torch.full((side.num_rows + side.num_halo,), -1, dtype=torch.int32, device=graph.device)
        slot[own] = torch.arange(own.numel(), dtype=torch.int32, device=graph.device)
        held = slot[side.send] >= 0
        counts = torch.tensor(side.send_counts, device=graph.device)
        peer = torch.repeat_interleave(ranks, counts)
        place = torch.arange(side.send.numel(), device=graph.device) - (counts.cumsum(0) - counts)[peer]
        outgoing.append((slot, slot[side.send[held]].long(), place[held], peer[held].bincount(minlength=len(ranks))))
    sent = torch.stack([counts for *_, counts in outgoing], dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=graph.group)
    halos = []
    for number, (slot, send, place, _) in enumerate(outgoing):
        side, num_own = graph.sides[number], nonzero[number].numel()
        send_counts, halo_counts = sent[:, number].tolist(), received[:, number].tolist()
        there = place.new_empty(sum(halo_counts))
        dist.all_to_all_single(there, place, halo_counts, send_counts, group=graph.group)
        counts = torch.tensor(side.halo_counts, device=graph.device)
        peer = torch.repeat_interleave(ranks, received[:, number])
        at = side.num_rows + (counts.cumsum(0) - counts)[peer] + there
        slot[at] = torch.arange(num_own, num_own + there.numel(), dtype=torch.int32, device=graph.device)
        halos.append(Halo(num_own, send, send_counts, halo_counts, slot))
    return halos


class Chain:
    """The newest table of one of the two chains, whose halo is on its way."""

    def __init__(self, graph: ShardedGraph, side: int, table: Tensor, halo: Halo) -> None:
        self.side, self.table, self.slot = side, table, halo.slot
        # Kept until the exchange is over: a backend may still be reading it.
        self._sent = table.index_select(0, halo.send)
        self._work = dist.all_to_all_single(
            table[halo.num_own :], self._sent, halo.halo_counts, halo.send_counts, group=graph.group, async_op=True
        )

    def wait(self) -> None:
        """Returns when the table is whole (on a GPU: lets the current stream wait for that)."""
        with record_function("sharded_propagate: wait for the halo"):
            self._work.wait()


@dataclass(frozen=True, eq=False)
class Request:
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
    def of(cls, graph: ShardedGraph, rows: Tensor) -> Request:
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

    def distinct(self, graph: ShardedGraph) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The rows to give without repeats: their positions in each side, and where each of `give` lies among them."""
        local, place = torch.unique(self.give.long(), return_inverse=True)
        num_users = graph.sides[USERS].num_rows
        return (local[local < num_users], local[local >= num_users] - num_users), place.int()

    def fetch(self, graph: ShardedGraph, table: Tensor) -> Tensor:
        """[B, D]: the wanted rows of a table that is divided among the ranks, [n, D]."""
        return self.exchange(graph, gather_rows(table, self.give))

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

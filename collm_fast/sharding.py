"""ShardedGraph: one rank's rows of a bipartite graph, and which rows of a table it sends and receives.

Who owns what is decided here, once, without a message: the graph is symmetric, so a rank's own edges tell all. What is
computed with it is in distributed.py; the whole graph is graph.py. Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collm_fast.graph import BipartiteGraph
from collm_fast.ops._arguments import require
from collm_fast.ops.layer import lightgcn_layer

USERS, ITEMS = 0, 1
# What a row costs beside its edges (read x, write the table, send and receive), in edges; measured on a CPU at D = 64.
_ROW_COST = 16
_EDGES = 1 << 22


@dataclass(frozen=True, eq=False)
class Side:
    """One rank's share of one side, users or items.

    Fields:
        bounds: [P+1] nodes; rank r owns bounds[r] .. bounds[r+1].
        crow: [n+1] int64; col: [nnz] int32, positions in the other side's table [own rows | halo].
        inv_sqrt_degree: [n] float32, of the whole graph's degrees.
        send: [sum send_counts] int64, which own rows go out, grouped by the rank that needs them.
        send_counts, halo_counts: [P] rows that go to and come from each rank.
    """

    bounds: list[int]
    crow: Tensor
    col: Tensor
    inv_sqrt_degree: Tensor
    send: Tensor
    send_counts: list[int]
    halo_counts: list[int]

    @property
    def num_rows(self) -> int:
        return self.inv_sqrt_degree.shape[0]

    @property
    def num_halo(self) -> int:
        return sum(self.halo_counts)

    def to(self, device: torch.device | str) -> Side:
        names = ("crow", "col", "inv_sqrt_degree", "send")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, eq=False)
class ShardedGraph:
    """This rank's part of a graph: a range of users, a range of items, their edges, and who needs which rows.

    A local table holds the rows of `users` and then those of `items`. `ShardedGraph.of` builds it.
    """

    num_users: int
    num_items: int
    group: Any
    rank: int
    world_size: int
    sides: tuple[Side, Side]

    @classmethod
    def of(cls, graph: BipartiteGraph, group: Any = None, *, device: torch.device | str | None = None) -> ShardedGraph:
        """This rank's part of `graph`; every rank of the group calls it with the same graph.

        The graph may be mapped from a file (`load(path, mmap=True)`): only `crow` and this rank's rows of `col` are
        read, and only those rows are kept. Ranges are contiguous and balanced by cost, of an edge 1 and of a row 16:
        first those of the items, then those of the users so as to even out the sum.

        Args:
            graph: the whole graph, on the CPU.
            group: a torch.distributed process group; None: the default one.
            device: where the part shall live and the group communicates (NCCL: this rank's GPU); None: the CPU.
        Raises: ValueError without an initialised group; on every rank where one finds an edge inside of a side, or
            where the ranks hold different graphs or kernels.
        """
        op = "ShardedGraph"
        ready = dist.is_available() and dist.is_initialized()
        require(ready, op, "an initialised torch.distributed process group", None)
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        require(rank >= 0, op, "a group that this rank belongs to", "another")
        place = torch.device("cpu" if device is None else device)
        error, parts = None, []
        try:
            parts = [side.to(place) for side in _build_sides(graph, rank, world)]
        except ValueError as found:
            error = found
        sizes = {"num_users": graph.num_users, "num_items": graph.num_items, "edges": graph.num_edges}
        agree(op, group, place, error, **sizes, order_of_bfloat16_columns=_order_of_columns(place))
        part = cls(graph.num_users, graph.num_items, group, rank, world, (parts[USERS], parts[ITEMS]))
        part._compare_halo(op)
        return part

    @property
    def users(self) -> range:
        """The users whose rows this rank owns."""
        return range(self.sides[USERS].bounds[self.rank], self.sides[USERS].bounds[self.rank + 1])

    @property
    def items(self) -> range:
        """The items whose rows this rank owns, as items: 0 .. num_items - 1."""
        bounds = self.sides[ITEMS].bounds
        return range(bounds[self.rank] - self.num_users, bounds[self.rank + 1] - self.num_users)

    @property
    def num_nodes(self) -> int:
        """N of the whole graph."""
        return self.num_users + self.num_items

    @property
    def num_local(self) -> int:
        """n: the rows of a local table."""
        return len(self.users) + len(self.items)

    @property
    def device(self) -> torch.device:
        """Where this part lives."""
        return self.sides[USERS].crow.device

    def shard(self, table: Tensor) -> Tensor:
        """[n, D]: this rank's rows of a whole table [N, D], a copy. It may be mapped from a file."""
        require(table.shape[:1] == (self.num_nodes,), "ShardedGraph", f"table of shape [{self.num_nodes}, D]", table)
        items = range(self.num_users + self.items.start, self.num_users + self.items.stop)
        own = torch.cat([table[part.start : part.stop] for part in (self.users, items)])
        return own.to(self.device)

    def bytes_per_layer(self, width: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
        """(sent, received) bytes of this rank in one layer: rows that cross, times D, times the storage dtype's size.

        An upper bound for any partition is sent <= min(cut edges, (P - 1) n) D bytes of the dtype.
        """
        sent = sum(sum(side.send_counts) for side in self.sides)
        received = sum(side.num_halo for side in self.sides)
        return sent * width * dtype.itemsize, received * width * dtype.itemsize

    def _compare_halo(self, op: str) -> None:
        """Each rank derived what it sends and receives from its own rows alone; both ends must mean the same rows."""
        sent, expected = (
            torch.tensor([getattr(side, name) for side in self.sides], device=self.device).T.contiguous()
            for name in ("send_counts", "halo_counts")
        )
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group)
        same = bool((got == expected).all())
        error = None if same else ValueError(f"{op}: expected the same graph on every rank, got other edges")
        agree(op, self.group, self.device, error)


def _cuts(cost: Tensor, wanted: Sequence[int]) -> list[int]:
    """[P+1] ends of contiguous ranges whose costs are as near to `wanted` (in proportion) as whole nodes allow."""
    total = torch.cat((cost.new_zeros(1), cost.cumsum(0)))
    share, ends = 0, [0]
    for want in wanted[:-1]:
        share += want
        # Integers: every rank must cut at the same places.
        target = int(total[-1]) * share // max(1, sum(wanted))
        after = int(torch.searchsorted(total, target))
        nearer = after > 0 and target - int(total[after - 1]) < int(total[after]) - target
        ends.append(max(ends[-1], after - nearer))
    return [*ends, cost.numel()]


def _build_sides(graph: BipartiteGraph, rank: int, world: int) -> tuple[Side, Side]:
    require(graph.crow.device.type == "cpu", "ShardedGraph", "a graph on the CPU", f"one on {graph.crow.device}")
    # A mapped file's `crow` was checked when it was opened; a graph made by hand could divide into nonsense.
    graph._check_rows("")
    cost = graph.crow.diff() + _ROW_COST
    users, items = cost[: graph.num_users], cost[graph.num_users :]
    item_cuts = _cuts(items, [1] * world)
    # A rank whose items cost much (a hub) gets fewer users.
    spent = [int(items[a:b].sum()) for a, b in zip(item_cuts, item_cuts[1:], strict=False)]
    user_cuts = _cuts(users, [max(0, int(cost.sum()) // world - s) for s in spent])
    bounds = (user_cuts, [graph.num_users + cut for cut in item_cuts])
    parts = [_build_side(graph, bounds[side], bounds[1 - side], rank) for side in (USERS, ITEMS)]
    halo_counts = [part[1] for part in parts]
    # The rows of one side reach into the other: that is the other's halo.
    return replace(parts[0][0], halo_counts=halo_counts[1]), replace(parts[1][0], halo_counts=halo_counts[0])


def _build_side(graph: BipartiteGraph, own: list[int], other: list[int], rank: int) -> tuple[Side, list[int]]:
    """This rank's rows of one side, and the halo of the other side's table that they read.

    The graph is symmetric: a rank needs a row exactly if that row has an edge into the rank's range, so a rank's own
    edges tell all that it sends and receives.
    """
    world, begin, end = len(own) - 1, own[rank], own[rank + 1]
    first, last = int(graph.crow[begin]), int(graph.crow[end])
    crow = graph.crow[begin : end + 1] - first
    starts = torch.tensor(other) - other[0]
    low, high = int(starts[rank]), int(starts[rank + 1])
    needed = torch.zeros(world, end - begin, dtype=torch.bool)
    read = torch.zeros(other[-1] - other[0], dtype=torch.bool)
    # Some edges at a time: their int64 ids would take several times the memory of the part itself.
    for at in range(0, last - first, _EDGES):
        col = graph.col[first + at : min(first + at + _EDGES, last)].long() - other[0]
        outside = col[(col < 0) | (col >= read.numel())][:1] + other[0]
        require(not outside.numel(), "ShardedGraph", f"col in [{other[0]}, {other[-1]})", outside.tolist())
        row = torch.searchsorted(crow, torch.arange(at, at + col.numel()), right=True) - 1
        needed[torch.searchsorted(starts[1:], col, right=True), row] = True
        read[col] = True
    needed[rank] = False
    read[low:high] = False
    halo = read.nonzero()[:, 0]
    position = torch.empty(read.numel(), dtype=torch.int32)
    position[low:high] = torch.arange(high - low, dtype=torch.int32)
    position[halo] = torch.arange(high - low, high - low + halo.numel(), dtype=torch.int32)
    col = torch.empty(last - first, dtype=torch.int32)
    for at in range(0, last - first, _EDGES):
        part = col[at : at + _EDGES]
        torch.index_select(position, 0, graph.col[first + at : first + at + part.numel()] - other[0], out=part)
    side = Side(
        bounds=own,
        crow=crow,
        col=col,
        inv_sqrt_degree=graph.inv_sqrt_degree[begin:end].clone(),
        send=needed.nonzero()[:, 1].contiguous(),
        send_counts=needed.sum(1).tolist(),
        halo_counts=[],
    )
    return side, torch.bincount(torch.searchsorted(starts[1:], halo, right=True), minlength=world).tolist()


def _order_of_columns(device: torch.device) -> int:
    """A number that tells in which order the kernels here hold the columns of a bfloat16 table.

    Compiled kernels have an order of their own, and tables travel as they are: ranks that differ must not meet.
    """
    column = torch.arange(128, device=device)
    table = torch.empty(1, 128, dtype=torch.bfloat16, device=device)
    crow, col = column.new_zeros(2), torch.empty(0, dtype=torch.int32, device=device)
    lightgcn_layer(table, None, column[None].float(), crow, col, torch.ones(1, device=device))
    return int((table[0].long() * column).sum())


def agree(op: str, group: Any, device: torch.device, error: ValueError | None, **values: int) -> None:
    """Raises on every rank if one has an error or another value, so that no rank waits for one that has raised."""
    mine = torch.tensor([int(error is not None), *values.values()], device=device)
    sent = mine.repeat(dist.get_world_size(group), 1)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    if error is not None:
        raise error
    for rank, (failed, *theirs) in enumerate(got.tolist()):
        require(not failed, op, "valid arguments on every rank", f"an error on rank {rank}")
        for name, here, there in zip(values, values.values(), theirs, strict=True):
            require(here == there, op, f"the same {name} on every rank", f"{here} here and {there} on rank {rank}")

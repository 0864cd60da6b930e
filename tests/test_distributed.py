"""Propagation divided among processes: the same numbers as one process, the same errors on every rank, no hang.

`rank_*` functions run on every rank of a gloo group (see ranks.py) and return what the tests compare.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from ranks import Ranks
from torch import Tensor

from collm_fast import BipartiteGraph, reference, sharding
from collm_fast.distributed import ShardedGraph, sharded_propagate, sharded_rows
from collm_fast.ops import lightgcn_propagate
from collm_fast.sharding import _ROW_COST, _build_sides, _cuts

WORLDS = (1, 2, 3)


def pairs(seed: int = 0, num_users: int = 90, num_items: int = 70, edges: int = 1200) -> BipartiteGraph:
    """Random pairs with skewed items and repeats."""
    rng = np.random.default_rng(seed)
    items = np.minimum(rng.zipf(1.4, edges) - 1, num_items - 1)
    return BipartiteGraph.from_interactions(rng.integers(0, num_users, edges), items, num_users, num_items)


def hub(users: int = 5000) -> BipartiteGraph:
    """One item that every user likes: more edges than are summed in one piece, on one rank."""
    return BipartiteGraph.from_interactions(np.arange(users), np.zeros(users, dtype=np.int64), users, 3)


GRAPHS = {
    "pairs": pairs(),
    "hub": hub(),
    # User 3 has no edge; the pair (0, 1) occurs twice.
    "isolated": BipartiteGraph.from_interactions([0, 1, 2, 0, 0], [0, 1, 1, 2, 2], 4, 3),
    "two nodes": BipartiteGraph.from_interactions([0], [0], 1, 1),
    "no edges": BipartiteGraph.from_interactions([], [], 3, 2),
    "no nodes": BipartiteGraph.from_interactions([], [], 0, 0),
}


def table(graph: BipartiteGraph, width: int = 20, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(graph.num_nodes, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(out: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    return float((out.detach().double() - expected).norm() / (norm if norm > 0 else 1.0))


# --- what runs on every rank -------------------------------------------------------------------------------------
def rank_layout(group: Any, graph: BipartiteGraph) -> tuple[range, range, tuple[int, int]]:
    part = ShardedGraph.of(graph, group)
    return part.users, part.items, part.bytes_per_layer(8, torch.bfloat16)


def rank_propagate(
    group: Any, graph: BipartiteGraph, x: Tensor, weight: Tensor, num_layers: int, storage: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of the result, of the gradient of (result . weight), and of the gradient's own gradient."""
    part = ShardedGraph.of(graph, group)
    own, upstream = part.shard(x).requires_grad_(), part.shard(weight).requires_grad_()
    out = sharded_propagate(own, part, num_layers, storage_dtype=storage)
    (grad,) = torch.autograd.grad(out, own, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad, upstream, own.detach())
    return out.detach(), grad.detach(), second


def rank_bytes(group: Any, graph: BipartiteGraph, num_layers: int) -> tuple[int, int]:
    """Bytes of halo that this rank sends in one call, and what it says a layer sends, times the layers."""
    part, counted, send = ShardedGraph.of(graph, group), [0], dist.all_to_all_single

    def count(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **options: Any) -> Any:
        counted[0] += input.nbytes if async_op else 0
        return send(output, input, *args, async_op=async_op, **options)

    dist.all_to_all_single = count
    try:
        sharded_propagate(part.shard(table(graph, 8)), part, num_layers, storage_dtype=torch.bfloat16)
    finally:
        dist.all_to_all_single = send
    return counted[0], num_layers * part.bytes_per_layer(8, torch.bfloat16)[0]


def rank_rows(
    group: Any, graph: BipartiteGraph, x: Tensor, rows: list[Tensor], weights: list[Tensor], num_layers: int
) -> tuple[Tensor, ...]:
    """The wanted rows of the result and of x, and the gradients that flow back from both."""
    part = ShardedGraph.of(graph, group)
    own, mine, weight = part.shard(x).requires_grad_(), rows[part.rank], weights[part.rank].clone().requires_grad_()
    out, plain = sharded_propagate(own, part, num_layers, rows=mine), sharded_rows(own, part, mine)
    (grad,) = torch.autograd.grad(out, own, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad, weight, own.detach())
    (plain_grad,) = torch.autograd.grad(plain, own, weight, create_graph=True)
    (plain_second,) = torch.autograd.grad(plain_grad, weight, own.detach())
    return tuple(t.detach() for t in (out, plain, grad, plain_grad, second, plain_second))


def bpr_batches(graph: BipartiteGraph, steps: int, batch: int) -> list[Tensor]:
    """[3, batch] nodes: users, items they have, items at random."""
    rng = torch.Generator().manual_seed(5)
    edge_user = torch.repeat_interleave(torch.arange(graph.num_users), graph.crow.diff()[: graph.num_users])
    batches = []
    for _ in range(steps):
        edge = torch.randint(0, graph.num_edges, (batch,), generator=rng)
        negative = torch.randint(graph.num_users, graph.num_nodes, (batch,), generator=rng)
        batches.append(torch.stack((edge_user[edge], graph.col[edge].long(), negative)))
    return batches


def bpr_loss(final: Tensor, first: Tensor, batch: int) -> Tensor:
    user, positive, negative = final.chunk(3)
    margin = (user * positive).sum(1) - (user * negative).sum(1)
    return (torch.nn.functional.softplus(-margin).sum() + 1e-2 * first.square().sum()) / batch


def rank_train(group: Any, graph: BipartiteGraph, x: Tensor, batches: list[Tensor]) -> tuple[list[float], Tensor]:
    """Each rank takes its part of a batch; the gradient of a row comes to its owner from wherever the row was used."""
    part = ShardedGraph.of(graph, group)
    own = part.shard(x).requires_grad_()
    optimizer = torch.optim.Adam([own], lr=1e-2)
    losses = []
    for batch in batches:
        rows = batch.chunk(part.world_size, dim=1)[part.rank].reshape(-1)
        final, first = sharded_propagate(own, part, 2, rows=rows), sharded_rows(own, part, rows)
        loss = bpr_loss(final, first, batch.shape[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The whole table on rank 0, as a checkpoint would have it.
    wanted = torch.arange(graph.num_nodes if part.rank == 0 else 0)
    return losses, sharded_rows(own.detach(), part, wanted)


def rank_error(group: Any, graph: BipartiteGraph, kind: str) -> str:
    """The message that a mistake on the last rank gives here; afterwards everyone still works."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    if kind == "graph":
        return message(lambda: ShardedGraph.of(pairs(edges=900) if last else graph, group))
    if kind == "edges":
        # As many nodes and edges, in other places.
        other = BipartiteGraph.from_interactions([0, 1, 2, 3], [1, 2, 3, 0], 4, 4)
        same = BipartiteGraph.from_interactions([0, 1, 2, 3], [0, 1, 2, 3], 4, 4)
        return message(lambda: ShardedGraph.of(other if last else same, group))
    if kind == "inside":
        col = graph.col.clone()
        col[-1] = graph.num_nodes - 1  # the last item's neighbour: an item
        broken = BipartiteGraph(graph.crow, col, graph.inv_sqrt_degree, graph.num_users, graph.num_items)
        return message(lambda: ShardedGraph.of(broken if last else graph, group))
    if kind == "kernels":
        real = sharding._order_of_columns
        if last:
            sharding._order_of_columns = lambda device: 0
        found = message(lambda: ShardedGraph.of(graph, group))
        sharding._order_of_columns = real
        return found
    part = ShardedGraph.of(graph, group)
    x = part.shard(table(graph))
    options: dict[str, Any] = {"x_local": x, "graph": part, "num_layers": 2}
    wrong: dict[str, dict[str, Any]] = {
        "D": {"x_local": x[:, :7]},
        "shape": {"x_local": x[1:]},
        "dimensions": {"x_local": x[0, 0]},
        "dtype": {"x_local": x.double()},
        "integers": {"x_local": x.long()},
        "layers": {"num_layers": 3},
        "negative": {"num_layers": -1},
        "storage": {"storage_dtype": torch.float64},
        "other storage": {"storage_dtype": torch.bfloat16},
        "one with rows": {"rows": torch.zeros(2, dtype=torch.int64)},
        "rows": {"rows": torch.tensor([0, graph.num_nodes])},
        "dtype of rows": {"rows": torch.zeros(2)},
        "gradient": {"x_local": x.clone().requires_grad_()},
    }
    if kind in ("rows", "dtype of rows"):
        options["rows"] = torch.zeros(2, dtype=torch.int64)
    found = message(lambda: sharded_propagate(**(options | wrong[kind] if last else options)))
    assert sharded_propagate(x, part, 1).shape == x.shape
    return found


def message(call: Any) -> str:
    try:
        call()
    except ValueError as found:
        return str(found)
    return ""


def rank_outside(group: Any, graph: BipartiteGraph) -> str:
    """What a rank is told that asks for a group of others."""
    pair = dist.new_group([0, 1])
    return message(lambda: ShardedGraph.of(graph, pair)) if dist.get_rank() == 2 else ""


def rank_fail(group: Any, which: int) -> None:
    if dist.get_rank() == which:
        raise RuntimeError("planted")
    dist.barrier(group)


# --- tests -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(max(WORLDS), tmp_path_factory.mktemp("ranks"), __file__) as group:
        yield group


def whole(graph: BipartiteGraph, layout: list[tuple[range, range, Any]], parts: list[Tensor]) -> Tensor:
    """The table of all nodes from the ranks' parts."""
    out = torch.full((graph.num_nodes, parts[0].shape[1]), float("nan"), dtype=parts[0].dtype)
    for (users, items, _), part in zip(layout, parts, strict=True):
        out[users.start : users.stop] = part[: len(users)]
        out[graph.num_users + items.start : graph.num_users + items.stop] = part[len(users) :]
    return out


@pytest.mark.parametrize("name", GRAPHS)
def test_propagate_like_one_process(ranks: Ranks, name: str) -> None:
    graph = GRAPHS[name]
    for num_layers, dtype in ((0, torch.float32), (1, torch.float32), (2, torch.float64), (3, torch.float32)):
        x, weight = table(graph, dtype=dtype), table(graph, dtype=dtype, seed=1)
        expected = [reference.lightgcn_propagate(t.double(), graph, num_layers) for t in (x, weight, x)]
        limit = 1e-13 if dtype == torch.float64 else 1e-6
        bits = []
        for world in WORLDS:
            layout = ranks(world, "rank_layout", graph)
            parts = ranks(world, "rank_propagate", graph, x, weight, num_layers, None)
            found = [whole(graph, layout, list(part)) for part in zip(*parts, strict=True)]
            for out, right in zip(found, expected, strict=True):
                assert out.dtype == dtype and error(out, right) <= limit
            bits.append(found)
        for found in bits[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found, bits[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage(ranks: Ranks, dtype: torch.dtype) -> None:
    graph = GRAPHS["pairs"]
    x = table(graph, 64, dtype)
    options = {"storage_dtype": torch.bfloat16}
    expected = reference.lightgcn_propagate(x.double(), graph, 3)
    allowed = 2 * error(reference.lightgcn_propagate(x, graph, 3, **options), expected)
    layout = ranks(2, "rank_layout", graph)
    first, again = (ranks(2, "rank_propagate", graph, x, x, 3, torch.bfloat16) for _ in range(2))
    out = whole(graph, layout, [part[0] for part in first])
    assert out.dtype == dtype and 0 < error(out, expected) <= allowed
    assert torch.equal(out, whole(graph, layout, [part[0] for part in again]))


def test_a_layer_sends_what_it_says(ranks: Ranks) -> None:
    for sent, said in ranks(3, "rank_bytes", GRAPHS["pairs"], 3):
        assert sent == said > 0


@pytest.mark.parametrize("name", ["pairs", "isolated"])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_rows(ranks: Ranks, name: str, num_layers: int) -> None:
    graph = GRAPHS[name]
    x = table(graph)
    for world in (2, 3):
        # Rank 0 asks for nothing; others for as many rows as they like, some of them twice.
        rng = torch.Generator().manual_seed(world)
        rows = [torch.randint(0, graph.num_nodes, (9 * rank,), generator=rng) for rank in range(world)]
        weights = [torch.randn(len(wanted), x.shape[1], generator=rng) for wanted in rows]
        layout = ranks(world, "rank_layout", graph)
        parts = ranks(world, "rank_rows", graph, x, rows, weights, num_layers)
        full = whole(graph, layout, [p[0] for p in ranks(world, "rank_propagate", graph, x, x, num_layers, None)])
        spread = torch.zeros_like(x, dtype=torch.float64)
        for wanted, weight in zip(rows, weights, strict=True):
            spread.index_add_(0, wanted, weight.double())
        grad, plain_grad = (whole(graph, layout, [part[i] for part in parts]) for i in (2, 3))
        assert error(grad, reference.lightgcn_propagate(spread, graph, num_layers)) <= 1e-6
        assert error(plain_grad, spread) <= 1e-6
        for wanted, (out, plain, _, _, second, plain_second) in zip(rows, parts, strict=True):
            assert torch.equal(out, full[wanted]) and torch.equal(plain, x[wanted])
            assert torch.equal(plain_second, x[wanted]) and error(second, full[wanted].double()) <= 1e-6


def test_training_like_one_process(ranks: Ranks) -> None:
    graph = GRAPHS["pairs"]
    batches, x = bpr_batches(graph, 20, 32), 0.1 * table(graph)
    alone = x.clone().requires_grad_()
    optimizer, expected = torch.optim.Adam([alone], lr=1e-2), []
    for batch in batches:
        rows = batch.reshape(-1)
        loss = bpr_loss(lightgcn_propagate(alone, graph, 2, rows=rows), alone[rows], batch.shape[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert expected[-1] < expected[0]
    for world in (2, 3):
        results = ranks(world, "rank_train", graph, x, batches)
        assert np.allclose(np.sum([losses for losses, _ in results], axis=0), expected, rtol=1e-5)
        assert error(results[0][1], alone.detach().double()) <= 1e-5
        assert all(len(collected) == 0 for _, collected in results[1:])


@pytest.mark.parametrize(
    ("kind", "there", "here"),
    [
        ("D", "expected the same D on every rank, got 7 here and 20 on rank 0", "got 20 here and 7 on rank 1"),
        ("shape", "expected x_local of shape [", "expected valid arguments on every rank, got an error on rank 1"),
        ("dimensions", "expected x_local of shape [", "got an error on rank 1"),
        ("dtype", "expected the same dtype on every rank", "expected the same dtype on every rank"),
        ("integers", "expected x_local in float32, bfloat16 or float16, got int64", "got an error on rank 1"),
        ("layers", "expected the same num_layers on every rank, got 3 here and 2 on rank 0", "got 2 here and 3"),
        ("negative", "expected num_layers >= 0, got -1", "got an error on rank 1"),
        ("storage", "storage_dtype None or one of float32, bfloat16, float16, got float64", "an error on rank 1"),
        ("other storage", "expected the same storage_dtype on every rank", "the same storage_dtype on every rank"),
        ("one with rows", "expected the same use_of_rows on every rank", "the same use_of_rows on every rank"),
        ("rows", "expected rows in [0, 160), got 160", "got an error on rank 1"),
        ("dtype of rows", "expected rows of shape [B] in int64, got", "got an error on rank 1"),
        ("gradient", "expected the same requires_grad on every rank, got 1 here and 0 on", "the same requires_grad on"),
        ("graph", "expected the same edges on every rank", "expected the same edges on every rank"),
        ("inside", "expected col in [0, 90), got [159]", "got an error on rank 1"),
        (
            "kernels",
            "expected the same order_of_bfloat16_columns on",
            "the same order_of_bfloat16_columns on every rank",
        ),
        ("edges", "expected the same graph on every rank", "on every rank"),
    ],
)
def test_errors_reach_every_rank(ranks: Ranks, kind: str, there: str, here: str) -> None:
    found = ranks(2, "rank_error", GRAPHS["pairs"], kind)
    assert here in found[0] and there in found[1], found
    op = "ShardedGraph" if kind in ("graph", "edges", "inside", "kernels") else "sharded_propagate"
    assert all(text.startswith(f"{op}: expected ") for text in found)


def test_outside_of_the_group(ranks: Ranks) -> None:
    *_, outside = ranks(3, "rank_outside", GRAPHS["isolated"])
    assert outside == "ShardedGraph: expected a group that this rank belongs to, got another"


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="ShardedGraph: expected an initialised torch.distributed process group, got"):
        ShardedGraph.of(GRAPHS["pairs"])


def test_one_process_and_a_file(tmp_path: Path) -> None:
    """A group of one needs no launcher; the graph comes from a file."""
    graph = GRAPHS["pairs"]
    graph.save(tmp_path / "graph.safetensors")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    try:
        part = ShardedGraph.of(BipartiteGraph.load(tmp_path / "graph.safetensors", mmap=True))
        assert part.num_local == part.num_nodes == graph.num_nodes and part.device == torch.device("cpu")
        x = table(graph, 5, torch.float64)
        own = part.shard(x).requires_grad_()
        assert own.data_ptr() != x.data_ptr()
        assert error(sharded_propagate(own, part, 3), reference.lightgcn_propagate(x, graph, 3)) <= 1e-13
        small = part.shard(table(graph, 3, torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda t: sharded_propagate(t, part, 2), small)
        rows = torch.tensor([5, 5, 150])
        assert torch.autograd.gradcheck(lambda t: sharded_propagate(t, part, 2, rows=rows), small)
        assert sharded_propagate(own[:, :0], part, 2).shape == (graph.num_nodes, 0)
        assert part.bytes_per_layer(64) == (0, 0)
        with pytest.raises(ValueError, match=r"ShardedGraph: expected table of shape \[160, D\], got \[159, 5\]"):
            part.shard(x[1:])
    finally:
        dist.destroy_process_group()


def test_a_rank_that_fails_fails_the_call(tmp_path: Path) -> None:
    """The tests' own harness: nothing may hang, and nothing may pass."""
    with Ranks(2, tmp_path, __file__) as pair:
        with pytest.raises(AssertionError, match="rank 1:\n(.|\n)*planted(.|\n)*rank 0 gave no answer"):
            pair(2, "rank_fail", 1)


# --- how a graph is divided: no processes needed -----------------------------------------------------------------
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_parts_fit_together(name: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_EDGES", 64)  # several blocks of edges
    graph = GRAPHS[name]
    parts = [_build_sides(graph, rank, world) for rank in range(world)]
    assert sum(side.col.numel() for part in parts for side in part) == graph.col.numel()
    for rank, part in enumerate(parts):
        for number, side in enumerate(part):
            other = part[1 - number]
            assert side.bounds == parts[0][number].bounds and side.send_counts[rank] == 0
            # What this rank sends to another is what the other expects of it.
            assert side.send_counts == [parts[peer][number].halo_counts[rank] for peer in range(world)]
            # Positions back to nodes: the rows of the whole graph.
            halo = [
                parts[peer][1 - number].send.split(parts[peer][1 - number].send_counts)[rank] + other.bounds[peer]
                for peer in range(world)
            ]
            begin, end = side.bounds[rank], side.bounds[rank + 1]
            nodes = torch.cat((torch.arange(other.bounds[rank], other.bounds[rank + 1]), *halo))
            assert torch.equal(nodes[side.col.long()], graph.col[graph.crow[begin] : graph.crow[end]].long())
            assert torch.equal(side.inv_sqrt_degree, graph.inv_sqrt_degree[begin:end])


def cost_of(sides: tuple[sharding.Side, sharding.Side]) -> int:
    return sum(side.col.numel() + _ROW_COST * side.num_rows for side in sides)


def test_parts_are_balanced() -> None:
    graph = pairs(num_users=3000, num_items=2000, edges=40000)
    cost = [cost_of(_build_sides(graph, rank, 4)) for rank in range(4)]
    assert max(cost) <= 1.03 * sum(cost) / 4


def test_a_hub_takes_users_from_its_rank() -> None:
    graph = hub()
    parts = [_build_sides(graph, rank, 2) for rank in range(2)]
    # The hub's row, half of all edges, cannot be divided: its rank owns few users.
    owner = int(parts[0][1].crow[-1] == 0)
    assert parts[owner][0].num_rows < parts[1 - owner][0].num_rows
    assert max(map(cost_of, parts)) <= 1.01 * min(map(cost_of, parts))


def test_a_graph_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="ShardedGraph: expected a graph on the CPU, got one on meta"):
        _build_sides(pairs().to("meta"), 0, 2)


def test_a_graph_whose_rows_do_not_rise_is_refused() -> None:
    graph = pairs()
    crow = graph.crow.clone()
    crow[3] = 10**6
    broken = BipartiteGraph(crow, graph.col, graph.inv_sqrt_degree, graph.num_users, graph.num_items)
    for rank in range(2):
        with pytest.raises(ValueError, match="BipartiteGraph: expected crow to rise from 0 to nnz"):
            _build_sides(broken, rank, 2)


def test_cuts() -> None:
    cost = torch.tensor([1, 1, 1, 1])
    assert _cuts(cost, [1, 1]) == [0, 2, 4]
    assert _cuts(cost, [3, 1]) == [0, 3, 4]
    assert _cuts(cost, [0, 1]) == [0, 0, 4]
    assert _cuts(cost, [0, 0]) == [0, 0, 4]
    assert _cuts(torch.tensor([100, 1, 1]), [1, 1]) == [0, 1, 3]
    assert _cuts(torch.tensor([1, 1, 100]), [1, 1]) == [0, 2, 3]
    assert _cuts(torch.tensor([], dtype=torch.int64), [1, 1, 1]) == [0, 0, 0, 0]


def test_benchmark_runs(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--ranks", "1", "--graphs", "power-law 2k", "--rounds", "1", "--json", str(path)]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "distributed.py"), *arguments], check=True)
    rows = json.loads(path.read_text())["rows"]
    assert {(row["impl"], row["pass"], row["dtype"]) for row in rows} == {
        (impl, pass_, dtype)
        for impl in ("ours", "one_process")
        for pass_ in ("fwd", "fwd+bwd", "step")
        for dtype in ("float32", "bfloat16")
    }
    assert all(row["agrees"] for row in rows if row["impl"] == "ours")

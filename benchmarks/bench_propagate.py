"""Times lightgcn_propagate against the ways LightGCN is written today.

Graphs: the ML-1M split of CoLLM and Gowalla where ../shared/data (or COLLM_FAST_TEST_DATA) has them, and a synthetic
power law always. `naive` is the LightGCN-PyTorch formulation (torch.sparse COO, K+1 tables stacked, their mean); peers:
`torch_csr` and `torch_csr_int32` (a running sum), `scipy_csr` (forward, on a CPU). The case `rows` reads the rows of
one BPR batch, as a training step does; `bf16 storage` keeps the layers of a float32 call in bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from collm_fast import BipartiteGraph, _native
from collm_fast.ops import lightgcn_propagate

K = 3
BATCH = 2048
DATA = Path(os.environ.get("COLLM_FAST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
# Name: file, the columns of user and item.
SPLITS = {"ml-1m": ("ml-1m-collm", "uid", "iid"), "gowalla": ("gowalla-lightgcn", "user", "item")}


def published(suite: harness.Suite, name: str) -> BipartiteGraph | None:
    folder, user, item = SPLITS[name]
    path = DATA / folder / "train.parquet"
    if not path.is_file():
        suite.failures.append(f"{name}: no {folder}/train.parquet")
        return None
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(suite.file(name, path), columns=[user, item])
    users, items = table[user].to_numpy(), table[item].to_numpy()
    return BipartiteGraph.from_interactions(users, items, int(users.max()) + 1, int(items.max()) + 1)


def power_law(suite: harness.Suite, edges: int) -> BipartiteGraph:
    """Users uniform, items by rank^-0.8, 25 edges a user and 40 an item on average."""
    num_users, num_items = edges // 25, edges // 40
    users = suite.integers(0, num_users, edges).cpu().numpy()
    uniform = suite.integers(0, 1 << 30, edges).cpu().numpy() / float(1 << 30)
    items = np.minimum((num_items * uniform**5).astype(np.int64), num_items - 1)
    return BipartiteGraph.from_interactions(users, items, num_users, num_items)


def values(graph: BipartiteGraph) -> Tensor:
    node = torch.repeat_interleave(torch.arange(graph.num_nodes), graph.crow.diff())
    return graph.inv_sqrt_degree[node] * graph.inv_sqrt_degree[graph.col.long()]


def running_mean(matrix: Tensor, x: Tensor) -> Tensor:
    total = layer = x
    for _ in range(K):
        layer = matrix @ layer
        total = total + layer
    return total / (K + 1)


def naive(matrix: Tensor, x: Tensor) -> Tensor:
    layers = [x]
    for _ in range(K):
        layers.append(torch.sparse.mm(matrix, layers[-1]))
    return torch.stack(layers, dim=1).mean(dim=1)


def scipy_mean(matrix: scipy.sparse.csr_array, x: np.ndarray) -> Tensor:
    total = layer = x
    for _ in range(K):
        layer = matrix @ layer
        total = total + layer
    return torch.from_numpy(total / (K + 1))


def work(graph: BipartiteGraph, D: int, layers: float, bytes_each: int = 4) -> harness.Work:
    """A layer gathers nnz rows of the table, reads the columns and x, and writes the next table."""
    N, nnz = graph.num_nodes, graph.col.numel()
    streamed = nnz * 4 + N * D * (4 + bytes_each)
    return harness.Work(
        bytes=layers * streamed, gathered=layers * nnz * D * bytes_each, table=float(N * D * bytes_each)
    )


def peers(suite: harness.Suite, graph: BipartiteGraph) -> dict[str, Callable[[Tensor], Tensor]]:
    """The differentiable ones; every matrix is built before the clock runs."""
    size, value = (graph.num_nodes, graph.num_nodes), values(graph)
    csr = torch.sparse_csr_tensor(graph.crow, graph.col.long(), value, size).to(suite.device)
    narrow = torch.sparse_csr_tensor(graph.crow.int(), graph.col, value, size).to(suite.device)
    coo = csr.to_sparse_coo().coalesce()
    return {
        "naive": partial(naive, coo),
        "torch_csr": partial(running_mean, csr),
        "torch_csr_int32": partial(running_mean, narrow),
    }


def propagation(suite: harness.Suite, name: str, graph: BipartiteGraph, D: int) -> None:
    here, others = graph.to(suite.device), peers(suite, graph)
    x = suite.tensor(graph.num_nodes, D, scale=0.1)
    matrix = scipy.sparse.csr_array((values(graph).double().numpy(), graph.col.numpy(), graph.crow.numpy()))
    matrix.resize((graph.num_nodes, graph.num_nodes))

    def exact(t: Tensor) -> Tensor:
        return scipy_mean(matrix, t.double().cpu().numpy()).to(suite.device)

    def ours(t: Tensor, **options: object) -> Tensor:
        return lightgcn_propagate(t, here, K, **options)  # type: ignore[arg-type]

    title = f"{name} D={D} K={K}"
    forward = {"ours": partial(ours, x), **{peer: partial(fn, x) for peer, fn in others.items()}}
    if suite.device.type == "cpu":
        forward["scipy_csr"] = partial(scipy_mean, matrix.astype(np.float32), x.numpy())
    suite.case(title, "fwd", x.dtype, forward, expected=lambda: exact(x), work=work(graph, D, K))
    grad = suite.tensor(graph.num_nodes, D)
    both = {"ours": harness.backward(ours, [x], grad)}
    both |= {peer: harness.backward(fn, [x], grad) for peer, fn in others.items()}
    suite.case(title, "fwd+bwd", x.dtype, both, expected=lambda: [exact(x), exact(grad)], work=work(graph, D, 2 * K))

    stored = partial(ours, storage_dtype=torch.bfloat16)
    half = {"ours": harness.backward(stored, [x], grad), "torch_csr": both["torch_csr"], "naive": both["naive"]}
    suite.case(
        f"{title} bf16 storage",
        "fwd+bwd",
        x.dtype,
        half,
        expected=lambda: [exact(x), exact(grad)],
        work=work(graph, D, 2 * K, 2),
        tolerance=1e-3,
    )

    rows = torch.cat(
        (suite.integers(0, graph.num_users, BATCH), graph.num_users + suite.integers(0, graph.num_items, 2 * BATCH))
    )
    some = suite.tensor(len(rows), D)
    spread = torch.zeros_like(x).index_add_(0, rows, some)
    trimmed = {"ours": harness.backward(partial(ours, rows=rows), [x], some)}
    trimmed |= {peer: harness.backward(lambda t, fn=fn: fn(t)[rows], [x], some) for peer, fn in others.items()}
    trimmed["ours_untrimmed"] = harness.backward(lambda t: ours(t)[rows], [x], some)
    suite.case(
        f"{title} rows={len(rows)}",
        "fwd+bwd",
        x.dtype,
        trimmed,
        expected=lambda: [exact(x)[rows], exact(spread)],
    )


def cases(suite: harness.Suite) -> None:
    if _native.backends["lightgcn_propagate"][suite.device.type] == "reference":
        suite.failures.append("compiled kernels: none here, `ours` is the reference")
    if suite.options.quick:
        propagation(suite, "power-law 50k", power_law(suite, 50_000), 64)
        small = published(suite, "ml-1m")
        if small is not None:
            propagation(suite, "ml-1m", small, 64)
        return
    for name in SPLITS:
        graph = published(suite, name)
        if graph is not None:
            for D in (64, 256):
                propagation(suite, name, graph, D)
    propagation(suite, "power-law 1M", power_law(suite, 1_000_000), 64)


if __name__ == "__main__":
    raise SystemExit(harness.main(cases, __doc__))

"""Times lightgcn_propagate against the ways LightGCN is written today.

Graphs (`graphs.py`): Gowalla and the ML-1M split of CoLLM where ../shared/data (or COLLM_FAST_TEST_DATA) has them, and
a synthetic power law of 1M and 10M edges, on a GPU 100M too. `naive` is the LightGCN-PyTorch formulation (torch.sparse
COO, K+1 tables stacked, their mean); the other peers (`propagate_peers.py`) add the layers up: `torch_csr`,
`torch_csr_int32`, `scipy_csr` (forward, on a CPU), `pyg_lgconv`, and `embedding_bag`, torch's fastest kernel for it; on
a GPU also `cusparse`, with all kept that can be kept (`cusparse.py`). They compute in float32. The case `bf16 storage`
keeps the layers of a float32 call in bfloat16, against float32 and bfloat16 peers; `rows of a batch` reads what one
training step reads; `BPR step` is that step, Adam included (`bpr_steps.py`); the cases `K=` show what memory and time
do with the number of layers. The five-process run of one graph:

    python benchmarks/bench_propagate.py --only "gowalla D=64 K=3" --processes 5 --seconds 0.5 --json FILE
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import TypeVar

import bpr_steps
import cusparse
import graphs
import harness
import propagate_peers as peers
import torch
from torch import Tensor

from collm_fast import BipartiteGraph, _native
from collm_fast.config import BPRConfig
from collm_fast.data.sampler import Batch
from collm_fast.ops import lightgcn_propagate

T = TypeVar("T")
K = 3
CONFIG = BPRConfig(num_layers=K)
# Of the peers with a gradient, those that are timed in every case.
CHOSEN = ("naive", "torch_csr", "embedding_bag")
# Above this many bytes of messages [nnz, D] PyG's layer does not fit a CPU's memory together with its gradient, and
# minutes go by with every form of torch.sparse.
LARGE = 4 << 30
# A bfloat16 rounding in each layer; see the op's documentation.
HALF_TOLERANCE = 1e-3


class Case:
    """One graph and width: inputs, what is right, and every implementation; made when a case first needs them."""

    def __init__(self, suite: harness.Suite, name: str, D: int, load: Callable[[], BipartiteGraph]) -> None:
        self.suite, self.name, self.D, self.load = suite, f"{name} D={D}", D, load
        self.title = f"{self.name} K={K}"
        self.exact = cache(self._exact)

    @cached_property
    def graph(self) -> BipartiteGraph:
        return self.load()

    @cached_property
    def here(self) -> BipartiteGraph:
        return self.graph.to(self.suite.device)

    @cached_property
    def x(self) -> Tensor:
        self.suite.reseed(f"{self.name} x")
        return self.suite.tensor(self.graph.num_nodes, self.D, scale=0.1)

    @cached_property
    def grad(self) -> Tensor:
        self.suite.reseed(f"{self.name} grad")
        return self.suite.tensor(self.graph.num_nodes, self.D)

    def _exact(self, layers: int, what: str) -> Tensor:
        return peers.exact(self.here, layers, self.x if what == "x" else self.grad)

    def truth(self, layers: int) -> list[Tensor]:
        """Of forward and backward: the operator is its own adjoint."""
        return [self.exact(layers, "x"), self.exact(layers, "grad")]

    def ours(self, x: Tensor, layers: int = K, **options: object) -> Tensor:
        return lightgcn_propagate(x, self.here, layers, **options)  # type: ignore[arg-type]

    def cusparse(self, dtype: torch.dtype) -> peers.Propagate:
        return peers.self_adjoint(cusparse.CachedCsr(self.graph, self.D, dtype, self.suite.device).multiply, K)

    def add(self, found: dict[str, T], name: str, make: Callable[[], T]) -> None:
        """A peer, or the sentence why it cannot be built here."""
        try:
            found[name] = make()
        except (ImportError, RuntimeError, ValueError) as error:
            self.suite.failures.append(f"{self.name} {name}: {error}")

    @cached_property
    def others(self) -> Mapping[str, peers.Propagate]:
        """Those with a gradient, in float32."""
        device = self.suite.device
        found = peers.differentiable(self.graph, K, device)
        messages = self.graph.col.numel() * self.D * 4
        if messages > LARGE and device.type == "cpu":
            size = f"{messages / 2**30:.1f} GiB of messages a layer"
            self.suite.failures.append(f"{self.name}: {size}, so only {', '.join(CHOSEN)} and scipy_csr")
            return {name: found[name] for name in CHOSEN}
        self.add(found, "pyg_lgconv", lambda: peers.pyg(self.graph, K, device))
        if device.type == "cuda":
            self.add(found, "cusparse", lambda: self.cusparse(torch.float32))
        return found

    @cached_property
    def others_bf16(self) -> Mapping[str, peers.Propagate]:
        """Those that keep the layers in bfloat16, and those in float32 that such storage is measured against."""
        device, wide = self.suite.device, ("naive", "torch_csr", "cusparse")
        found = {name: fn for name, fn in self.others.items() if name in wide}
        bags = peers.Bags(self.graph, torch.bfloat16, device).multiply
        found["embedding_bag_bf16"] = peers.self_adjoint(bags, K)
        if device.type == "cuda":
            self.add(found, "cusparse_bf16", lambda: self.cusparse(torch.bfloat16))
        return found

    def backward(self, fn: peers.Propagate) -> harness.Impl:
        return harness.backward(fn, [self.x], self.grad)

    def work(self, gathered_rows: float, passes: float, dtype: torch.dtype = torch.float32) -> harness.Work:
        """Rows gathered from a table [N, D] of `dtype`, and their columns; a pass reads x and writes a table."""
        N, D = self.graph.num_nodes, self.D
        streamed = gathered_rows * 4 + passes * N * D * (4 + dtype.itemsize)
        gathered = gathered_rows * D * dtype.itemsize
        return harness.Work(bytes=streamed, gathered=gathered, table=harness.Table(N, D, dtype))

    def layer_work(self, layers: int, dtype: torch.dtype = torch.float32) -> harness.Work:
        return self.work(layers * self.graph.col.numel(), layers, dtype)

    def propagation(self) -> None:
        """Forward alone, and with the gradient."""

        def forward() -> dict[str, harness.Impl]:
            impls = {name: partial(fn, self.x) for name, fn in {"ours": self.ours, **self.others}.items()}
            return impls | self.scipy()

        def both() -> dict[str, harness.Impl]:
            return {name: self.backward(fn) for name, fn in {"ours": self.ours, **self.others}.items()}

        self.suite.case(
            self.title,
            "fwd",
            torch.float32,
            forward,
            expected=lambda: self.exact(K, "x"),
            work=lambda: self.layer_work(K),
        )
        self.suite.case(
            self.title,
            "fwd+bwd",
            torch.float32,
            both,
            expected=lambda: self.truth(K),
            work=lambda: self.layer_work(2 * K),
        )

    def scipy(self) -> dict[str, harness.Impl]:
        if self.suite.device.type != "cpu":
            return {}
        found: dict[str, harness.Impl] = {}
        self.add(found, "scipy_csr", lambda: peers.scipy_csr(self.graph, K, self.x))
        return found

    def bf16_storage(self) -> None:
        """Intermediate layers in bfloat16, against peers in float32 and torch's bfloat16 kernel."""
        half = partial(self.ours, storage_dtype=torch.bfloat16)
        self.suite.case(
            f"{self.title} bf16 storage",
            "fwd",
            torch.float32,
            lambda: (
                {name: partial(fn, self.x) for name, fn in {"ours": half, **self.others_bf16}.items()} | self.scipy()
            ),
            expected=lambda: self.exact(K, "x"),
            work=lambda: self.layer_work(K, torch.bfloat16),
            tolerance=HALF_TOLERANCE,
        )
        self.suite.case(
            f"{self.title} bf16 storage",
            "fwd+bwd",
            torch.float32,
            lambda: {name: self.backward(fn) for name, fn in {"ours": half, **self.others_bf16}.items()},
            expected=lambda: self.truth(K),
            work=lambda: self.layer_work(2 * K, torch.bfloat16),
            tolerance=HALF_TOLERANCE,
        )

    @cached_property
    def batch(self) -> tuple[Batch, Tensor]:
        """One batch, users uniform as the reference draws them: in our form, and its samples as nodes [3, b]."""
        return bpr_steps.draw(self.graph, CONFIG, self.suite.device)

    def batch_work(self, more_bytes: float = 0.0, dtype: torch.dtype = torch.float32) -> harness.Work:
        """The last layer forwards and the first backwards need the batch's rows only."""
        rows = self.batch[0].rows.cpu()
        last = int((self.graph.crow[rows + 1] - self.graph.crow[rows]).sum())
        work = self.work(2.0 * ((K - 1) * self.graph.col.numel() + last), 2 * K - 2, dtype)
        return replace(work, bytes=work.bytes + more_bytes)

    def rows(self) -> None:
        """Forward and backward of a batch's rows alone."""

        @cache
        def grad() -> Tensor:
            self.suite.reseed(f"{self.name} rows")
            return self.suite.tensor(len(self.batch[0].rows), self.D)

        def expected() -> list[Tensor]:
            rows = self.batch[0].rows
            spread = torch.zeros_like(self.x, dtype=torch.float64).index_copy_(0, rows, grad().double())
            return [self.exact(K, "x")[rows], peers.exact(self.here, K, spread)]

        def impls() -> dict[str, harness.Impl]:
            rows = self.batch[0].rows
            trimmed = {"ours": harness.backward(partial(self.ours, rows=rows), [self.x], grad())}
            whole = {"ours_untrimmed": self.ours} | {name: self.others[name] for name in CHOSEN}
            return trimmed | {
                name: harness.backward(lambda x, fn=fn: fn(x)[rows], [self.x], grad()) for name, fn in whole.items()
            }

        title = f"{self.title} rows of a batch"
        self.suite.case(title, "fwd+bwd", torch.float32, impls, expected=expected, work=self.batch_work)

    def step(self, config: BPRConfig, title: str, tolerance: float | None = None) -> None:
        """One step of training at batch 2048; an epoch has num_edges / 2048 of them."""

        def impls() -> dict[str, harness.Impl]:
            batch, nodes = self.batch
            storage = getattr(torch, config.storage_dtype)
            whole = partial(self.ours, storage_dtype=storage)
            return {
                "ours": bpr_steps.ours(self.x, self.here, batch, config),
                "ours_untrimmed": bpr_steps.untrimmed(self.x, self.here, batch, config, whole),
                "naive": bpr_steps.authors(self.x, self.here, nodes, config, self.others["naive"]),
                "torch_csr": bpr_steps.authors(self.x, self.here, nodes, config, self.others["torch_csr"]),
            }

        def expected() -> list[Tensor]:
            propagate = partial(peers.exact, self.here, K)
            return bpr_steps.exact(self.x, self.here, self.batch[1], config, propagate)

        def work() -> harness.Work:
            # Adam reads the parameters, both moments and the gradient, and writes the first three.
            return self.batch_work(7.0 * self.x.nbytes, getattr(torch, config.storage_dtype))

        self.suite.case(title, "step", torch.float32, impls, expected=expected, work=work, tolerance=tolerance)

    def layers(self) -> None:
        """Ours alone from one to six layers: memory that grew with the layers would show in `peak_bytes`."""
        for k in (1, 2, 4, 5, 6):
            ours = partial(self.ours, layers=k)
            for pass_ in ("fwd", "fwd+bwd"):
                forward = pass_ == "fwd"
                self.suite.case(
                    f"{self.name} K={k}",
                    pass_,
                    torch.float32,
                    lambda ours=ours, forward=forward: {  # type: ignore[misc]
                        "ours": partial(ours, self.x) if forward else self.backward(ours)
                    },
                    expected=lambda k=k, forward=forward: (  # type: ignore[misc]
                        self.exact(k, "x") if forward else self.truth(k)
                    ),
                    work=lambda k=k, forward=forward: self.layer_work(k if forward else 2 * k),  # type: ignore[misc]
                )


def cases(suite: harness.Suite) -> None:
    if _native.backends["lightgcn_propagate"][suite.device.type] == "reference":
        suite.failures.append("compiled kernels: none here, `ours` is the reference")
    widths: dict[str, tuple[int, ...]]
    if suite.options.quick:
        widths = {"power-law 50k": (64,), "ml-1m": (64,)}
    else:
        widths = {"gowalla": (64, 256), "ml-1m": (64, 256), "power-law 1M": (64, 256), "power-law 10M": (64,)}
        if suite.device.type == "cuda":
            widths["power-law 100M"] = (64,)
    for name in graphs.available(suite, widths):
        load = cache(partial(graphs.load, suite, name))
        for D in widths[name]:
            case = Case(suite, name, D, load)
            case.propagation()
            case.bf16_storage()
            if name == "power-law 10M" and suite.device.type == "cpu":
                continue  # a step would take minutes more; growth.py times it with ours alone
            case.rows()
            case.step(CONFIG, f"{case.title} BPR step")
            case.step(replace(CONFIG, storage_dtype="bfloat16"), f"{case.title} BPR step bf16 storage", HALF_TOLERANCE)
            if name in ("gowalla", "power-law 50k") and D == 64:
                case.layers()


if __name__ == "__main__":
    raise SystemExit(harness.main(cases, __doc__))

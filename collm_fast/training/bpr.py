"""LightGCN by BPR on plain (user, item) pairs: a recommender without a language model.

A step reads and propagates for its batch's rows only. The samples are data/sampler.py, the product with the graph
collm_fast.ops.lightgcn_propagate, full-ranking evaluation collm_fast.ranking; a prepared dataset's models with early
stopping are training/cf.py. Floor F3.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from collm_fast.config import BPRConfig, to_mapping
from collm_fast.data.sampler import Batch, batches_of, sample_triples
from collm_fast.graph import BipartiteGraph
from collm_fast.io import checkpoints
from collm_fast.models.cf.mf import pair_scores
from collm_fast.ops import lightgcn_propagate
from collm_fast.training.interrupt import Stop

Evaluate = Callable[[Tensor, Tensor], Mapping[str, float]]
T = TypeVar("T")
# Batches sampled at once: enough to make the calls free, and a bound on their memory for any number of edges.
_CHUNK = 512
# How a run may go on differently from how it began.
_FREE = ("epochs", "evaluate_every", "checkpoint_every")
# splitmix64's increment: the seeds of consecutive steps differ in all their bits.
_GOLDEN = 0x9E3779B97F4A7C15

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FittedLightGCN:
    """What `fit_lightgcn` leaves: user [U, D] and item [I, D], propagated, whose products are the scores; embedding
    [N, D], the trained layer 0; history, a record an epoch (epoch, loss, seconds, and what `evaluate` gave)."""

    user: Tensor
    item: Tensor
    embedding: Tensor
    config: BPRConfig
    history: list[dict[str, float]]


def bpr_loss(scores: Tensor) -> Tensor:
    """mean softplus(s_negative - s_positive) of scores [2, b], positives first.

    Source: Rendle et al., BPR (UAI 2009), equation 4.
    """
    return F.softplus(scores[1] - scores[0]).mean()


def backward_from(nodes: Tensor, table: Tensor, batch: Batch, config: BPRConfig) -> Tensor:
    """`bpr_backward` from the propagated rows of a batch, nodes [R, D]; table.grad is None before."""
    loss = bpr_loss(pair_scores(nodes, batch.slots))
    loss.backward()
    with torch.no_grad():
        assert table.grad is not None
        # The term of the layer-0 rows touches these rows only: through autograd it would cost a table of zeros.
        own = table.index_select(0, batch.rows)
        decay = own * (batch.counts * (config.l2 / batch.slots.shape[1]))[:, None]
        loss = loss.detach() + 0.5 * (own * decay).sum(1).sum()
        table.grad.index_copy_(0, batch.rows, decay.add_(table.grad.index_select(0, batch.rows)))
    return loss


def bpr_backward(
    table: Tensor, graph: BipartiteGraph, batch: Batch, config: BPRConfig, seed: Tensor | int | None = None
) -> Tensor:
    """Leave the gradient of a batch's loss in table.grad, and return the loss.

        E = lightgcn_propagate(table),   s_ui = <E_u, E_i>
        loss = 1/b sum_(u,i,j) [softplus(s_uj - s_ui) + l2/2 (|e_u|^2 + |e_i|^2 + |e_j|^2)],   e: rows of `table`

    Only the batch's rows of E are computed: the last layer forwards and the first backwards run over their edges
    alone. The gradient equals that of the whole computation.

    Args:
        table: [N, D] leaf that requires grad; users before items. Its old gradient is dropped.
        batch: columns user, positive, negative, as nodes, on the device of the table.
        seed: of the dropped edges, where config.edge_dropout > 0.
    Returns: the loss, without a graph.
    """
    table.grad = None  # before the layers need their memory, not after
    nodes = lightgcn_propagate(
        table,
        graph,
        config.num_layers,
        storage_dtype=getattr(torch, config.storage_dtype),
        rows=batch.rows,
        dropout_p=config.edge_dropout,
        seed=seed,
    )
    return backward_from(nodes, table, batch, config)


def fit_lightgcn(
    users: Any,
    items: Any,
    num_users: int,
    num_items: int,
    config: BPRConfig | None = None,
    *,
    evaluate: Evaluate | None = None,
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> FittedLightGCN:
    """Train LightGCN by BPR as the authors' PyTorch code does, on its own recipe.

    Every epoch draws as many samples as there are edges: a user uniformly, with replacement, one of its items, and an
    item it has not (`data.sampler.sample_triples`); Adam on the loss of `bpr_backward`. Equal seeds give equal bits,
    at any number of threads, and so does a run that was interrupted and resumed; only the reported loss of batches
    above 10,000 samples is equal up to rounding.

    Args:
        users, items: [E] integer tensors, arrays or lists, in [0, num_users) and [0, num_items); duplicates count
            once.
        config: None: the recipe of the paper's Gowalla experiment.
        evaluate: called with (user [U, D], item [I, D]) after every `evaluate_every` epochs and after the last; what
            it returns goes into the history.
        folder: for checkpoints, after every `checkpoint_every` epochs, at the end and when interrupted. If it holds
            one, training goes on from there.
        device: where to train. Samples are drawn on the host, on a GPU while it works.
        progress: a bar over the epochs on stderr.
    Returns: the propagated tables, the embedding and the history.
    Raises: ValueError for bad ids, a graph without a user to sample, a checkpoint of other data or settings, and
        where training diverges; `Interrupted` (a KeyboardInterrupt) on Ctrl-C or SIGTERM, once the state is saved.
    Source: He et al., LightGCN (SIGIR 2020), section 4; github.com/gusye1234/LightGCN-PyTorch.
    """
    run = _Run(BipartiteGraph.from_interactions(users, items, num_users, num_items), config or BPRConfig(), device)
    found = None if folder is None else checkpoints.latest(Path(folder))
    if found is not None:
        run.restore(found)
    with (
        Stop() as stop,
        tqdm(total=run.config.epochs, initial=run.epoch, desc="lightgcn", unit="epoch", disable=not progress) as bar,
    ):
        while run.epoch < run.config.epochs:
            with stop.held():
                if run.train_epoch(stop):
                    run.evaluate(evaluate)
                    bar.update()
                    shown = {k: f"{v:.4f}" for k, v in run.history[-1].items() if k not in ("epoch", "seconds")}
                    bar.set_postfix(shown, refresh=False)
                if folder is not None and (stop.requested or run.is_due(run.config.checkpoint_every)):
                    run.save(Path(folder))
                stop.check()
    user, item = run.tables()
    return FittedLightGCN(user, item, run.table.detach(), run.config, run.history)


class _Run:
    """The state of a training: table, moments, place and history; `restore` undoes `save`."""

    def __init__(self, graph: BipartiteGraph, config: BPRConfig, device: torch.device | str) -> None:
        self.host_graph, self.graph, self.config = graph, graph.to(device), config
        self.device = torch.device(device)
        # Drawn on the CPU: the same start for every device. One draw also finds out whether there is any to be had.
        sample_triples(graph, 1, seed=config.seed)
        start = torch.empty(graph.num_nodes, config.dim)
        start.normal_(0.0, config.init_std, generator=torch.Generator().manual_seed(config.seed))
        self.table = start.to(self.device).requires_grad_()
        # Fused: one pass over gradient, table and moments, which takes what copying as many bytes takes.
        self.optimizer = torch.optim.Adam([self.table], lr=config.lr, fused=True)
        self.batches = -(-graph.num_edges // config.batch_size)
        self.epoch = self.batch = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    def train_epoch(self, stop: Stop) -> bool:
        """Take the steps that are left of the epoch, or fewer if `stop` is requested; whether the epoch is done."""
        began = time.perf_counter() - self.seconds
        chunks = self.chunks()
        for batches in chunks if self.device.type == "cpu" else ahead(chunks):
            for batch, seed in batches:
                self.loss += bpr_backward(self.table, self.graph, batch, self.config, seed)
                self.optimizer.step()
                self.batch += 1
                if stop.requested and self.batch < self.batches:
                    self.seconds = time.perf_counter() - began
                    return False
        loss = float(self.loss) / self.batches
        if not math.isfinite(loss):
            raise ValueError(
                f"fit_lightgcn: expected lr small enough to train with, got {self.config.lr} (epoch {self.epoch})"
            )
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        self.loss.zero_()
        self.history.append({"epoch": self.epoch, "loss": loss, "seconds": time.perf_counter() - began})
        return True

    def chunks(self) -> Iterator[Iterator[tuple[Batch, Tensor | None]]]:
        """The batches that are left of the epoch, each with the seed of its dropped edges, some hundreds at a time."""
        size, edges = self.config.batch_size, self.graph.num_edges
        for first in range(self.batch, self.batches, _CHUNK):
            count = min(_CHUNK * size, edges - first * size)
            nodes = sample_triples(
                self.host_graph, count, seed=self.config.seed, epoch=self.epoch, first_row=first * size
            )
            nodes[1:] += self.graph.num_users
            batches = batches_of(nodes, self.graph.num_nodes, size, self.device)
            yield zip(batches, self.dropout_seeds(first), strict=False)

    def dropout_seeds(self, first: int) -> Iterator[Tensor | None]:
        step = self.epoch * self.batches + first
        if self.config.edge_dropout == 0.0:
            return iter([None] * _CHUNK)
        seeds = [(self.config.seed + _GOLDEN * (step + i)) % 2**64 for i in range(_CHUNK)]
        signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
        return iter(torch.tensor(signed, device=self.device).split(1))

    def is_due(self, every: int) -> bool:
        return self.epoch % every == 0 or self.epoch == self.config.epochs

    def evaluate(self, evaluate: Evaluate | None) -> None:
        if evaluate is not None and self.is_due(self.config.evaluate_every):
            self.history[-1] |= {name: float(value) for name, value in evaluate(*self.tables()).items()}

    @torch.no_grad()
    def tables(self) -> tuple[Tensor, Tensor]:
        storage = getattr(torch, self.config.storage_dtype)
        nodes = lightgcn_propagate(self.table, self.graph, self.config.num_layers, storage_dtype=storage)
        return nodes[: self.graph.num_users], nodes[self.graph.num_users :]

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be of this run."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.host_graph.crow, self.host_graph.col):
            digest.update(tensor.numpy().data)
        settings = {name: value for name, value in to_mapping(self.config).items() if name not in _FREE}
        return {**settings, "users": self.graph.num_users, "items": self.graph.num_items, "edges": digest.hexdigest()}

    def save(self, folder: Path) -> None:
        tensors = {"table": self.table, "loss": self.loss, **self.optimizer.state[self.table]}
        place = {"epoch": self.epoch, "batch": self.batch, "seconds": self.seconds, "history": self.history}
        step = self.epoch * self.batches + self.batch
        checkpoints.save(folder, checkpoints.Checkpoint(step, tensors, {**place, "identity": self.identity()}))
        checkpoints.prune(folder, [step])

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        mine, tensors, state = self.identity(), checkpoint.tensors, checkpoint.state
        other = state.get("identity", {})
        for name, value in mine.items():
            if other.get(name) != value:
                raise ValueError(f"fit_lightgcn: expected a checkpoint with {name} {value}, got {other.get(name)}")
        begun = state["epoch"] + (state["batch"] > 0)
        if begun > self.config.epochs:
            rule = f"epochs of at least {begun}, which the checkpoint has begun"
            raise ValueError(f"fit_lightgcn: expected {rule}, got {self.config.epochs}")
        with torch.no_grad():
            self.table.copy_(tensors["table"])
            self.loss.copy_(tensors["loss"])
        # Every checkpoint follows a step, so Adam has its moments.
        kept = {name: tensors[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": {0: kept}})
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        self.history = state["history"]
        _log.info("resumed from epoch %d, batch %d of %d", self.epoch, self.batch, self.batches)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made by another thread while the one before is in use."""
    nothing = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, items, nothing)
        while (item := waiting.result()) is not nothing:
            waiting = pool.submit(next, items, nothing)
            yield item  # type: ignore[misc]

"""What one call of a training case does: optimizer steps over chosen batches, or scores of them.

AdamW runs at a learning rate of zero: all its arithmetic, and the same weights in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import harness
import numpy as np
import torch
import train_peers as peers
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_fast.data.packing import pack
from collm_fast.data.prompts import Prompts
from collm_fast.training.graphs import StepGraphs


def optimizer_of(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """What every implementation trains with."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-3)


def step(logits: peers.Logits, optimizer: torch.optim.Optimizer, rows: np.ndarray, prompts: Prompts) -> Tensor:
    """One step on these rows; returns their logits [n]. The gradients stay in the parameters."""
    out = logits(rows)
    label = torch.from_numpy(prompts.label[rows]).to(out)
    optimizer.zero_grad(set_to_none=True)
    binary_cross_entropy_with_logits(out, label).backward()
    optimizer.step()
    return out.detach()


def steps(
    logits: peers.Logits, parameters: Sequence[Tensor], plan: Sequence[np.ndarray], prompts: Prompts
) -> harness.Impl:
    """A call that makes one optimizer step for each batch of the plan.

    Returns: a function that gives the logits [n], in the order of the rows' numbers, and the summed gradients.
    """
    return _summed(lambda rows, optimizer: step(logits, optimizer, rows, prompts), parameters, plan)


def _summed(
    take: Callable[[np.ndarray, torch.optim.Optimizer], Tensor],
    parameters: Sequence[Tensor],
    plan: Sequence[np.ndarray],
) -> harness.Impl:
    optimizer = optimizer_of(parameters)
    place = {row: number for number, row in enumerate(sorted(np.concatenate(plan).tolist()))}

    def run() -> list[Tensor]:
        found = torch.empty(len(place))
        total: list[Tensor] = []
        for rows in plan:
            found[[place[row] for row in rows.tolist()]] = take(rows, optimizer).cpu()
            grads = [parameter.grad.float() for parameter in parameters]
            total = [a.add_(b) for a, b in zip(total, grads, strict=True)] if total else [g.clone() for g in grads]
        return [found, torch.cat([grad.flatten() for grad in total]).cpu()]

    return run


def graph_steps(
    graphs: StepGraphs, parameters: Sequence[Tensor], plan: Sequence[np.ndarray], prompts: Prompts
) -> harness.Impl:
    """`steps` with forward and backward as captured graphs; the first two calls of a shape are slow."""

    def passes(rows: np.ndarray, optimizer: torch.optim.Optimizer) -> Tensor:
        graphs.attach()  # other implementations train the same parameters
        optimizer.zero_grad(set_to_none=False)
        out = graphs.add_gradient(pack(prompts, rows), 1.0).logits
        optimizer.step()
        return out

    return _summed(passes, parameters, plan)


def typical(prompts: Prompts, plan: Sequence[np.ndarray], count: int, size: int) -> list[np.ndarray]:
    """The `count` batches nearest to the mean in tokens, in tokens of their trees and in tokens padded to the longest.

    A step of the naive way takes seconds: a few drawn blindly would differ from an epoch by more than the timing does.
    """
    lengths = np.diff(prompts.offsets)
    sizes = np.array(
        [[lengths[r].sum(), len(pack(prompts, r).token_ids), lengths[r].max() * len(r)] for r in plan], np.float64
    )
    full = np.array([len(rows) == size for rows in plan])
    far = np.abs(sizes / sizes[full].mean(0) - 1).max(1)
    far[~full] = np.inf  # an epoch's last batch may be smaller
    return [plan[place] for place in np.sort(np.argsort(far, kind="stable")[:count])]


def scores(logits: peers.Logits, plan: Sequence[np.ndarray]) -> harness.Impl:
    """A call that gives the logits [n] of the plan's rows, in the order of their numbers, without gradients."""
    order = torch.from_numpy(np.argsort(np.concatenate(plan)))

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat([logits(rows).cpu() for rows in plan])[order]

    return run


def typical_groups(prompts: Prompts, count: int) -> np.ndarray:
    """Rows, in order, of random whole (user, history) groups until `count` are reached.

    Of 32 draws the one that shares as much of its tokens as the draws do on average: few groups differ much in that.
    """
    lengths, names = np.diff(prompts.offsets), np.unique(prompts.group)
    sizes = np.bincount(prompts.group)
    draws, shares = [], []
    for seed in range(32):
        order = np.random.default_rng(seed).permutation(names)
        chosen = order[: int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1]
        draws.append(np.flatnonzero(np.isin(prompts.group, chosen)))
        shares.append(len(pack(prompts, draws[-1]).token_ids) / lengths[draws[-1]].sum())
    return draws[int(np.argmin(np.abs(np.array(shares) - np.mean(shares))))]

"""Scoring with the language model, and from scores to the rows of metrics.json: metrics, intervals, warm and cold.

The metrics themselves live in `metrics.py`, the scores that need no learning in `baselines.py`. Floor F3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from collm_fast import metrics
from collm_fast.data.packing import batches, pack
from collm_fast.data.prompts import Prompts
from collm_fast.models.collm import CoLLM
from collm_fast.ops import check_device_errors

BOOTSTRAP_SAMPLES = 1000


@torch.no_grad()
def score_prompts(
    model: CoLLM,
    prompts: Prompts,
    *,
    tokens_per_batch: int,
    pairs: bool = False,
    progress: str | None = None,
    check: Callable[[], None] | None = None,
) -> NDArray[np.float32]:
    """The answer's logit of every prompt, [n] float32 in the prompts' order; P(yes) is its sigmoid.

    Rows of one (user, history) stay together and share their prefix; a batch holds about `tokens_per_batch` packed
    tokens. Nothing is drawn at random. `progress` names a progress bar; `check` is called before every batch and may
    raise to give up.
    """
    logits = np.empty(len(prompts.label), np.float32)
    training = model.training
    model.eval()
    plan = batches(prompts, order="group", max_tokens=tokens_per_batch)
    try:
        with tqdm(total=logits.size, desc=progress, unit="prompt", disable=progress is None, leave=False) as bar:
            for rows in plan:
                if check is not None:
                    check()
                batch = pack(prompts, rows, pairs=pairs)
                logits[batch.row.numpy()] = model(batch).float().cpu().numpy()
                bar.update(rows.size)
        check_device_errors(synchronize=True)
    finally:
        model.train(training)
    return logits


def sigmoid(logit: ArrayLike) -> NDArray[np.float64]:
    """1 / (1 + exp(-logit)) in float64, without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(logit, np.float64))))


def metric_table(
    uid: ArrayLike,
    score: ArrayLike,
    probability: ArrayLike | None,
    label: ArrayLike,
    warm: ArrayLike,
    seed: int = 0,
) -> dict[str, dict[str, float | int | None]]:
    """The metrics of one model on one split, as metrics.json holds them.

    Args:
        uid:         [n] integer user ids.
        score:       [n] float, finite; ranks the rows.
        probability: [n] float in [0, 1] for the log loss; None where the model has none.
        label:       [n] 0 or 1.
        warm:        [n] bool; see `data.warm_mask`.
        seed:        of the user bootstrap.
    Returns: {"all" | "warm" | "cold": {"auc", "auc_low", "auc_high", "uauc", "uauc_low", "uauc_high",
        "users_counted", "ndcg", "log_loss", "rows"}}; None where a value does not exist. The intervals are 95 %
        percentile intervals over resampled users, `users_counted` are the users with both classes (UAUC's), NDCG
        is over each user's full list.
    Raises: ValueError as `metrics`, or for a mask of another length.
    """
    users, scores, labels, mask = np.asarray(uid), np.asarray(score), np.asarray(label), np.asarray(warm)
    if mask.dtype != np.bool_ or mask.shape != scores.shape:
        raise ValueError(f"metric_table: expected warm of {scores.shape} bool, got {mask.shape} {mask.dtype}")
    p = None if probability is None else np.asarray(probability)
    table = {}
    for name, rows in (("all", np.ones_like(mask)), ("warm", mask), ("cold", ~mask)):
        table[name] = _metrics(users[rows], scores[rows], None if p is None else p[rows], labels[rows], seed)
    return table


def _metrics(
    users: NDArray[np.int64],
    scores: NDArray[np.float64],
    probability: NDArray[np.float64] | None,
    labels: NDArray[np.int64],
    seed: int,
) -> dict[str, float | int | None]:
    by_user = metrics.uauc(users, scores, labels)
    interval = metrics.bootstrap(users, scores, labels, samples=BOOTSTRAP_SAMPLES, seed=seed)
    return {
        "auc": _number(metrics.auc(scores, labels).value),
        "auc_low": _number(interval.auc.low),
        "auc_high": _number(interval.auc.high),
        "uauc": _number(by_user.value),
        "uauc_low": _number(interval.uauc.low),
        "uauc_high": _number(interval.uauc.high),
        "users_counted": by_user.users_counted,
        "ndcg": _number(metrics.ndcg(users, scores, labels).value),
        "log_loss": None if probability is None else _number(metrics.log_loss(probability, labels).value),
        "rows": int(scores.size),
    }


def _number(value: float) -> float | None:
    """JSON has no nan: a value that does not exist is null."""
    return None if math.isnan(value) else value

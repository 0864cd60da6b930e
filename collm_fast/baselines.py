"""Scores that need no learning: what any recommender must beat. Floor F3.

On MovieLens-1M the two of them together already reach what CoLLM reports for its language model with MF, so every
report shows them beside its rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.dataset import Split

# Pseudo-rows of the global mean that every id starts with.
SMOOTHING = 5.0


def item_mean(train: Split, split: Split) -> NDArray[np.float64]:
    """The smoothed share of likes among the item's train rows: a probability.

        p_i = (likes_i + k g) / (rows_i + k),   g = share of likes in train, k = 5

    Args: train: where rows are counted; split: the rows to score. An item without train rows gets g.
    Returns: [len(split)] float64 in [0, 1].
    Raises: ValueError for an empty train split.
    """
    return _smoothed_mean("item_mean", train.iid, train.label, split.iid)


def item_user_mean(train: Split, split: Split) -> NDArray[np.float64]:
    """Item mean and user mean added as logits, less the global one: a logit.

        logit(p_i) + logit(p_u) - logit(g)

    Args: train: where rows are counted; split: the rows to score.
    Returns: [len(split)] float64; finite unless train has one class only, which clips to +-36.
    Raises: ValueError for an empty train split.
    """
    item = _smoothed_mean("item_user_mean", train.iid, train.label, split.iid)
    user = _smoothed_mean("item_user_mean", train.uid, train.label, split.uid)
    return _logit(item) + _logit(user) - float(_logit(np.asarray(train.label.mean())))


def _smoothed_mean(
    op: str, ids: NDArray[np.int64], label: NDArray[np.int64], wanted: NDArray[np.int64]
) -> NDArray[np.float64]:
    if ids.size == 0:
        raise ValueError(f"{op}: expected rows in train, got none")
    size = int(max(ids.max(), wanted.max(initial=0))) + 1
    rows = np.bincount(ids, minlength=size)
    likes = np.bincount(ids, weights=label, minlength=size)
    mean = (likes + SMOOTHING * label.mean()) / (rows + SMOOTHING)
    return np.asarray(mean[wanted])


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(p, 2.0**-52, 1.0 - 2.0**-52)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))

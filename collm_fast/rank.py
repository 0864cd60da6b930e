"""The order of scored candidates. Scoring them is `run.py`'s matter. Floor F3."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Ranked(NamedTuple):
    """One candidate and its P(yes)."""

    item: Any
    score: float


def best_first(items: NDArray[Any], score: ArrayLike, top_k: int | None = None) -> list[Ranked]:
    """The `top_k` candidates (None: all) by falling score; ties keep the order in which they were given.

    Raises: ValueError for no or repeated candidates, unequal lengths, or top_k below 1.
    """
    scores = np.asarray(score, np.float32)
    if top_k is not None and top_k < 1:
        raise ValueError(f"rank: expected top_k at least 1, got {top_k}")
    if items.ndim != 1 or items.shape != scores.shape:
        raise ValueError(f"rank: expected one score for each candidate, got {scores.shape} and {items.shape}")
    if items.size == 0:
        raise ValueError("rank: expected at least one candidate, got none")
    values, counts = np.unique(items, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"rank: expected every candidate once, got {values[counts > 1][0].item()!r} repeated")
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Ranked(items[place].item(), float(scores[place])) for place in order]

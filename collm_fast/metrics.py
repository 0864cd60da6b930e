"""AUC, UAUC, NDCG, log loss and their user-bootstrap intervals, in numpy alone.

Everything is vectorised: a million rows take about a second. Which rows are scored and how a table is made of the
numbers is `evaluate.py`'s matter. Floor F0: imports numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Probabilities are clipped to [EPSILON, 1 - EPSILON]: a float32 sigmoid saturates to 1.0 near a logit of 17.
EPSILON = 1e-7


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve; `value` is nan where a class is missing."""

    value: float
    positives: int
    negatives: int


@dataclass(frozen=True)
class UserAUC:
    """Mean of the users' AUC; `value` is nan where no user has both classes."""

    value: float
    users_counted: int
    users_skipped: int


@dataclass(frozen=True)
class NDCG:
    """Mean of the users' NDCG; `value` is nan where no user has a positive."""

    value: float
    users_counted: int
    users_skipped: int


@dataclass(frozen=True)
class LogLoss:
    """Mean binary cross-entropy in nats; `value` is nan without rows."""

    value: float
    rows: int


@dataclass(frozen=True)
class Interval:
    """A central bootstrap interval; both ends are nan where no resample has a value."""

    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Intervals of AUC and UAUC over the same resampled users."""

    auc: Interval
    uauc: Interval
    samples: int


def auc(score: ArrayLike, label: ArrayLike) -> AUC:
    """Probability that a random positive scores above a random negative.

        auc = P(score+ > score-) + P(score+ = score-) / 2

    Args:
        score: [n] float, finite; higher means more liked. Ties count one half.
        label: [n] 0 or 1.
    Returns: AUC(value, positives, negatives); value is nan if a class is missing.
    Raises: ValueError for unequal lengths, a non-finite score or a label outside {0, 1}.
    Source: Hanley and McNeil, Radiology 143 (1982); the Mann-Whitney form.
    """
    scores, labels = _check("auc", score, label)
    if scores.size == 0:
        return AUC(float("nan"), 0, 0)
    value, positives, negatives = _grouped_auc(np.zeros(scores.size, np.int64), scores, labels)
    return AUC(float(value[0]), int(positives[0]), int(negatives[0]))


def uauc(user: ArrayLike, score: ArrayLike, label: ArrayLike) -> UserAUC:
    """Mean per-user AUC over the users that have both classes.

        uauc = mean_u AUC(score[user == u], label[user == u])

    Args:
        user:  [n] integer ids.
        score: [n] float, finite; higher means more liked. Ties count one half.
        label: [n] 0 or 1.
    Returns: UserAUC(value, users_counted, users_skipped); value is nan only if no user counts.
    Raises: ValueError for unequal lengths, a non-finite score or a label outside {0, 1}.
    Source: CoLLM (arXiv 2310.19488), section 5.1.
    """
    scores, labels = _check("uauc", score, label)
    users, _ = _dense("uauc", user, scores.size)
    value, _, _ = _grouped_auc(users, scores, labels)
    counted = ~np.isnan(value)
    mean = float(value[counted].mean()) if counted.any() else float("nan")
    return UserAUC(mean, int(counted.sum()), int((~counted).sum()))


def ndcg(
    user: ArrayLike, score: ArrayLike, label: ArrayLike, k: int | None = None, *, both_classes: bool = False
) -> NDCG:
    """Mean per-user NDCG with binary gains, over each user's full list of rows (or its first k places).

        ndcg = mean_u DCG(u) / IDCG(u),   DCG(u) = sum_{place r = 1..k} label_r / log2(r + 1)

    Users without a positive are skipped; a user with only positives counts 1, or is skipped too with `both_classes`.
    Rows of one score share the mean discount of their places, so the value does not depend on the order of the rows.

    Args:
        user:  [n] integer ids.
        score: [n] float, finite; higher means more liked.
        label: [n] 0 or 1.
        k:     places that count; None for the whole list.
        both_classes: count the users of `uauc` only. CoLLM's published values agree with this form: its MF and
               LightGCN give .845 and .854 on MovieLens-1M this way (published .845 and .856), .88 and .89 otherwise.
    Returns: NDCG(value, users_counted, users_skipped); value is nan only if no user counts.
    Raises: ValueError for unequal lengths, a non-finite score, a label outside {0, 1} or k below 1.
    Source: CoLLM (arXiv 2310.19488), section 5.1; ties as McSherry and Najork (ECIR 2008).
    """
    scores, labels = _check("ndcg", score, label)
    users, _ = _dense("ndcg", user, scores.size)
    if k is not None and k < 1:
        raise ValueError(f"ndcg: expected k to be at least 1 or None, got {k}")
    if users.size == 0:
        return NDCG(float("nan"), 0, 0)
    order = np.lexsort((-scores, users))
    users, scores, labels = users[order], scores[order], labels[order]
    first = _starts(users)
    count = np.diff(np.append(first, users.size))
    place = np.arange(users.size) - np.repeat(first, count)
    discount = 1.0 / np.log2(place + 2.0)
    if k is not None:
        discount[place >= k] = 0.0
    tie = np.flatnonzero(np.r_[True, (users[1:] != users[:-1]) | (scores[1:] != scores[:-1])])
    size = np.diff(np.append(tie, users.size))
    shared = np.repeat(np.add.reduceat(discount, tie) / size, size)
    dcg = np.add.reduceat(shared * labels, first)
    positives = np.add.reduceat(labels, first)
    ideal = np.add.reduceat(np.where(place < np.repeat(positives, count), discount, 0.0), first)
    counted = (positives > 0) & ((positives < count) | (not both_classes))
    mean = float((dcg[counted] / ideal[counted]).mean()) if counted.any() else float("nan")
    return NDCG(mean, int(counted.sum()), int((~counted).sum()))


def log_loss(probability: ArrayLike, label: ArrayLike) -> LogLoss:
    """Mean binary cross-entropy, in nats, of probabilities clipped to [1e-7, 1 - 1e-7].

        log_loss = -mean(label log p + (1 - label) log(1 - p))

    Args:
        probability: [n] float in [0, 1].
        label:       [n] 0 or 1.
    Returns: LogLoss(value, rows); value is nan if there are no rows.
    Raises: ValueError for unequal lengths, a probability outside [0, 1] or a label outside {0, 1}.
    Source: Good, Rational decisions (JRSS B 14, 1952).
    """
    p, labels = _check("log_loss", probability, label)
    outside = np.flatnonzero((p < 0.0) | (p > 1.0))
    if outside.size:
        raise ValueError(f"log_loss: expected probability in [0, 1], got {p[outside[0]]} at row {outside[0]}")
    if p.size == 0:
        return LogLoss(float("nan"), 0)
    right = np.clip(np.where(labels == 1, p, 1.0 - p), EPSILON, 1.0 - EPSILON)
    return LogLoss(float(-np.log(right).mean()), p.size)


def bootstrap(
    user: ArrayLike, score: ArrayLike, label: ArrayLike, *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Bootstrap:
    """Percentile intervals of AUC and UAUC under resampling of whole users.

    A resample draws as many users as there are, with replacement, and takes each user's rows as often as it was
    drawn: rows of one user depend on each other, so resampling rows would give intervals that are too narrow.
    Resamples without a value (a class or every two-class user missing) are left out.

    Args:
        user, score, label: as for `uauc`.
        samples: number of resamples, at least 1.
        level:   coverage in (0, 1).
        seed:    of numpy's default generator; equal arguments give equal bits.
    Returns: Bootstrap(auc, uauc, samples), each an Interval(low, high).
    Raises: ValueError as `uauc`, and for samples or level out of range.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 8.5 and 13.3.
    """
    scores, labels = _check("bootstrap", score, label)
    users, num_users = _dense("bootstrap", user, scores.size)
    if samples < 1:
        raise ValueError(f"bootstrap: expected samples to be at least 1, got {samples}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"bootstrap: expected level in (0, 1), got {level}")
    if num_users == 0:
        return Bootstrap(Interval(float("nan"), float("nan")), Interval(float("nan"), float("nan")), samples)
    per_user, _, _ = _grouped_auc(users, scores, labels)
    counted = ~np.isnan(per_user)
    filled = np.where(counted, per_user, 0.0)
    order = np.argsort(scores, kind="stable")
    users, labels = users[order], labels[order]
    tie = _starts(scores[order])
    rng = np.random.default_rng(seed)
    resampled = np.full((2, samples), np.nan)
    for s in range(samples):
        weight = np.bincount(rng.integers(num_users, size=num_users), minlength=num_users).astype(np.float64)
        resampled[0, s] = _weighted_auc(weight[users], labels, tie)
        total = weight[counted].sum()
        resampled[1, s] = weight @ filled / total if total > 0 else np.nan
    return Bootstrap(_interval(resampled[0], level), _interval(resampled[1], level), samples)


def _weighted_auc(weight: FloatArray, labels: IntArray, tie: IntArray) -> float:
    """AUC of rows sorted by score whose ties start at `tie`, each row counted `weight` times; nan without a class."""
    positive = np.add.reduceat(weight * labels, tie)
    negative = np.add.reduceat(weight, tie) - positive
    pairs = positive.sum() * negative.sum()
    return float(positive @ (np.cumsum(negative) - 0.5 * negative) / pairs) if pairs > 0 else float("nan")


def _grouped_auc(group: IntArray, scores: FloatArray, labels: IntArray) -> tuple[FloatArray, IntArray, IntArray]:
    """AUC (nan without both classes), positives and negatives of each group 0..G-1; groups are dense."""
    if group.size == 0:
        return np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.lexsort((scores, group))
    group, scores, labels = group[order], scores[order], labels[order]
    first = _starts(group)
    count = np.diff(np.append(first, group.size))
    tie = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]) | (scores[1:] != scores[:-1])])
    size = np.diff(np.append(tie, group.size))
    # Mean rank of the tie inside its group, from 1.
    rank = np.repeat(tie + (size + 1) / 2.0, size) - np.repeat(first, count)
    positives = np.add.reduceat(labels, first)
    negatives = count - positives
    wins = np.add.reduceat(rank * labels, first) - positives * (positives + 1) / 2.0
    pairs = positives * negatives.astype(np.float64)
    value = np.full(first.size, np.nan)
    np.divide(wins, pairs, out=value, where=pairs > 0)
    return value, positives, negatives


def _starts(sorted_values: NDArray[Any]) -> IntArray:
    """Where each run of equal values begins; `sorted_values` is not empty."""
    return np.flatnonzero(np.r_[True, sorted_values[1:] != sorted_values[:-1]])


def _interval(values: FloatArray, level: float) -> Interval:
    defined = values[~np.isnan(values)]
    if defined.size == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _check(op: str, score: ArrayLike, label: ArrayLike) -> tuple[FloatArray, IntArray]:
    """Validated float64 scores and int64 labels."""
    scores, labels = np.asarray(score), np.asarray(label)
    name = "probability" if op == "log_loss" else "score"
    if scores.ndim != 1 or labels.ndim != 1:
        raise ValueError(f"{op}: expected {name} and label of shape [n], got {scores.shape} and {labels.shape}")
    if scores.size != labels.size:
        raise ValueError(f"{op}: expected {name} and label of equal length, got {scores.size} and {labels.size}")
    for what, array in ((name, scores), ("label", labels)):
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{op}: expected {what} of real numbers, got dtype {array.dtype}")
    scores = scores.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(f"{op}: expected finite {name}, got {scores[bad[0]]} at row {bad[0]}")
    bad = np.flatnonzero((labels != 0) & (labels != 1))
    if bad.size:
        raise ValueError(f"{op}: expected label in {{0, 1}}, got {labels[bad[0]]} at row {bad[0]}")
    return scores, labels.astype(np.int64)


def _dense(op: str, user: ArrayLike, rows: int) -> tuple[IntArray, int]:
    """User ids as 0..G-1, and G."""
    users = np.asarray(user)
    if users.ndim != 1 or users.size != rows:
        raise ValueError(f"{op}: expected user of shape [{rows}], one a row, got {list(users.shape)}")
    if users.size and users.dtype.kind not in "iu":
        raise ValueError(f"{op}: expected user of integer ids, got dtype {users.dtype}")
    distinct, dense = np.unique(users, return_inverse=True)
    return dense.reshape(-1).astype(np.int64), distinct.size

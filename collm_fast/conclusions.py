"""Plain sentences about a run that claim no more than their intervals allow. Layout is `report.py`'s. Floor F3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = {
    "item_mean": "the item mean",
    "item_user_mean": "item mean + user mean",
    "cf": "the collaborative model alone",
    "stage1": "stage 1 (text only)",
    "stage2": "stage 2 (CoLLM)",
}


def row_name(row: str) -> str:
    """A row of the table in words."""
    if row.startswith("logistic"):
        return "a logistic regression on the same inputs, without a language model"
    return NAMES.get(row, f"stage 2 with {row.removeprefix('stage2')}")


@dataclass(frozen=True)
class Difference:
    """AUC(a) - AUC(b) on the same rows and its 95 % interval over resampled users; nan where a class is missing."""

    value: float
    low: float
    high: float


def auc_difference(
    user: NDArray[np.int64],
    score_a: NDArray[np.float64],
    score_b: NDArray[np.float64],
    label: NDArray[np.int64],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Paired difference of two AUCs under resampling of whole users.

    The two scores are compared on the same resamples, so what both find hard cancels: the interval is usually much
    narrower than two separate intervals suggest.
    """
    users = np.unique(user, return_inverse=True)[1].reshape(-1)
    count = int(users.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    first, second = _WeightedAUC(score_a, label), _WeightedAUC(score_b, label)
    value = first(np.ones(label.size)) - second(np.ones(label.size))
    drawn = np.full(samples, np.nan)
    for sample in range(samples if count else 0):
        weight = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)[users]
        drawn[sample] = first(weight) - second(weight)
    defined = drawn[~np.isnan(drawn)]
    low, high = np.quantile(defined, [0.025, 0.975]) if defined.size else (np.nan, np.nan)
    return Difference(float(value), float(low), float(high))


class _WeightedAUC:
    """AUC of fixed scores under changing row weights: the sorting is done once."""

    def __init__(self, score: NDArray[np.float64], label: NDArray[np.int64]) -> None:
        self.order = np.argsort(score, kind="stable")
        ranked = score[self.order]
        self.label = label[self.order].astype(np.float64)
        self.tie = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if score.size else np.empty(0, np.int64)

    def __call__(self, weight: NDArray[np.float64]) -> float:
        if not self.tie.size:
            return float("nan")
        weight = weight[self.order]
        positive = np.add.reduceat(weight * self.label, self.tie)
        negative = np.add.reduceat(weight * (1.0 - self.label), self.tie)
        pairs = positive.sum() * negative.sum()
        return float(positive @ (np.cumsum(negative) - 0.5 * negative) / pairs) if pairs > 0 else float("nan")


def compare(row: str, other: str, difference: Difference) -> str:
    """One sentence on two rows."""
    if np.isnan(difference.low):
        return f"{_start(row)} and {row_name(other)} cannot be compared: a class is missing in the test rows."
    text = f"{difference.value:+.3f} AUC [{difference.low:+.3f}, {difference.high:+.3f}]"
    if difference.low > 0:
        return f"{_start(row)} ranks above {row_name(other)}: {text}."
    if difference.high < 0:
        return f"{_start(row)} ranks below {row_name(other)}: {text}."
    return f"{_start(row)} cannot be told from {row_name(other)} on these rows: {text} contains zero."


def against_chance(row: str, table: Mapping[str, Any]) -> str:
    """Whether a row's AUC interval excludes one half."""
    low, high = table["auc_low"], table["auc_high"]
    if low is None:
        return f"{_start(row)} has no AUC on these rows."
    text = f"AUC {table['auc']:.3f} [{low:.3f}, {high:.3f}]"
    if low > 0.5:
        return f"{_start(row)} ranks better than chance: {text}."
    if high < 0.5:
        return f"{_start(row)} ranks worse than chance: {text}."
    return f"{_start(row)} is at chance: {text} contains 0.5."


def stage_drop(record: Mapping[str, Any], row: str) -> str | None:
    """A sentence where stage 2 ends below stage 1 in validation AUC, else None."""
    first, second = record.get("stage1"), record.get(row)
    if not first or not second or second["best_auc"] >= first["best_auc"]:
        return None
    values = f"{second['best_auc']:.3f} against {first['best_auc']:.3f}"
    return (
        f"{_start(row)} ends below stage 1 in validation AUC: {values}; "
        "use stage 1, or give stage 2 more rows or a lower learning rate."
    )


def no_gain(record: Mapping[str, Any], row: str) -> str | None:
    """A sentence where training did not raise the validation AUC, else None."""
    stage = record.get(row)
    if not stage or stage.get("steps") == 0:
        return None
    # The state before the first step was scored on the sample where there was one: like is compared with like.
    kept = stage.get("interim", {}).get("auc", stage["best_auc"])
    if kept > stage["first_auc"]:
        return None
    return (
        f"Training did not raise the validation AUC of {row_name(row)}: {stage['first_auc']:.3f} before the first "
        f"step, {kept:.3f} in the kept state."
    )


def conclusions(
    metrics: Mapping[str, Any],
    stages: Mapping[str, Any],
    scores: Mapping[str, NDArray[np.float64]],
    user: NDArray[np.int64],
    label: NDArray[np.int64],
) -> list[str]:
    """Sentences on every row that the language model has in the test table; `scores` may hold controls as well."""
    sentences = []
    for row in (row for row in scores if row.startswith("stage")):
        sentences.append(against_chance(row, metrics[row]["test"]["all"]))
        others = ["stage1"] if row != "stage1" else []
        others += ["cf", "item_user_mean"] + (["stage2"] if row.startswith("stage2+") else [])
        others += [row.replace("stage2", "logistic")] if row != "stage1" else []
        for other in (other for other in others if other in scores):
            sentences.append(compare(row, other, auc_difference(user, scores[row], scores[other], label)))
        drop = stage_drop(stages, row) if row != "stage1" else None
        sentences += [sentence for sentence in (no_gain(stages, row), drop) if sentence]
    return sentences


def _start(row: str) -> str:
    name = row_name(row)
    return name[0].upper() + name[1:]

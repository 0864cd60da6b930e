"""Scores of a run on disk: predictions/<split>.parquet and the rows of metrics.json. Floor F3."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collm_fast.baselines import item_mean, item_user_mean
from collm_fast.data.dataset import Dataset, Split
from collm_fast.evaluate import metric_table, sigmoid
from collm_fast.io.run_folder import RunFolder
from collm_fast.io.tables import read_table, write_table
from collm_fast.models.cf.frozen import CFModel

# A row's scores, and its probabilities where it has any.
Scores = tuple[NDArray[Any], NDArray[np.float64] | None]


def baseline_scores(dataset: Dataset, split: Split, cf: CFModel) -> dict[str, Scores]:
    """The rows of the table that need no language model, on the rows of `split`."""
    train = dataset.splits["train"]
    logits = cf.score(split.uid, split.iid)
    item, both = item_mean(train, split), item_user_mean(train, split)
    return {
        "item_mean": (item, item),
        "item_user_mean": (both, sigmoid(both)),
        "cf": (logits, sigmoid(logits)),
    }


def table_of(split: Split, scores: Scores, seed: int) -> dict[str, dict[str, float | int | None]]:
    """The entry of metrics.json for one row and split."""
    return metric_table(split.uid, scores[0], scores[1], split.label, split.not_cold, seed=seed)


def add_scores(
    folder: RunFolder, dataset: Dataset, name: str, split: Split, row: str, scores: Scores, *, seed: int
) -> None:
    """Put one row's scores of the split `name` into its predictions file and into metrics.json."""
    path = folder.path / "predictions" / f"{name}.parquet"
    columns = read_table(path, ["uid"], "predictions") if path.is_file() else _identity(dataset, split)
    if not np.array_equal(columns["uid"], split.uid):
        raise ValueError(f"{path}: expected the {len(split)} rows of this run, got {len(columns['uid'])} others")
    columns[f"score:{row}"] = np.asarray(scores[0], np.float64)
    if scores[1] is not None:
        columns[f"probability:{row}"] = scores[1]
    write_table(path, columns)
    folder.add_metrics(row, name, table_of(split, scores, seed))


def _identity(dataset: Dataset, split: Split) -> dict[str, NDArray[Any]]:
    train = dataset.splits["train"]
    return {
        "uid": split.uid,
        "user": dataset.raw_users[split.uid],
        "item": dataset.raw_items[split.iid],
        "label": split.label,
        "warm": split.not_cold,
        "user_train_rows": np.bincount(train.uid, minlength=dataset.num_users)[split.uid],
        "item_train_rows": np.bincount(train.iid, minlength=dataset.num_items)[split.iid],
    }


def logistic_scores(train: ArrayLike, label: ArrayLike, test: ArrayLike, ridge: float = 1.0) -> NDArray[np.float64]:
    """Logits of a ridge-regularised logistic regression on standardised columns, by Newton's method.

        min_w  sum_i log(1 + exp(-(2 label_i - 1) (x_i w + b))) + ridge/2 |w|^2

    Args:
        train: [n, k] features; label: [n] 0 or 1; test: [m, k].
    Returns: [m] float64.
    Source: McCullagh and Nelder, Generalized Linear Models (1989), section 4.4.
    """
    x, y, z = np.asarray(train, np.float64), np.asarray(label, np.float64), np.asarray(test, np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x = np.c_[(x - mean) / scale, np.ones(len(x))]
    z = np.c_[(z - mean) / scale, np.ones(len(z))]
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 1e-6  # the intercept is free, up to what keeps one class finite
    weight = np.zeros(x.shape[1])
    for _ in range(50):
        p = sigmoid(x @ weight)
        gradient = x.T @ (p - y) + penalty * weight
        curvature = (x * np.maximum(p * (1 - p), 1e-9)[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weight -= step
        if np.abs(step).max() < 1e-9:
            break
    return np.asarray(z @ weight)


def controls(
    cf: CFModel, statistics: tuple[NDArray[Any], NDArray[Any]], train: Split, test: Split, *, seed: int
) -> dict[str, dict[str, Any]]:
    """How far a linear reading of the mapper's inputs gets without a language model, fitted to stage 2's rows.

    Returns: {"what is read": the `all` metrics on the test rows}.
    """
    user, item = cf.user.numpy(), cf.item.numpy()

    def features(split: Split, parts: str) -> NDArray[Any]:
        u, i = user[split.uid], item[split.iid]
        columns = {
            "embedding": np.c_[u, i],
            "pair": np.c_[u * i],
            "statistics": np.c_[statistics[0][split.uid], statistics[1][split.iid]],
        }
        return np.concatenate([columns[part] for part in parts.split(", ")], axis=1)

    tables = {}
    for parts in ("embedding", "pair", "statistics", "statistics, pair"):
        logits = logistic_scores(features(train, parts), train.label, features(test, parts), ridge=10.0)
        tables[f"logistic regression on: {parts}"] = table_of(test, (logits, sigmoid(logits)), seed)["all"]
    return tables

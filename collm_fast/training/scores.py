"""Scores of a run on disk: predictions/<split>.parquet and the rows of metrics.json. Floor F3."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        "cf": (logits, sigmoid(logits) if cf.calibrated else None),
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


def add_controls(folder: RunFolder, split: Split, found: dict[str, NDArray[np.float64]], *, seed: int) -> None:
    """Put logits of further models without a language model beside the test rows' scores, and into run.json."""
    path = folder.path / "predictions" / "test.parquet"
    columns = read_table(path, ["uid"], "predictions")
    write_table(path, {**columns, **{f"control:{name}": logits for name, logits in found.items()}})
    tables = {name: table_of(split, (logits, sigmoid(logits)), seed)["all"] for name, logits in found.items()}
    folder.update(controls=tables)

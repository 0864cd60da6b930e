"""From a file of (user, item) pairs to a LightGCN's embeddings and recommendations, with the ids of the file.

What `collm-fast fit-lightgcn` does. The training itself is training/bpr.py; prepared datasets with labels, texts and
times are training/cf.py's matter. Floor F3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.config import BPRConfig, to_mapping
from collm_fast.io.atomic import write_atomic
from collm_fast.io.tables import read_table, write_table
from collm_fast.ranking import Lists, full_ranking, top_items
from collm_fast.training.bpr import fit_lightgcn

Ids = NDArray[Any]
FILES = ("users.parquet", "items.parquet", "recommendations.parquet", "config.yaml", "metrics.json")


@dataclass(frozen=True, eq=False)
class Pairs:
    """(user, item) pairs as positions in `user_ids` and `item_ids`, and pairs held out from training."""

    user_ids: Ids
    item_ids: Ids
    users: NDArray[np.int64]
    items: NDArray[np.int64]
    held_out: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    unknown_users: int  # held-out rows of users without a pair to train on: nothing can be said of them

    @classmethod
    def read(cls, pairs: Path, held_out: Path | None) -> Pairs:
        """Items are those of both files: one that is only held out is a candidate that nothing is known of.

        Raises: ValueError for a file that is not such a table, or two that share no user.
        """
        table = read_table(pairs, ["user", "item"], "pairs")
        other = None if held_out is None else read_table(held_out, ["user", "item"], "test_pairs")
        tables = [found for found in (table, other) if found is not None]
        user_columns, item_columns = (_of_one_kind([found[name] for found in tables]) for name in ("user", "item"))
        user_ids, users = np.unique(user_columns[0], return_inverse=True)
        item_ids = np.unique(np.concatenate(item_columns))
        items = np.searchsorted(item_ids, item_columns[0])
        if other is None:
            return cls(user_ids, item_ids, users, items, None, 0)
        place = np.minimum(np.searchsorted(user_ids, user_columns[1]), len(user_ids) - 1)
        known = user_ids[place] == user_columns[1]
        if not known.any():
            raise ValueError(f"test_pairs: expected pairs of users in {pairs}, got none in {held_out}")
        kept = place[known], np.searchsorted(item_ids, item_columns[1][known])
        return cls(user_ids, item_ids, users, items, kept, int((~known).sum()))


def _of_one_kind(columns: list[Ids]) -> list[Ids]:
    """The same ids of several files: numbers meet text, which is what a CSV has, as text."""
    mixed = len({column.dtype.kind in "iu" for column in columns}) > 1
    return [column.astype(str) for column in columns] if mixed else columns


def fit_pairs(
    pairs: Path,
    out: Path,
    config: BPRConfig,
    *,
    held_out: Path | None = None,
    top_k: int = 20,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Train on a file of pairs and write the embeddings, everyone's recommendations and the metrics to `out`.

    Args:
        pairs: a CSV or Parquet file with the columns user and item; any ids.
        out: gets users.parquet and items.parquet (id, embedding), recommendations.parquet (user, rank, item, score:
            the top_k items that the user has no pair with), config.yaml, metrics.json and checkpoints/.
        held_out: such a file to measure recall, NDCG and precision at top_k on.
        resume: go on from the checkpoint that `out` holds, if there is one.
    Returns: what metrics.json holds: users, items, pairs, history, and what the result scores as `held_out`.
    Raises: ValueError before any work for bad files, or an `out` that holds a run; see also `fit_lightgcn`.
    """
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if not resume and any((out / name).exists() for name in (*FILES, "checkpoints")):
        raise ValueError(f"out: expected a folder without a run, got {out}; --resume auto continues it")
    data = Pairs.read(pairs, held_out)
    sizes = len(data.user_ids), len(data.item_ids)
    seen = Lists.of(data.users, data.items, sizes[0])
    expected = None if data.held_out is None else Lists.of(*data.held_out, sizes[0])

    def evaluate(user: Tensor, item: Tensor) -> dict[str, float]:
        if expected is None:
            return {}
        found = full_ranking(user, item, seen, expected, k=top_k)[top_k]
        return {f"{name}@{top_k}": getattr(found, name) for name in ("recall", "ndcg", "precision")}

    fitted = fit_lightgcn(
        data.users,
        data.items,
        *sizes,
        config,
        evaluate=evaluate,
        folder=out / "checkpoints",
        device=device,
        progress=progress,
    )
    _write_tables(data, fitted.user.cpu(), fitted.item.cpu(), seen, min(top_k, sizes[1]), out)
    write_atomic(out / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
    # Not the history's last: a run that is continued may have been measured otherwise, or not at all.
    last = evaluate(fitted.user, fitted.item)
    counts = {"users": sizes[0], "items": sizes[1], "pairs": len(seen.items)}
    skipped = {"held_out_rows_of_unknown_users": data.unknown_users}
    metrics: dict[str, Any] = {**counts, "held_out": last or None, **skipped, "history": fitted.history}
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def _write_tables(data: Pairs, user: Tensor, item: Tensor, seen: Lists, k: int, out: Path) -> None:
    for name, ids, table in (("user", data.user_ids, user), ("item", data.item_ids, item)):
        write_table(out / f"{name}s.parquet", {name: ids, "embedding": list(table.numpy())})
    items, scores = (found.numpy() for found in top_items(user, item, seen, k))
    # A user who has nearly everything has fewer than k items left; those places hold -1.
    row, place = np.nonzero(items >= 0)
    columns = {
        "user": data.user_ids[row],
        "rank": place + 1,
        "item": data.item_ids[items[row, place]],
        "score": scores[row, place],
    }
    write_table(out / "recommendations.parquet", columns)

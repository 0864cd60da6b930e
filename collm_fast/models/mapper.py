"""The CIE mapper: from collaborative embeddings (and what stands beside them) to rows of the LLM's embedding space.

How its rows enter the prompt is `collm_fast.models.collm`; where the embeddings come from is `collm_fast.models.cf`.
Floor F2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from collm_fast.config import MapperConfig

if TYPE_CHECKING:
    from collm_fast.data.dataset import Dataset

# Columns of `id_statistics`, for users and items alike.
STATISTICS = ("log_count", "like_logit", "like_residual")
# Pseudo-rows of the prior in a smoothed like rate; 5 is what the item-mean baseline smooths with.
_SMOOTHING = 5.0


@dataclass(frozen=True)
class IdStatistics:
    """What is known of each user and item beside its embedding: user [U, k], item [I, k], float32, standardised."""

    user: Tensor
    item: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.user.shape), tuple(self.item.shape)
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
            raise ValueError(f"id_statistics: expected user [U, k] and item [I, k], got {shapes[0]} and {shapes[1]}")

    @property
    def dim(self) -> int:
        return self.user.shape[1]


def id_statistics(dataset: Dataset, rows: np.ndarray) -> IdStatistics:
    """Statistics of every user and item, from chosen rows of the train split and nothing else.

        log_count     = ln(1 + n)
        like_logit    = logit((likes + 5 p) / (n + 5)),  p the like rate of all chosen rows
        like_residual = mean over the id's rows of (label - like rate of the other side), smoothed by 5 rows of zero

    Each column is standardised over the ids that have a row. An id without rows has n = 0 and so the prior.

    Args: dataset: as `load_dataset` gives it. rows: [n] bool over dataset.splits["train"].
    Returns: IdStatistics with k = 3 columns (`STATISTICS`).
    Raises: ValueError for a mask of another length or one that chooses no row.
    """
    train = dataset.splits["train"]
    rows = np.asarray(rows)
    if rows.dtype != np.bool_ or rows.shape != train.uid.shape:
        got = f"{rows.dtype} {list(rows.shape)}"
        raise ValueError(f"id_statistics: expected rows of bool [{len(train.uid)}], got {got}")
    if not rows.any():
        raise ValueError("id_statistics: expected at least one chosen train row, got none")
    uid, iid, label = train.uid[rows], train.iid[rows], train.label[rows].astype(np.float64)
    prior = float(np.clip(label.mean(), 1e-3, 1 - 1e-3))
    sides = {"user": (uid, dataset.num_users), "item": (iid, dataset.num_items)}
    count = {name: np.bincount(ids, minlength=size).astype(np.float64) for name, (ids, size) in sides.items()}
    rate = {
        name: (np.bincount(ids, weights=label, minlength=size) + _SMOOTHING * prior) / (count[name] + _SMOOTHING)
        for name, (ids, size) in sides.items()
    }
    out = {}
    for name, other, other_ids in (("user", "item", iid), ("item", "user", uid)):
        ids, size = sides[name]
        residual = np.bincount(ids, weights=label - rate[other][other_ids], minlength=size) / (count[name] + _SMOOTHING)
        columns = np.stack((np.log1p(count[name]), np.log(rate[name] / (1 - rate[name])), residual), axis=1)
        seen = columns[count[name] > 0]
        scale = seen.std(axis=0)
        columns = (columns - seen.mean(axis=0)) / np.where(scale > 1e-6, scale, 1.0)
        columns[0] = 0.0  # index 0 is padding
        out[name] = torch.from_numpy(columns.astype(np.float32))
    return IdStatistics(**out)


class Mapper(nn.Module):
    """Linear(d_in, factor d) - ReLU - Linear(factor d, H tokens_per_id), one for users and items alike.

    d_in is d for the `embedding` form, plus stats_dim for `+stats`, plus d for `+pair`. The hidden width is factor d
    in every form, so that forms differ by what they read. Initialised as torch initialises a Linear: on raw embeddings
    that trained best (against norm-matched and zero starts). Parameters are float32, whatever the language model is.

    Source: CoLLM (arXiv 2310.19488), section 4.2.
    """

    def __init__(self, d: int, H: int, config: MapperConfig, stats_dim: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d, self.H = d, H
        self.stats_dim = stats_dim if "+stats" in config.inputs else 0
        self.pair_dim = d if "+pair" in config.inputs else 0
        if "+stats" in config.inputs and stats_dim < 1:
            raise ValueError(f"mapper.inputs: expected stats_dim above 0 for {config.inputs!r}, got {stats_dim}")
        hidden = config.hidden_factor * d
        self.first = nn.Linear(self.d_in, hidden, dtype=torch.float32)
        self.second = nn.Linear(hidden, H * config.tokens_per_id, dtype=torch.float32)

    @property
    def d_in(self) -> int:
        return self.d + self.stats_dim + self.pair_dim

    def forward(self, features: Tensor) -> Tensor:
        """features [S, d_in] float32 -> rows [S tokens_per_id, H] float32; slot s has rows s tokens_per_id + j."""
        if features.dim() != 2 or features.shape[1] != self.d_in:
            raise ValueError(f"mapper: expected features of shape [S, {self.d_in}], got {list(features.shape)}")
        rows: Tensor = self.second(torch.relu(self.first(features)))
        return rows.reshape(-1, self.H)

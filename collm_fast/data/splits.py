"""Split rules and the three warm/cold definitions. Pure functions over arrays; nothing is read or written here. F2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.ragged import I64

if TYPE_CHECKING:
    from collm_fast.data.dataset import Dataset

WarmRule = Literal["not_cold", "at_least_3", "more_than_3"]
# The definitions of a warm row in use. The first is the paper's and the default of every report.
WARM_RULES: dict[WarmRule, str] = {
    "not_cold": "user and item both occur in the train rows (the split's own mark)",
    "at_least_3": "user and item both have at least 3 train rows",
    "more_than_3": "user and item both have more than 3 train rows",
}
# The months (0 is the first month of the data) of the paper's MovieLens-1M split: train, valid, test.
ML1M_MONTHS = ((14, 23), (24, 28), (29, 33))
DROPPED = np.int8(-1)


def calendar_months(timestamp: I64, windows: tuple[tuple[int, int], ...] = ML1M_MONTHS) -> NDArray[np.int8]:
    """The paper's split of MovieLens-1M, [n] int8: 0 train, 1 valid, 2 test, -1 in no window.

        month = 12 (year - 2000) + month of the year, less its minimum over the data

    Source: CoLLM (arXiv 2310.19488), section 5.1, and the published files.
    """
    # Months since 1970-01 (UTC) differ from the paper's by a constant, which the minimum removes.
    month = timestamp.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
    month = month - (month.min() if len(month) else 0)
    split = np.full(len(timestamp), DROPPED, dtype=np.int8)
    for part, (first, last) in enumerate(windows):
        split[(month >= first) & (month <= last)] = part
    return split


def calendar_quantiles(timestamp: I64) -> NDArray[np.int8]:
    """Split by time over all users, [n] int8: the first 80 % of the rows train, the next 10 % valid, the rest test.

    Rows of one timestamp stay together, so a boundary inside a tie moves to the tie's beginning.
    """
    ordered = np.sort(timestamp)
    if len(ordered) == 0:
        return np.zeros(0, dtype=np.int8)
    bounds = ordered[[len(ordered) * 8 // 10, len(ordered) * 9 // 10]]
    return np.searchsorted(bounds, timestamp, side="right").astype(np.int8)


def by_user(user: I64) -> NDArray[np.int8]:
    """Each user's last fifth of rows, halved into valid and test; the rest train, [n] int8.

    `user` belongs to rows sorted by (user, time). An odd row goes to test for the first user that has one, to valid
    for the second, and so on: data of short users still gets both splits.
    """
    n = len(user)
    new = np.ones(n, dtype=bool)
    new[1:] = user[1:] != user[:-1]
    start = np.flatnonzero(new)
    count = np.diff(np.append(start, n))
    held, per_row = count // 5, np.cumsum(new) - 1
    from_end = (start + count)[per_row] - np.arange(n)  # 1 for the user's last row
    odd = held % 2
    test = (held // 2 + odd * (np.cumsum(odd) % 2))[per_row]
    split = np.zeros(n, dtype=np.int8)
    split[from_end <= held[per_row]] = 1
    split[from_end <= test] = 2
    return split


def not_cold(user: I64, item: I64, split: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[n] bool: the row's user and item both occur in rows with split == 0."""
    train = split == 0
    return np.isin(user, user[train]) & np.isin(item, item[train])


def warm_mask(dataset: Dataset, split: str, rule: WarmRule = "not_cold") -> NDArray[np.bool_]:
    """[n] bool: the warm rows of a split, by one of the three definitions in use (`WARM_RULES`).

    Raises: ValueError for an unknown split or rule.
    """
    if split not in dataset.splits:
        raise ValueError(f"warm_mask: expected a split of {', '.join(dataset.splits)}, got {split!r}")
    rows, train = dataset.splits[split], dataset.splits["train"]
    if rule == "not_cold":
        return rows.not_cold
    if rule not in WARM_RULES:
        raise ValueError(f"warm_mask: expected a rule of {', '.join(WARM_RULES)}, got {rule!r}")
    least = 3 if rule == "at_least_3" else 4
    users = np.bincount(train.uid, minlength=dataset.num_users)
    items = np.bincount(train.iid, minlength=dataset.num_items)
    return (users[rows.uid] >= least) & (items[rows.iid] >= least)

"""The graphs of the LightGCN benchmarks: published splits where they are at hand, and a synthetic power law.

Not here: what is timed on them (`bench_propagate.py`) and the other ways to multiply with them
(`propagate_peers.py`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

import harness
import numpy as np

from collm_fast import BipartiteGraph

DATA = Path(os.environ.get("COLLM_FAST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SHIFT = 20
# Name: file, the columns of user and item.
SPLITS = {"ml-1m": ("ml-1m-collm", "uid", "iid"), "gowalla": ("gowalla-lightgcn", "user", "item")}


def available(suite: harness.Suite, names: Iterable[str]) -> list[str]:
    """Those whose data is here; each of the others becomes a line in the result."""
    found, readable = [], importlib.util.find_spec("pyarrow") is not None
    for name in names:
        path = DATA / SPLITS[name][0] / "train.parquet" if name in SPLITS else None
        if path is None or (readable and path.is_file()):
            found.append(name)
        else:
            suite.failures.append(
                f"{name}: no {path.parent.name}/{path.name}" if readable else f"{name}: needs pyarrow"
            )
    return found


def load(suite: harness.Suite, name: str) -> BipartiteGraph:
    """The training split of that name, or the power law of as many edges as the name says (`power-law 10M`)."""
    if name not in SPLITS:
        count = name.split()[-1]
        suite.reseed(name)
        return power_law(suite, int(count[:-1]) * {"k": 10**3, "M": 10**6}[count[-1]])
    import pyarrow.parquet  # not at the top: the power law needs none of it

    folder, user, item = SPLITS[name]
    path = suite.file(name, DATA / folder / "train.parquet")
    table = pyarrow.parquet.read_table(path, columns=[user, item])
    users, items = table[user].to_numpy(), table[item].to_numpy()
    return BipartiteGraph.from_interactions(users, items, int(users.max()) + 1, int(items.max()) + 1)


def power_law(suite: harness.Suite, edges: int) -> BipartiteGraph:
    """The graph of `power_law_pairs`; pairs drawn twice are merged."""
    return BipartiteGraph.from_interactions(*power_law_pairs(suite, edges))


def power_law_pairs(suite: harness.Suite, pairs: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(users, items, num_users, num_items): users uniform, 25 pairs each on average; items by (rank + 20)^-0.8, 40 on
    average, in no order.

    The shift gives the most popular item 3 to 8 % of the users of 100M to 1M pairs (Gowalla's has 5 %).
    """
    num_users, num_items = max(pairs // 25, 1), max(pairs // 40, 1)
    users = suite.integers(0, num_users, pairs).cpu().numpy()
    uniform = suite.integers(0, 1 << 30, pairs).cpu().numpy() / float(1 << 30)
    # The inverse of the cumulative distribution, of which (rank + shift)^0.2 is the integral.
    low, high = SHIFT**0.2, (num_items + SHIFT) ** 0.2
    rank = (low + (high - low) * uniform) ** 5 - SHIFT
    items = np.clip(rank.astype(np.int64), 0, num_items - 1)
    return users, items, num_users, num_items

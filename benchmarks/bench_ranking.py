"""Times full-ranking evaluation: recall, NDCG and precision at 20 of every user over all items not seen in training.

Embeddings are random and of nearly equal length, the worst case: no user leaves early. The interactions are those of
Gowalla (../shared/data, or COLLM_FAST_TEST_DATA, has them) and a synthetic set. Peers: `naive`, the procedure of
LightGCN-PyTorch (batches of 100 users, Python lists for the mask and for the hits), and `topk`, torch alone without
Python loops (blocks of 256 users, scores masked by index, torch.topk). The floor is the matrix product of users and
items at the speed of torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import graphs
import harness
import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor

from collm_fast.ranking import Lists, full_ranking

K = 20
DISCOUNT = 1 / np.log2(np.arange(2, K + 2))
Evaluate = Callable[[Tensor, Tensor, Lists, Lists], Tensor]


def ours(user: Tensor, item: Tensor, seen: Lists, held_out: Lists) -> Tensor:
    return torch.tensor(astuple(full_ranking(user, item, seen, held_out, k=K)[K])[:3])


def means(hits: np.ndarray, lengths: np.ndarray) -> Tensor:
    """recall, NDCG, precision from [n, K] hits and the number of held-out items of each row."""
    ideal = np.cumsum(DISCOUNT)[np.minimum(lengths, K) - 1]
    values = hits.sum(1) / lengths, (hits * DISCOUNT).sum(1) / ideal, hits.mean(1)
    return torch.tensor([float(value.mean()) for value in values])


def as_lists(lists: Lists) -> list[list[int]]:
    return [part.tolist() for part in np.split(lists.items, lists.offsets[1:-1])]


def naive(seen: Lists, held_out: Lists) -> Evaluate:
    """Prepares what LightGCN-PyTorch holds: a Python list of items for each user."""
    positives, truth = as_lists(seen), as_lists(held_out)
    users = [u for u, items in enumerate(truth) if items]

    def evaluate(user: Tensor, item: Tensor, *_: Lists) -> Tensor:
        hits = []
        for begin in range(0, len(users), 100):
            batch = users[begin : begin + 100]
            rating = torch.sigmoid(user[batch] @ item.T)
            rows, columns = [], []
            for row, u in enumerate(batch):
                rows.extend([row] * len(positives[u]))
                columns.extend(positives[u])
            rating[rows, columns] = -1024.0
            for u, ranked in zip(batch, rating.topk(K).indices.cpu().numpy(), strict=True):
                hits.append([float(i in truth[u]) for i in ranked])
        return means(np.array(hits), np.array([len(truth[u]) for u in users]))

    return evaluate


def topk(user: Tensor, item: Tensor, seen: Lists, held_out: Lists) -> Tensor:
    lengths = np.diff(held_out.offsets)
    users, hits = np.flatnonzero(lengths), []
    key = torch.from_numpy(np.repeat(np.arange(len(user)), lengths) * len(item) + held_out.items).to(user.device)
    for begin in range(0, len(users), 256):
        part = users[begin : begin + 256]
        first, last = seen.offsets[part], seen.offsets[part + 1]
        rows = np.repeat(np.arange(len(part)), last - first)
        places = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        index = torch.from_numpy(part).to(user.device)
        scores = user[index] @ item.T
        scores[torch.from_numpy(rows), torch.from_numpy(seen.items[places]).long()] = -torch.inf
        wanted = index[:, None] * len(item) + scores.topk(K).indices
        hits.append((key[torch.searchsorted(key, wanted).clamp(max=len(key) - 1)] == wanted).cpu().numpy())
    return means(np.concatenate(hits), lengths[users])


def evaluation(suite: harness.Suite, name: str, seen: Lists, held_out: Lists, num_items: int, D: int) -> None:
    suite.reseed(f"{name} {D}")
    user, item = suite.tensor(seen.num_users, D, scale=0.1), suite.tensor(num_items, D, scale=0.1)
    impls: dict[str, Evaluate] = {"ours": ours, "naive": naive(seen, held_out), "topk": topk}
    counted = int((np.diff(held_out.offsets) > 0).sum())
    suite.case(
        f"{name} D={D} top {K}",
        "eval",
        user.dtype,
        {impl: lambda fn=fn: fn(user, item, seen, held_out) for impl, fn in impls.items()},
        expected=lambda: topk(user.double(), item.double(), seen, held_out),
        work=harness.Work(flops=2.0 * counted * num_items * D),
    )


def synthetic(suite: harness.Suite, num_users: int, num_items: int) -> tuple[Lists, Lists]:
    """20 drawn pairs a user to leave out, and 5 held out."""
    lists = []
    for pairs in (20 * num_users, 5 * num_users):
        users, items = suite.integers(0, num_users, pairs), suite.integers(0, num_items, pairs)
        lists.append(Lists.of(users, items, num_users))
    return lists[0], lists[1]


def cases(suite: harness.Suite) -> None:
    num_users, num_items = (1_000, 3_000) if suite.options.quick else (10_000, 20_000)
    suite.reseed("ranking")
    seen, held_out = synthetic(suite, num_users, num_items)
    for D in (64,) if suite.options.quick else (64, 256):
        evaluation(suite, f"{num_users} x {num_items}", seen, held_out, num_items, D)
    if suite.options.quick or not graphs.available(suite, ["gowalla"]):
        return
    tables = []
    for part in ("train", "test"):
        path = suite.file(f"gowalla {part}", graphs.DATA / graphs.SPLITS["gowalla"][0] / f"{part}.parquet")
        tables.append(pyarrow.parquet.read_table(path))
    num_users, num_items = (
        1 + max(int(table[column].to_numpy().max()) for table in tables) for column in ("user", "item")
    )
    seen, held_out = (Lists.of(table["user"].to_numpy(), table["item"].to_numpy(), num_users) for table in tables)
    evaluation(suite, "gowalla", seen, held_out, num_items, 64)


if __name__ == "__main__":
    raise SystemExit(harness.main(cases, __doc__))

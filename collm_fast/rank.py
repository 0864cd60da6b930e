"""Ranking candidates for users: which candidates, in what portions they are scored, and the order of the scored.

Scoring behind one prefix is models/branch_scorer.py, retrieval ranking.py, the public methods run.py. Floor F3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from collm_fast.data.dataset import Dataset, Split
from collm_fast.data.history import history_before
from collm_fast.data.ragged import I64, Array, gather_spans, take_ragged
from collm_fast.evaluate import sigmoid
from collm_fast.models.cf.frozen import CFModel
from collm_fast.ranking import Lists, top_items

# Candidates whose prompts are written at once: some 2 million tokens.
_ROWS = 8192
# Places of the lists that are retrieved at once.
_PLACES = 1 << 20


class Ranked(NamedTuple):
    """One candidate and its P(yes)."""

    item: Any
    score: float


class Ranking(NamedTuple):
    """A user's best candidates, best first: ids as the source data has them, and P(yes) in float32."""

    user: Any
    items: NDArray[Any]
    scores: NDArray[np.float32]


def best_first(logit: ArrayLike, top_k: int | None = None) -> I64:
    """The places of the `top_k` largest logits (None: all), falling; ties keep the order in which they were given.

    Logits, because probabilities near 1 are equal in float32 long before they are.
    """
    places: I64 = np.argsort(-np.asarray(logit, np.float32), kind="stable")[:top_k]
    return places


@dataclass(frozen=True, eq=False)
class Request:
    """Candidates of some users, checked; `of` makes it.

    uid [m]; pool: the item ids that are candidates, each once; seen: of every user of the dataset, the places in the
    pool to leave out; retrieve: how many of the pool a collaborative model chooses for each user, None for all of it;
    his_offsets, his: what each of the m users liked before, the part that a prompt shows.
    """

    dataset: Dataset
    uid: I64
    pool: I64
    seen: Lists | None
    retrieve: int | None
    his_offsets: I64
    his: I64

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        users: Sequence[Any] | Array | None,
        candidates: Sequence[Any] | Array | None,
        *,
        retrieve: int | None,
        at: Any,
        exclude_seen: bool,
        history_length: int,
    ) -> Request:
        """Users and candidates by the source's ids; None: all users, all items with a title in the dataset's order.

        Raises: ValueError for an unknown id, no user, no or repeated candidates, retrieve below 1, or a bad `at`.
        """
        if retrieve is not None and retrieve < 1:
            raise ValueError(f"rank: expected retrieve at least 1, got {retrieve}")
        uid = np.arange(1, dataset.num_users) if users is None else dataset.user_index(users)
        if uid.size == 0:
            raise ValueError("rank: expected at least one user, got none")
        if candidates is None:
            pool = np.flatnonzero([bool(title) for title in dataset.titles])
        else:
            pool = dataset.item_index(candidates)
            ids, counts = np.unique(pool, return_counts=True)
            if (counts > 1).any():
                repeated = dataset.raw_items[ids[counts > 1][0]].item()
                raise ValueError(f"rank: expected every candidate once, got {repeated!r} repeated")
        if pool.size == 0:
            raise ValueError("rank: expected at least one candidate, got none")
        offsets, his = history_before(dataset, uid, at)
        length = np.minimum(np.diff(offsets), history_length)
        shown = gather_spans(his, offsets[1:] - length, length)
        return cls(dataset, uid, pool, _seen(dataset, pool, at) if exclude_seen else None, retrieve, *shown)

    def counts(self) -> I64:
        """[m] how many candidates each user has."""
        left = np.full(self.uid.size, self.pool.size)
        if self.seen is not None:
            left -= np.diff(self.seen.offsets)[self.uid]
        return left if self.retrieve is None else np.minimum(left, self.retrieve)

    def candidates(self, cf: CFModel) -> Iterator[I64]:
        """Each user's candidates: in the pool's order, or as the model's dot product of `user` and `item` orders them.

        Biases, if they are to count, are columns of the tables.
        """
        seen = self.seen or Lists(np.zeros(self.dataset.num_users + 1, np.int64), np.zeros(0, np.int32))
        if self.retrieve is None:
            for user in self.uid:
                yield np.delete(self.pool, seen.items[seen.offsets[user] : seen.offsets[user + 1]])
            return
        k = min(self.retrieve, self.pool.size)
        item = cf.item[torch.from_numpy(self.pool)]
        block = max(1, min(4096, _PLACES // k))
        for begin in range(0, self.uid.size, block):
            uid = self.uid[begin : begin + block]
            masked = Lists(*take_ragged(seen.offsets, seen.items, uid))
            places, _ = top_items(cf.user[torch.from_numpy(uid)], item, masked, k)
            for row in places.numpy():
                yield self.pool[row[row >= 0]]


def _seen(dataset: Dataset, pool: I64, at: Any) -> Lists:
    """The places in the pool of what each user rated before the moment that histories end at, liked or not."""
    names = ("train", "valid") if at is None else ("train", "valid", "test")
    parts = [dataset.splits[name] for name in names]
    uid, iid, time = (np.concatenate([getattr(part, name) for part in parts]) for name in ("uid", "iid", "timestamp"))
    place = np.full(dataset.num_items, -1, np.int64)
    place[pool] = np.arange(pool.size)
    counts = (place[iid] >= 0) & (True if at is None else time < at)
    return Lists.of(uid[counts], place[iid[counts]], dataset.num_users)


def rank_users(
    request: Request, cf: CFModel, score: Callable[[Split], NDArray[np.float32]], top_k: int | None = None
) -> Iterator[Ranking]:
    """The `top_k` best candidates (None: all) of each user, in the order of the users.

    `score` gives the logits of rows, of several users where these have few candidates. What is held does not grow with
    the number of users or candidates, but for a user's own logits.
    """
    dataset, user = request.dataset, 0
    for lists in _portions(request.candidates(cf)):
        ends = np.cumsum([len(candidates) for candidates in lists])
        iid = np.concatenate(lists)
        owner = np.repeat(np.arange(user, user + len(lists)), [len(candidates) for candidates in lists])
        logits = np.empty(len(iid), np.float32)
        for begin in range(0, len(iid), _ROWS):
            part = slice(begin, begin + _ROWS)
            logits[part] = score(_rows(request, owner[part], iid[part]))
        for items, logit in zip(lists, np.split(logits, ends[:-1]), strict=True):
            best = best_first(logit, top_k)
            raw = dataset.raw_users[request.uid[user]].item()
            yield Ranking(raw, dataset.raw_items[items[best]], sigmoid(logit[best]).astype(np.float32))
            user += 1


def _portions(lists: Iterator[I64]) -> Iterator[list[I64]]:
    """Lists in a row that hold at most `_ROWS` candidates together, or one that holds more."""
    portion: list[I64] = []
    rows = 0
    for candidates in lists:
        if portion and rows + len(candidates) > _ROWS:
            yield portion
            portion, rows = [], 0
        portion.append(candidates)
        rows += len(candidates)
    if portion:
        yield portion


def _rows(request: Request, owner: I64, iid: I64) -> Split:
    """Rows to score: `owner` [n] are places in the request's users."""
    zero = np.zeros(len(iid), np.int64)
    his_offsets, his = take_ragged(request.his_offsets, request.his, owner)
    return Split(request.uid[owner], iid, zero, zero, his_offsets, his, zero.astype(bool))

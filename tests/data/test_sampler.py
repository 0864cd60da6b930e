"""BPR samples: never a positive, uniform, the same bits from C++ and NumPy however cut; the nodes of a batch."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import requires
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_fast import _native
from collm_fast.data.ragged import offsets_of
from collm_fast.data.sampler import (
    Positives,
    batch_rows_numpy,
    batches_of,
    sample_negatives,
    sample_negatives_numpy,
    sample_triples,
    sample_triples_numpy,
)
from collm_fast.graph import BipartiteGraph
from collm_fast.reference import philox


def some_positives(num_users: int = 6, num_items: int = 40, seed: int = 0) -> Positives:
    rng = np.random.default_rng(seed)
    uid, iid = rng.integers(1, num_users, 60), rng.integers(1, num_items, 60)
    return Positives.of(uid, iid, num_users, num_items)


def test_positives_are_sorted_and_distinct():
    positives = Positives.of(np.array([2, 1, 2, 2]), np.array([3, 1, 1, 3]), 4, 5)
    assert positives.offsets.tolist() == [0, 0, 1, 3, 3] and positives.items.tolist() == [1, 1, 3]
    with pytest.raises(ValueError, match=r"users in \[1, 3\], got 4 in row 1"):
        Positives.of(np.array([1, 4]), np.array([1, 1]), 4, 5)
    with pytest.raises(ValueError, match=r"items in \[1, 4\], got 0 in row 0"):
        Positives.of(np.array([1]), np.array([0]), 4, 5)


def test_the_words_are_those_of_the_specification():
    positives = Positives.of(np.zeros(0), np.zeros(0), 3, 11)
    got = sample_negatives(np.array([1, 2, 2]), positives, seed=-5, epoch=7, first_row=2**33 + 1)
    for place, item in enumerate(got.tolist()):
        row = 2**33 + 1 + place
        counter = (row & 0xFFFFFFFF, row >> 32, 7, 0x4250524E)
        word = int(philox(-5, *(torch.tensor(part) for part in counter))[0])
        assert item == 1 + (word * 10 >> 32)


def test_no_negative_is_a_positive_and_all_others_occur_equally():
    positives = some_positives()
    users = np.tile(np.arange(1, 6), 8000)
    items = sample_negatives(users, positives, seed=3)
    for user in range(1, 6):
        own = positives.items[positives.offsets[user] : positives.offsets[user + 1]]
        drawn = np.bincount(items[users == user], minlength=40)
        free = np.setdiff1d(np.arange(1, 40), own)
        assert drawn[own].sum() == 0 and drawn[0] == 0
        expected = 8000 / len(free)
        chi2 = ((drawn[free] - expected) ** 2 / expected).sum()
        assert chi2 < len(free) + 5 * np.sqrt(2 * len(free))


def test_a_user_who_likes_nearly_everything():
    uid = np.concatenate([np.ones(1998), np.full(1997, 2)]).astype(int)
    iid = np.concatenate([np.setdiff1d(np.arange(1, 2000), [1234]), np.setdiff1d(np.arange(1, 2000), [1, 1999])])
    positives = Positives.of(uid, iid, 3, 2000)
    users = np.repeat([1, 2], 200)
    items = sample_negatives(users, positives, seed=1)
    assert set(items[:200].tolist()) == {1234} and set(items[200:].tolist()) == {1, 1999}
    np.testing.assert_array_equal(
        items, sample_negatives_numpy(users, positives.offsets, positives.items, 2000, 1, 0, 0)
    )


def test_rows_can_be_cut_and_epochs_and_seeds_differ():
    positives, users = some_positives(), np.tile(np.arange(1, 6), 50)
    whole = sample_negatives(users, positives, seed=9, epoch=2)
    parts = [sample_negatives(users[a : a + 37], positives, seed=9, epoch=2, first_row=a) for a in range(0, 250, 37)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole != sample_negatives(users, positives, seed=9, epoch=3)).any()
    assert (whole != sample_negatives(users, positives, seed=10, epoch=2)).any()
    assert len(sample_negatives(users[:0], positives, seed=9)) == 0


@requires("native")
@settings(deadline=None)
@given(
    st.integers(2, 60),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**48 - 100),
    st.data(),
)
def test_native_and_numpy_give_the_same_bits(num_items: int, seed: int, epoch: int, first: int, data: st.DataObject):
    pair = st.tuples(st.integers(1, 4), st.integers(1, num_items - 1))
    pairs = data.draw(st.lists(pair, max_size=150))
    uid, iid = (np.array(column, dtype=np.int64) for column in (zip(*pairs, strict=True) if pairs else ([], [])))
    positives = Positives.of(uid, iid, 5, num_items)
    free = np.flatnonzero(np.diff(positives.offsets) < num_items - 1)
    users = np.array(data.draw(st.lists(st.sampled_from(free.tolist()), max_size=40)), dtype=np.int64)
    arguments = (users, positives.offsets, positives.items, num_items, seed, epoch, first)
    np.testing.assert_array_equal(_native.C().sample_negatives(*arguments), sample_negatives_numpy(*arguments))


@requires("native")
def test_the_number_of_threads_changes_nothing():
    positives, graph = some_positives(), some_graph()
    users = np.tile(np.arange(1, 6), 5000)
    tables = (positives.offsets, positives.items, 40, 9, 2, 0)
    triples = (graph.crow.numpy(), graph.col.numpy(), 7, 11, 30_001, 5, 1, 2**32 - 40)
    nodes = np.random.default_rng(0).integers(0, 500, (3, 1001))
    module = _native.C()
    for threads in (2, 3, 64):
        np.testing.assert_array_equal(
            module.sample_negatives(users, *tables, threads), module.sample_negatives(users, *tables, 1)
        )
        np.testing.assert_array_equal(module.sample_triples(*triples, threads), module.sample_triples(*triples, 1))
        for one, many in zip(
            module.batch_rows(nodes, 500, 64, 1), module.batch_rows(nodes, 500, 64, threads), strict=True
        ):
            np.testing.assert_array_equal(one, many)


@requires("native")
@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_a_thread_is_raised_and_names_the_first_row(threads: int):
    positives = some_positives()
    users = np.ones(40_000, dtype=np.int64)
    users[[15_000, 39_000]] = 6, 7
    with pytest.raises(ValueError, match=r"users in \[0, 6\), got 6 in row 15000"):
        _native.C().sample_negatives(users, positives.offsets, positives.items, 40, 0, 0, 0, threads)
    nodes = np.zeros((2, 300), dtype=np.int64)
    nodes[1, 200] = nodes[0, 250] = -3
    with pytest.raises(ValueError, match=r"batch_rows: expected nodes in \[0, 9\), got -3 in row 200"):
        _native.C().batch_rows(nodes, 9, 16, threads)


def some_graph(pairs: int = 40, num_users: int = 7, num_items: int = 11, seed: int = 0) -> BipartiteGraph:
    """User 3 has nothing and user 5 everything."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, num_users, pairs), rng.integers(0, num_items, pairs)
    kept = (users != 3) & (users != 5)
    users = np.concatenate((users[kept], np.full(num_items, 5)))
    return BipartiteGraph.from_interactions(
        users, np.concatenate((items[kept], np.arange(num_items))), num_users, num_items
    )


def test_the_words_of_triples_are_those_of_the_specification():
    graph = BipartiteGraph.from_interactions([0, 1, 1, 2], [4, 0, 3, 2], 3, 5)
    liked = {0: [4], 1: [0, 3], 2: [2]}
    got = sample_triples(graph, 40, seed=-5, epoch=7, first_row=2**33 + 1)
    for row, (user, positive, negative) in enumerate(got.T.tolist(), 2**33 + 1):
        words = [
            word
            for call in (0, 1)
            for word in philox(
                -5, *(torch.tensor(part) for part in (row & 0xFFFFFFFF, row >> 32 | call << 16, 7, 0x42505254))
            ).tolist()
        ]
        assert user == words[0] * 3 >> 32
        assert positive == liked[user][words[1] * len(liked[user]) >> 32]
        proposed = [word * 5 >> 32 for word in words[2:]]
        assert negative == next(item for item in proposed if item not in liked[user])


def test_triples_are_uniform_over_users_their_items_and_the_others():
    graph = some_graph()
    liked = [(graph.col[graph.crow[u] : graph.crow[u + 1]].numpy() - 7).tolist() for u in range(7)]
    users, positives, negatives = sample_triples(graph, 60_000, seed=1)
    usable = [0, 1, 2, 4, 6]
    for user in range(7):
        mine = users == user
        assert abs(mine.sum() - (12_000 if user in usable else 0)) < (600 if user in usable else 1)
        if user not in usable:
            continue
        for drawn, among in ((positives[mine], liked[user]), (negatives[mine], set(range(11)) - set(liked[user]))):
            counts = np.bincount(drawn, minlength=11)
            expected = mine.sum() / len(among)
            assert set(np.flatnonzero(counts)) == set(among)
            assert ((counts[list(among)] - expected) ** 2 / expected).sum() < len(among) + 5 * np.sqrt(2 * len(among))


@requires("native")
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=80),
    st.integers(21, 40),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**48 - 100),
    st.integers(0, 70),
)
def test_native_and_numpy_triples_have_the_same_bits(pairs, num_items, seed, epoch, first, count):
    graph = BipartiteGraph.from_interactions(*zip(*pairs, strict=True), 4, num_items)
    arguments = (graph.crow.numpy(), graph.col.numpy(), 4, num_items, count, seed, epoch, first)
    np.testing.assert_array_equal(_native.C().sample_triples(*arguments), sample_triples_numpy(*arguments))


def test_without_a_compiler_numpy_draws_the_same(monkeypatch: pytest.MonkeyPatch):
    positives, users = some_positives(), np.array([1, 2, 4])
    drawn = [sample_triples(some_graph(), 50, seed=4), sample_negatives(users, positives, seed=4)]
    monkeypatch.setattr("collm_fast.data.sampler._native.C", lambda: None)
    np.testing.assert_array_equal(drawn[0], sample_triples(some_graph(), 50, seed=4))
    np.testing.assert_array_equal(drawn[1], sample_negatives(users, positives, seed=4))


def test_triples_of_a_user_who_has_nearly_everything():
    graph = BipartiteGraph.from_interactions(np.zeros(1999, np.int64), np.delete(np.arange(2000), 1234), 1, 2000)
    arguments = (graph.crow.numpy(), graph.col.numpy(), 1, 2000, 50, 3, 0, 0)
    for triples in (sample_triples(graph, 50, seed=3), sample_triples_numpy(*arguments)):
        assert set(triples[2].tolist()) == {1234} and 1234 not in triples[1]


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=requires("native"))])
def test_batches_name_their_nodes_once(native: bool, monkeypatch: pytest.MonkeyPatch):
    if not native:
        monkeypatch.setattr("collm_fast.data.sampler._native.C", lambda: None)
    nodes = np.random.default_rng(0).integers(0, 130, (3, 100))
    batches = list(batches_of(nodes, 130, 32))
    assert [batch.slots.shape[1] for batch in batches] == [32, 32, 32, 4]
    for number, batch in enumerate(batches):
        part = nodes[:, 32 * number : 32 * number + 32]
        np.testing.assert_array_equal(batch.rows[batch.slots].numpy(), part)
        np.testing.assert_array_equal(batch.rows.numpy(), np.unique(part))
        np.testing.assert_array_equal(batch.counts.numpy(), np.unique(part, return_counts=True)[1])
        assert batch.counts.dtype == torch.float32 and batch.slots.is_contiguous()
    assert list(batches_of(nodes[:, :0], 130, 32)) == []
    whole, *others = batches_of(nodes, 130, sys.maxsize)
    assert not others and whole.rows.tolist() == np.unique(nodes).tolist()


BAD_TRIPLES = [
    ({"count": -1}, "num_items >= 1 and count >= 0, got 4, 3 and -1 with 8 of crow"),
    ({"num_users": 8}, "1 <= num_users < len"),
    ({"epoch": 2**32}, "first_row and epoch in"),
    ({"first_row": -1}, "first_row and epoch in"),
    ({"crow": [0, 2, 1, 2, 2, 2, 2, 2]}, "crow to rise from 0 to 4, got 2 and 1 for user 1"),
    ({"crow": [0] * 8}, "a user with a positive and with an item that is none, got none of 4"),
    ({"col": [7, 7, 7, 7], "num_items": 2}, r"items of users as nodes in \[4, 6\), got 7 for user"),
]


@pytest.mark.parametrize("change,message", BAD_TRIPLES)
@pytest.mark.parametrize("which", ["numpy", pytest.param("native", marks=requires("native"))])
def test_bad_arguments_of_triples(change: dict[str, object], message: str, which: str):
    good = {"crow": [0, 1, 2, 2, 2, 3, 4, 4], "col": [4, 5, 0, 1], "num_users": 4, "num_items": 3}
    call = {**good, "count": 5, "seed": 0, "epoch": 0, "first_row": 0, **change}
    call |= {"crow": np.array(call["crow"], dtype=np.int64), "col": np.array(call["col"], dtype=np.int32)}
    sample = sample_triples_numpy if which == "numpy" else _native.C().sample_triples
    with pytest.raises(ValueError, match="sample_triples: expected .*" + message):
        sample(*call.values())


@pytest.mark.parametrize("which", ["numpy", pytest.param("native", marks=requires("native"))])
def test_bad_arguments_of_batches(which: str):
    rows = batch_rows_numpy if which == "numpy" else _native.C().batch_rows
    nodes = np.array([[1, 2], [0, 5]])
    with pytest.raises(ValueError, match=r"batch_rows: expected nodes in \[0, 5\), got 5 in row 1"):
        rows(nodes, 5, 2)
    for bad in ((nodes[0], 6, 2), (nodes, -1, 2), (nodes, 2**31, 2), (nodes, 6, 0)):
        with pytest.raises(ValueError, match=r"expected nodes \[C, n\], num_nodes in"):
            rows(*bad)
    with pytest.raises(ValueError, match="batch_rows: expected nodes in int64, got int32"):
        batches_of(nodes.astype(np.int32), 6, 2)


CASES = [
    ({"users": [5]}, r"users in \[0, 4\), got 5 in row 0"),
    ({"users": [1, -1]}, r"users in \[0, 4\), got -1 in row 1"),
    ({"users": [3]}, "an item that user 3 has not, got all 2 items as positives"),
    ({"num_items": 1}, r"num_items in \[2, 2147483647\], got 1"),
    ({"epoch": -1}, "first_row and epoch in"),
    ({"first_row": 2**48}, "first_row and epoch in"),
    ({"offsets": [0, 1, 2, 3, 9]}, "offsets from 0 to 4, got others"),
    ({"offsets": [0, 3, 2, 4, 4], "users": [1]}, "offsets that do not decrease, got 3 and 2 for user 1"),
]


@pytest.mark.parametrize("change,message", CASES)
@pytest.mark.parametrize("which", ["numpy", pytest.param("native", marks=requires("native"))])
def test_bad_arguments(change: dict[str, object], message: str, which: str):
    good = {"users": [1, 2], "offsets": offsets_of(np.array([0, 1, 1, 2])), "positives": [1, 1, 1, 2], "num_items": 3}
    call = {**good, "seed": 0, "epoch": 0, "first_row": 0, **change}
    for name in ("users", "offsets", "positives"):
        call[name] = np.asarray(call[name], dtype=np.int64)
    sample = sample_negatives_numpy if which == "numpy" else _native.C().sample_negatives
    with pytest.raises(ValueError, match="sample_negatives: expected " + message):
        sample(*call.values())

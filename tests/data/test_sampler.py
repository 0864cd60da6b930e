"""BPR negatives: never a positive, uniform, and the same bits from C++ and NumPy however the rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import requires
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_fast import _native
from collm_fast.data.ragged import offsets_of
from collm_fast.data.sampler import Positives, sample_negatives, sample_negatives_numpy
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
    import torch

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

"""Split rules, histories and the warm/cold definitions on small hand-made interactions, and their invariants."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_fast.data.history import fixed_blocks, histories, row_blocks
from collm_fast.data.splits import by_user, calendar_months, calendar_quantiles, not_cold


def seconds(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=timezone.utc).timestamp())


def test_calendar_months_are_counted_from_the_first_one_and_bounded():
    # April 2000 is month 0, so the windows are June 2001 to March 2002, April to August, September to January 2003.
    days = [(2000, 4, 25), (2001, 5, 31), (2001, 6, 1), (2002, 3, 31), (2002, 4, 1), (2002, 8, 31), (2002, 9, 1)]
    days += [(2003, 1, 31), (2003, 2, 1)]
    time = np.array([seconds(*day) for day in days])
    assert calendar_months(time).tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, -1]


def test_calendar_months_of_nothing():
    assert calendar_months(np.zeros(0, dtype=np.int64)).tolist() == []


def test_quantiles_keep_a_tie_together():
    time = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 9])
    assert calendar_quantiles(time).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 2]
    assert calendar_quantiles(time[:0]).tolist() == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=80))
def test_by_user_holds_out_the_last_fifth(users: list[int]):
    user = np.sort(np.array(users))
    split = by_user(user)
    for one in np.unique(user):
        own = split[user == one]
        assert (np.diff(own) >= 0).all()
        valid, test = int((own == 1).sum()), int((own == 2).sum())
        assert valid + test == len(own) // 5 and abs(valid - test) <= 1
    assert abs(int((split == 1).sum()) - int((split == 2).sum())) <= 1


def test_not_cold_needs_user_and_item_in_train():
    user, item = np.array([1, 1, 2, 3, 1]), np.array([1, 2, 1, 1, 3])
    split = np.array([0, 0, 0, 2, 2])
    assert not_cold(user, item, split).tolist() == [True, True, True, False, False]


def test_block_starts():
    user = np.array([1] * 7 + [2] * 3)
    split = np.array([0, 0, 0, 0, 0, 1, 2, 0, 1, 1])
    assert fixed_blocks(user, split, 2).tolist() == [0, 0, 2, 2, 4, 5, 6, 7, 8, 8]
    assert row_blocks(user).tolist() == list(range(10))


def test_history_of_rows_and_blocks():
    user, item = np.array([1, 1, 1, 1, 2, 2]), np.array([5, 6, 7, 8, 5, 9])
    liked = np.array([True, False, True, True, True, True])
    offsets, values = histories(user, item, liked, row_blocks(user))
    rows = [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert rows == [[], [5], [5], [5, 7], [], [5]]
    offsets, values = histories(user, item, liked, np.array([0, 0, 2, 2, 4, 4]))
    rows = [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert rows == [[], [], [5], [5], [], []]


@settings(deadline=None)
@given(st.data())
def test_no_history_holds_its_block_a_later_row_another_user_or_a_disliked_item(data: st.DataObject):
    n = data.draw(st.integers(1, 60))
    user = np.sort(np.array(data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))))
    liked = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    block = data.draw(st.integers(1, 5))
    item = np.arange(1, n + 1)  # every row has an item of its own: the history names its rows
    start = fixed_blocks(user, by_user(user), block)
    offsets, values = histories(user, item, liked, start)
    for row in range(n):
        expected = [r + 1 for r in range(start[row]) if user[r] == user[row] and liked[r]]
        assert values[offsets[row] : offsets[row + 1]].tolist() == expected
        assert start[row] <= row and row - start[row] < max(block, n)


def test_warm_rules(tmp_path):
    from collm_fast.data import warm_mask
    from collm_fast.data.dataset import Dataset, Split

    def split(pairs: list[tuple[int, int]]) -> Split:
        uid, iid = (np.array(column) for column in zip(*pairs, strict=True))
        zero = np.zeros(len(uid), dtype=np.int64)
        return Split(
            uid, iid, zero, zero, np.zeros(len(uid) + 1, dtype=np.int64), zero[:0], np.array([True, False, True])
        )

    train = [(1, 1)] * 3 + [(2, 2)] * 4
    splits = {"train": split([(1, 1)] * 3)}
    many = np.array(train)
    zero = np.zeros(len(many), dtype=np.int64)
    splits["train"] = Split(
        many[:, 0], many[:, 1], zero, zero, np.zeros(len(many) + 1, dtype=np.int64), zero[:0], zero == 0
    )
    splits["test"] = split([(1, 1), (2, 2), (1, 2)])
    data = Dataset(tmp_path, {}, ["", "a", "b"], splits, 3, 3, np.array([-1, 1, 2]), np.array([-1, 1, 2]))
    assert warm_mask(data, "test").tolist() == [True, False, True]
    assert warm_mask(data, "test", "at_least_3").tolist() == [True, True, True]
    assert warm_mask(data, "test", "more_than_3").tolist() == [False, True, False]
    with pytest.raises(ValueError, match="expected a rule of not_cold, at_least_3, more_than_3, got 'hot'"):
        warm_mask(data, "test", "hot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a split of train, test, got 'dev'"):
        warm_mask(data, "dev")

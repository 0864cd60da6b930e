"""Packing: every row's tokens survive, C++ and NumPy lay out alike, batches hold every row once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_fast import _native
from collm_fast.data.packing import (
    PackedBatch,
    batches,
    common_prefix,
    pack,
    plan_tree,
    plan_tree_numpy,
)
from collm_fast.data.prompts import HISTORY, TARGET, TEXT, USER, Prompts
from collm_fast.data.ragged import offsets_of


def prompts_of(rows: list[list[tuple[int, int, int]]], group: list[int], parts: int = 1) -> Prompts:
    """Prompts from rows of (role, token or id, part); every row has user 10 + group and item 20 + row."""
    flat = [token for row in rows for token in row]
    role, value, part = (np.array([token[k] for token in flat], dtype=np.int64) for k in range(3))
    return Prompts(
        offsets_of(np.array([len(row) for row in rows], dtype=np.int64)),
        np.where(role == TEXT, value, 0).astype(np.int32),
        role.astype(np.uint8),
        np.where(role == TEXT, 0, value).astype(np.int32),
        part.astype(np.uint8),
        np.array(group, dtype=np.int64),
        10 + np.array(group, dtype=np.int64),
        20 + np.arange(len(rows), dtype=np.int64),
        np.arange(len(rows), dtype=np.int64) % 2,
        parts,
    )


@st.composite
def some_prompts(draw: st.DrawFn) -> tuple[Prompts, np.ndarray]:
    """Random prompts whose rows often begin alike, and a selection of their rows."""
    token = st.one_of(
        st.tuples(st.just(TEXT), st.integers(1, 3), st.just(0)),
        st.tuples(st.sampled_from([USER, HISTORY, TARGET]), st.integers(1, 2), st.just(0)),
    )
    begins = draw(st.lists(st.lists(token, max_size=6), min_size=1, max_size=3))
    n = draw(st.integers(1, 12))
    rows, group = [], []
    for _ in range(n):
        begin = draw(st.sampled_from(begins))
        rows.append([*begin, *draw(st.lists(token, min_size=0 if begin else 1, max_size=5))])
        group.append(draw(st.integers(0, 3)))
    selection = draw(st.lists(st.integers(0, n - 1), max_size=15))
    return prompts_of(rows, group), np.array(selection, dtype=np.int64)


def plan_arguments(prompts: Prompts, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    return prompts.offsets, prompts.token_ids, prompts.slot_role, prompts.slot_id, prompts.group, rows


@requires("native")
@settings(deadline=None, max_examples=300)
@given(some_prompts())
def test_native_and_numpy_plan_alike(case: tuple[Prompts, np.ndarray]):
    arguments = plan_arguments(*case)
    for ours, twin in zip(_native.C().plan_tree(*arguments), plan_tree_numpy(*arguments), strict=True):
        np.testing.assert_array_equal(ours, twin)
        assert ours.dtype == twin.dtype


@settings(deadline=None, max_examples=300)
@given(some_prompts(), st.booleans(), st.booleans())
def test_what_a_row_sees_is_its_own_prompt(case: tuple[Prompts, np.ndarray], share: bool, pairs: bool):
    prompts, rows = case
    batch = pack(prompts, rows, share_prefix=share, pairs=pairs)
    mask = batch.mask()
    assert len(batch) == len(rows) and batch.row.tolist() == rows.tolist()
    assert batch.label.tolist() == prompts.label[rows].tolist() and batch.label.dtype == torch.float32
    for b, row in enumerate(rows.tolist()):
        seen = torch.nonzero(mask[batch.answer[b]]).flatten()
        where = slice(prompts.offsets[row], prompts.offsets[row + 1])
        assert batch.position_ids[seen].tolist() == list(range(where.stop - where.start))
        assert batch.token_ids[seen].tolist() == prompts.token_ids[where].tolist()
        slot = batch.row_index[seen].long()
        is_slot = slot >= 0
        np.testing.assert_array_equal(is_slot, prompts.slot_role[where] != TEXT)
        assert batch.slot_id[slot[is_slot]].tolist() == prompts.slot_id[where][is_slot.numpy()].tolist()
        np.testing.assert_array_equal(
            batch.slot_role[slot[is_slot]].numpy() == USER, prompts.slot_role[where][is_slot.numpy()] == USER
        )
        # Every token on the way sees exactly what stands before it.
        for place, token in enumerate(seen.tolist()):
            assert torch.nonzero(mask[token]).flatten().tolist() == seen[: place + 1].tolist()


def test_the_layout_of_two_trees():
    rows = [
        [(TEXT, 5, 0), (USER, 10, 0), (TEXT, 6, 0), (TARGET, 20, 0)],
        [(TEXT, 5, 0), (USER, 11, 0), (TEXT, 6, 0)],
        [(TEXT, 5, 0), (USER, 10, 0), (TEXT, 7, 0)],
    ]
    batch = pack(prompts_of(rows, [0, 1, 0]), np.array([0, 1, 2]))
    assert batch.token_ids.tolist() == [5, 0, 6, 0, 7, 5, 0, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert batch.tree.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.branch.tolist() == [-1, -1, 0, 0, 2, -1, -1, 1]
    assert batch.answer.tolist() == [3, 7, 4]
    assert batch.row_index.tolist() == [-1, 0, -1, 2, -1, -1, 1, -1]
    assert batch.slot_role.tolist() == [USER, USER, TARGET] and batch.slot_id.tolist() == [10, 11, 20]
    assert batch.slot_pair.tolist() == [[10, 0], [11, 0], [0, 20]]
    flat = pack(prompts_of(rows, [0, 1, 0]), np.array([2, 0]), share_prefix=False)
    assert flat.tree.tolist() == [0, 0, 0, 1, 1, 1, 1] and flat.answer.tolist() == [2, 6]


def test_slots_are_distinct_users_items_and_pairs():
    row = [(USER, 1, 0), (USER, 1, 1), (HISTORY, 7, 0), (HISTORY, 7, 1), (TARGET, 7, 0), (TARGET, 7, 1), (TEXT, 3, 0)]
    prompts = prompts_of([row, row], [0, 1], parts=2)
    batch = pack(prompts, np.array([0, 1]))
    assert batch.slot_id.tolist() == [1, 7] and batch.slot_role[0] == USER
    assert batch.row_index.tolist() == [0, 1, 2, 3, 2, 3, -1] * 2
    # The target of each user is a slot of its own, the history's item is not.
    paired = pack(prompts, np.array([0, 1]), pairs=True)
    assert paired.slot_pair.tolist() == [[1, 0], [0, 7], [10, 7], [11, 7]]
    assert paired.slot_role.tolist() == [USER, HISTORY, TARGET, TARGET] and paired.slot_id.tolist() == [1, 7, 7, 7]
    assert paired.row_index.tolist() == [0, 1, 2, 3, 4, 5, -1, 0, 1, 2, 3, 6, 7, -1]


def test_an_empty_batch_and_a_move():
    prompts = prompts_of([[(TEXT, 1, 0)]], [0])
    batch = pack(prompts, np.zeros(0, dtype=np.int64)).to("cpu")
    assert isinstance(batch, PackedBatch) and len(batch) == 0 and batch.mask().shape == (0, 0)
    for ours, twin in zip(
        plan_tree(*plan_arguments(prompts, batch.row.numpy())),
        plan_tree_numpy(*plan_arguments(prompts, batch.row.numpy())),
        strict=True,
    ):
        assert ours.shape == twin.shape == (0,) and ours.dtype == twin.dtype
    meta = pack(prompts, np.array([0])).to("meta")
    assert meta.token_ids.device.type == "meta" and meta.slot_pair.device.type == "meta"


PLAN_ERRORS: list[tuple[dict[int, Any], str]] = [
    ({5: [2]}, r"rows in \[0, 2\), got 2"),
    ({5: [0, -1]}, r"rows in \[0, 2\), got -1"),
    ({2: [0]}, "token_ids, slot_role and slot_id of one length, got 3, 1 and 3"),
    ({3: [0]}, "token_ids, slot_role and slot_id of one length, got 3, 3 and 1"),
    ({0: [0, 3]}, "3 offsets from 0 to 3, got 2"),
    ({0: [0, 2, 4]}, "3 offsets from 0 to 3, got 3"),
    ({0: [1, 2, 3]}, "3 offsets from 0 to 3, got 3"),
    ({0: [0, 0, 3]}, "at least one token in every row, got none in row 0"),
    ({0: [0, 9, 3]}, "at least one token in every row, got none in row"),
]


@pytest.mark.parametrize("change,message", PLAN_ERRORS)
@pytest.mark.parametrize("which", ["numpy", pytest.param("native", marks=requires("native"))])
def test_bad_plans(change: dict[int, Any], message: str, which: str):
    prompts = prompts_of([[(TEXT, 1, 0), (TEXT, 2, 0)], [(TEXT, 1, 0)]], [0, 0])
    arguments = list(plan_arguments(prompts, np.array([0, 1])))
    for place, value in change.items():
        arguments[place] = np.array(value, dtype=arguments[place].dtype)
    with pytest.raises(ValueError, match="plan_tree: expected " + message):
        (plan_tree_numpy if which == "numpy" else _native.C().plan_tree)(*arguments)


@requires("native")
def test_the_native_planner_refuses_other_types():
    prompts = prompts_of([[(TEXT, 1, 0)]], [0])
    with pytest.raises(TypeError):
        _native.C().plan_tree(*plan_arguments(prompts, np.array([0], dtype=np.int32)))


ORDERS = ["group", "random", "flat"]


@settings(deadline=None, max_examples=200)
@given(
    some_prompts(),
    st.sampled_from(ORDERS),
    st.one_of(st.none(), st.integers(1, 6)),
    st.one_of(st.none(), st.integers(1, 40)),
    st.booleans(),
)
def test_every_row_comes_once_within_the_limits(
    case: tuple[Prompts, np.ndarray], order: Any, size: int | None, room: int | None, shuffled: bool
):
    prompts, rows = case
    if size is None and room is None:
        size = 3

    def draw() -> list[np.ndarray]:
        generator = np.random.default_rng(5) if shuffled or order == "random" else None
        return batches(prompts, order=order, batch_size=size, max_tokens=room, generator=generator, rows=rows)

    found = draw()
    assert sorted(np.concatenate([*found, rows[:0]]).tolist()) == sorted(rows.tolist())
    assert all(np.array_equal(one, two) for one, two in zip(found, draw(), strict=True))
    for batch in found:
        assert len(batch) > 0 and (size is None or len(batch) <= size)
        if room is not None and len(batch) > 1:
            assert len(pack(prompts, batch, share_prefix=order == "group").token_ids) <= room
    if size is not None and room is None:
        assert all(len(batch) == size for batch in found[:-1])


def test_orders():
    prompts = prompts_of([[(TEXT, 1, 0), (TEXT, 2, 0)]] * 10, [0, 1, 2, 0, 1, 0, 3, 3, 3, 3])
    grouped = batches(prompts, order="group", batch_size=5)
    # The groups 0 (three rows), 1 (two), 2 (one), 3 (four): whole where they fit.
    assert [batch.tolist() for batch in grouped] == [[0, 3, 5, 1, 4], [2, 6, 7, 8, 9]]
    assert [b.tolist() for b in batches(prompts, order="flat", batch_size=6)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert [b.tolist() for b in batches(prompts, order="flat", max_tokens=7)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    # A tree of k equal rows has 1 + k tokens.
    assert [b.tolist() for b in batches(prompts, order="group", max_tokens=5)] == [[0, 3, 5], [1, 4, 2], [6, 7, 8, 9]]
    one, two = (
        np.concatenate(batches(prompts, order="random", batch_size=4, generator=np.random.default_rng(seed)))
        for seed in (1, 2)
    )
    assert one.tolist() != two.tolist()
    assert batches(prompts, order="group", batch_size=4, rows=np.zeros(0)) == []
    assert batches(prompts, order="flat", batch_size=4, rows=np.zeros(0)) == []
    long = batches(prompts, order="flat", max_tokens=1)
    assert [len(batch) for batch in long] == [1] * 10


def test_groups_larger_than_a_batch_are_cut():
    prompts = prompts_of([[(TEXT, 1, 0), (TEXT, 2, 0)]] * 7, [0] * 7)
    assert [batch.tolist() for batch in batches(prompts, order="group", batch_size=3)] == [[0, 1, 2], [3, 4, 5], [6]]
    # 1 shared token and 1 for each row.
    assert [len(batch) for batch in batches(prompts, order="group", max_tokens=4)] == [3, 3, 1]


def test_group_rows_mixes_groups_and_keeps_the_pieces_whole():
    prompts = prompts_of([[(TEXT, 1, 0), (TEXT, 2, 0)]] * 12, np.repeat(np.arange(3), 4).tolist())
    cut = batches(prompts, order="group", batch_size=6, group_rows=2)
    assert [batch.tolist() for batch in cut] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    for seed in range(5):
        generator = np.random.default_rng(seed)
        pieces = np.concatenate(batches(prompts, order="group", batch_size=6, group_rows=2, generator=generator))
        assert sorted(pieces) == list(range(12))
        assert (pieces.reshape(-1, 2) == pieces[::2, None] + [0, 1]).all() and (pieces[::2] % 2 == 0).all()
    # As small as a batch it changes nothing, and larger neither.
    whole = [batch.tolist() for batch in batches(prompts, order="group", batch_size=3)]
    for rows in (3, 100):
        assert [b.tolist() for b in batches(prompts, order="group", batch_size=3, group_rows=rows)] == whole
    # 1 shared token and 1 for each row, in each piece.
    room = batches(prompts, order="group", max_tokens=6, group_rows=2)
    assert [batch.tolist() for batch in room] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_grouping_shares_more_than_chance():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(100), 3)[rng.permutation(300)].tolist()
    rows = [[*[(TEXT, 1 + g, 0)] * 20, (TEXT, 200 + r, 0)] for r, g in enumerate(group)]
    prompts = prompts_of(rows, group)

    def tokens(order: Any) -> int:
        found = batches(prompts, order=order, batch_size=16, generator=np.random.default_rng(1))
        return sum(len(pack(prompts, batch).token_ids) for batch in found)

    # 100 prefixes of 20 and 300 last tokens are 2,300; cutting a few groups costs at most a prefix a batch.
    assert 2300 <= tokens("group") <= 2300 + 20 * 19 and tokens("random") > 1.6 * tokens("group")


def test_common_prefix():
    rows = [[(TEXT, 1, 0), (TEXT, 2, 0), (TEXT, 3, 0)], [(TEXT, 1, 0), (USER, 2, 0), (TEXT, 3, 0)], [(TEXT, 1, 0)]]
    prompts = prompts_of(rows, [0, 0, 0])
    assert common_prefix(prompts, np.array([0, 1, 0, 2, 1]), np.array([0, 0, 2, 0, 1])).tolist() == [2, 1, 0, 0, 2]


def test_bad_requests():
    prompts = prompts_of([[(TEXT, 1, 0)]] * 2, [0, 1])
    cases: dict[str, dict[str, Any]] = {
        "batch_size or max_tokens of at least 1, got None and None": {"order": "flat"},
        "batch_size or max_tokens of at least 1, got 0 and None": {"order": "flat", "batch_size": 0},
        "batch_size or max_tokens of at least 1, got None and -3": {"order": "flat", "max_tokens": -3},
        "a generator for order 'random', got None": {"order": "random", "batch_size": 1},
        "group_rows of at least 1, got 0": {"order": "group", "batch_size": 1, "group_rows": 0},
        "order group, random or flat, got 'best'": {"order": "best", "batch_size": 1},
        r"rows in \[0, 2\), got 2": {"order": "flat", "batch_size": 1, "rows": np.array([0, 2])},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match="batches: expected " + message):
            batches(prompts, **options)

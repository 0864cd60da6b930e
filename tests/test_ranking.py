"""Full ranking against a brute force over Python sets and lists, hand-made numbers, and scikit-learn's NDCG.

Integer tables make every dot product exact, so the native loop and its twin in torch must agree to the bit there.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import astuple

import numpy as np
import pytest
import torch
from conftest import requires
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from collm_fast import _native, ranking
from collm_fast.ranking import Lists, full_ranking, top_items

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ["cpu", pytest.param("cuda", marks=requires("cuda"))]
PATHS = [pytest.param("native", marks=requires("native")), "torch"]
EMPTY = Lists.of([], [], 2)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Runs a test with the native loop and with its twin."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "_C", None)
    return request.param


def some_lists(rng: np.random.Generator, num_users: int, num_items: int, pairs: int) -> Lists:
    return Lists.of(rng.integers(0, num_users, pairs), rng.integers(0, num_items, pairs), num_users)


def integers(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Small whole numbers: every dot product is exact in every dtype and order, and ties are everywhere."""
    return torch.from_numpy(rng.integers(-2, 3, shape)).float()


def i64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def as_set(lists: Lists, user: int) -> set[int]:
    return set(lists.items[lists.offsets[user] : lists.offsets[user + 1]].tolist())


def brute_lists(user: torch.Tensor, item: torch.Tensor, seen: Lists, k: int) -> list[list[int]]:
    """One Python sort a user, by (-score, id)."""
    scores = (user.double() @ item.double().T).tolist()
    out = []
    for u, row in enumerate(scores):
        candidates = set(range(len(item))) - as_set(seen, u)
        out.append(sorted(candidates, key=lambda i, row=row: (-row[i], i))[:k])
    return out


def brute_metrics(lists: list[list[int]], held_out: Lists, k: int) -> tuple[float, float, float, int, int]:
    recall, ndcg, precision = [], [], []
    for u, ranked in enumerate(lists):
        held = as_set(held_out, u)
        if not held:
            continue
        hits = [item in held for item in ranked[:k]]
        ideal = sum(1 / math.log2(r + 2) for r in range(min(k, len(held))))
        recall.append(sum(hits) / len(held))
        precision.append(sum(hits) / k)
        ndcg.append(sum(hit / math.log2(r + 2) for r, hit in enumerate(hits)) / ideal)
    counted = len(recall)
    means = [sum(values) / counted if counted else math.nan for values in (recall, ndcg, precision)]
    return (*means, counted, len(lists) - counted)


def padded(lists: list[list[int]], k: int) -> list[list[int]]:
    return [ranked + [-1] * (k - len(ranked)) for ranked in lists]


CASES = st.tuples(
    st.integers(1, 20),  # users
    st.integers(1, 70),  # items
    st.integers(0, 5),  # width
    st.integers(1, 24),  # k
    st.integers(0, 60),  # seen pairs
    st.sampled_from([None, 1, 3, 7, 1000]),  # block
    st.integers(0, 10**6),  # seed
)


@pytest.mark.parametrize("native", [pytest.param(True, marks=requires("native")), False])
@settings(max_examples=150, deadline=None)
@given(CASES)
def test_lists_and_metrics_equal_a_brute_force(native, case):
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(_native, "_C", None)
        check_against_a_brute_force(case)


def check_against_a_brute_force(case):
    U, num_items, D, k, pairs, block, seed = case
    rng = np.random.default_rng(seed)
    user, item = integers(rng, U, D), integers(rng, num_items, D)
    seen, held_out = some_lists(rng, U, num_items, pairs), some_lists(rng, U, num_items, int(rng.integers(0, 40)))
    expected = brute_lists(user, item, seen, k)
    for tables in ((user, item), (user.double(), item.double())):
        items, scores = top_items(*tables, seen, k, block=block)
        assert items.tolist() == padded(expected, k)
        assert torch.equal(scores == -torch.inf, items < 0)
        right = (user @ item.T).to(scores.dtype).gather(1, items.clamp(min=0))
        assert torch.equal(torch.where(items < 0, -torch.inf, right), scores)
        cutoffs = list(dict.fromkeys([k, 1, 5]))
        result = full_ranking(*tables, seen, held_out, k=cutoffs, block=block)
        assert list(result) == cutoffs
        for cutoff in cutoffs:
            longer = brute_lists(user, item, seen, cutoff)
            right_metrics = brute_metrics(longer, held_out, cutoff)
            assert astuple(result[cutoff]) == pytest.approx(right_metrics, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_users_may_leave_early_and_lose_nothing(path, dtype):
    """Lengths of items over many powers of two, so that most are never reached; still exact, and so are the ties."""
    rng = np.random.default_rng(11)
    user, item = integers(rng, 70, 4).to(dtype), integers(rng, 3000, 4).to(dtype)
    item *= torch.exp2(torch.from_numpy(rng.integers(-12, 3, (3000, 1)))).to(dtype)
    user[7], item[::50] = 0, 0
    seen = some_lists(rng, 70, 3000, 9000)
    for k in (1, 6, 60):
        items, _ = top_items(user, item, seen, k)
        assert items.tolist() == brute_lists(user, item, seen, k)


def test_the_bound_is_tight():
    """Lengths within a factor of two and directions at random: whoever left 5 % too early would lose items."""
    rng = np.random.default_rng(13)
    user, item = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 3)))) for n in (40, 4000))
    item *= torch.from_numpy(rng.uniform(0.5, 1, (4000, 1)))
    items, _ = top_items(user, item, None, 30)
    assert items.tolist() == brute_lists(user, item, Lists.of([], [], 40), 30)


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e150])
def test_sizes_at_the_ends_of_the_range(path, size):
    """Products that vanish tie; lengths whose squares overflow or vanish dismiss nobody too early."""
    rng = np.random.default_rng(12)
    user, item = (torch.from_numpy(rng.normal(size=(n, 5)) * size) for n in (20, 2000))
    for left, right in ((user, item), (user, item / size)):
        scores = np.zeros((20, 2000))
        for d in range(5):
            scores += left[:, d : d + 1].numpy() * right[:, d].numpy()
        items, found = top_items(left, right, None, 10)
        assert np.isfinite(found.numpy()).all()
        if path == "torch" and size < 1e-300:
            continue  # A matrix product may flush what is below the smallest normal number.
        right_order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        assert np.allclose(np.take_along_axis(scores, right_order, 1), found, rtol=1e-12, atol=1e-320)


def test_a_hand_computed_example():
    """Two users of three count. Ranks of user 0 without item 0: 1, 2, 3, 4; of user 2: 4, 3, 2, 1, 0."""
    user = torch.tensor([[1.0], [1.0], [-1.0]])
    item = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
    seen = Lists.of([0, 0], [0, 0], 3)
    held_out = Lists.of([0, 0, 0, 2, 2, 2], [1, 3, 0, 3, 3, 1], 3)
    result = full_ranking(user, item, seen, held_out, k=[2, 3])
    # User 0 hits at ranks 1 and 3, of 3 held out (item 0 is also seen: counted, never hit); user 2 at ranks 2 and 4.
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    assert result[2].recall == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result[2].precision == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert result[2].ndcg == pytest.approx((1 / (1 + second) + second / (1 + second)) / 2)
    assert result[3].recall == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result[3].precision == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert result[3].ndcg == pytest.approx(((1 + third) / (1 + second + third) + second / (1 + second)) / 2)
    assert (result[2].users_counted, result[2].users_skipped) == (2, 1)


def test_ndcg_equals_sklearn_where_all_is_a_candidate():
    """scikit-learn normalises by the best order of the k first, which is the same ideal for 0/1 gains."""
    rng = np.random.default_rng(5)
    user, item = torch.from_numpy(rng.normal(size=(12, 8))), torch.from_numpy(rng.normal(size=(50, 8)))
    held_out = some_lists(rng, 12, 50, 60)
    gains = np.array([[i in as_set(held_out, u) for i in range(50)] for u in range(12)], dtype=float)
    kept = gains.any(axis=1)
    scores = (user @ item.T).numpy()
    for k, metrics in full_ranking(user, item, Lists.of([], [], 12), held_out, k=[1, 7, 20, 50]).items():
        assert metrics.ndcg == pytest.approx(ndcg_score(gains[kept], scores[kept], k=k), abs=1e-12)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("device", DEVICES)
def test_every_dtype_and_device(path, dtype, device):
    """Half precision is widened, never computed in: what comes out are the float32 scores of the rounded tables."""
    rng = np.random.default_rng(3)
    user, item = (torch.from_numpy(rng.normal(size=(n, 33))).to(device, dtype) for n in (40, 300))
    seen = some_lists(rng, 40, 300, 900)
    items, scores = top_items(user, item, seen, 20)
    assert items.tolist() == brute_lists(user.cpu(), item.cpu(), seen, 20)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and scores.device == user.device
    right = (user.double() @ item.double().T).gather(1, items)
    assert float((scores - right).norm() / right.norm()) < (1e-14 if dtype == torch.float64 else 3e-7)
    held_out = some_lists(rng, 40, 300, 200)
    expected = brute_metrics(items.tolist(), held_out, 20)
    assert astuple(full_ranking(user, item, seen, held_out)[20]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block", [None, 1, 7, 64])
def test_ties_across_item_blocks_keep_the_lower_id(monkeypatch, block):
    monkeypatch.setattr(ranking, "_BLOCK_BYTES", {"cpu": 3000})
    rng = np.random.default_rng(9)
    user, item, seen = integers(rng, 30, 2), integers(rng, 400, 2), some_lists(rng, 30, 400, 2000)
    items, _ = ranking._top_torch(user, item, seen, np.arange(30), 25, block)
    assert items.tolist() == padded(brute_lists(user, item, seen, 25), 25)


def test_many_users_are_summed_in_parts(path, monkeypatch):
    rng = np.random.default_rng(2)
    user, item, seen, held_out = (
        integers(rng, 90, 3),
        integers(rng, 60, 3),
        some_lists(rng, 90, 60, 500),
        some_lists(rng, 90, 60, 100),
    )
    whole = full_ranking(user, item, seen, held_out, k=8)[8]
    monkeypatch.setattr(ranking, "_PLACES", 50)
    assert astuple(full_ranking(user, item, seen, held_out, k=8)[8]) == pytest.approx(astuple(whole), abs=1e-12)
    assert astuple(whole) == pytest.approx(brute_metrics(brute_lists(user, item, seen, 8), held_out, 8), abs=1e-12)


def test_the_number_of_threads_changes_no_bit(path):
    rng = np.random.default_rng(4)
    user, item = (torch.from_numpy(rng.normal(size=(n, 64))).float() for n in (500, 700))
    seen, held_out = some_lists(rng, 500, 700, 5000), some_lists(rng, 500, 700, 900)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*top_items(user, item, seen, 20), full_ranking(user, item, seen, held_out)[20]))
    finally:
        torch.set_num_threads(before)
    for items, scores, metrics in results[1:]:
        assert torch.equal(items, results[0][0]) and torch.equal(scores, results[0][1]) and metrics == results[0][2]


def test_nothing_to_rank(path):
    none = torch.zeros(0, 4)
    items, scores = top_items(torch.ones(2, 4), none, None, 3)
    assert items.tolist() == [[-1] * 3] * 2 and (scores == -torch.inf).all()
    assert top_items(none, torch.ones(5, 4), None, 3)[0].shape == (0, 3)
    result = full_ranking(torch.ones(2, 4), torch.ones(5, 4), EMPTY, EMPTY)[20]
    assert math.isnan(result.recall) and math.isnan(result.ndcg) and math.isnan(result.precision)
    assert (result.users_counted, result.users_skipped) == (0, 2)
    # A user who has seen everything gets no item, and misses.
    everything = Lists.of([0] * 5, range(5), 2)
    assert top_items(torch.ones(2, 4), torch.ones(5, 4), everything, 2)[0].tolist() == [[-1, -1], [0, 1]]
    assert full_ranking(torch.ones(2, 4), torch.ones(5, 4), everything, Lists.of([0], [4], 2))[20].recall == 0.0


@requires("native")
@pytest.mark.parametrize("dtype", FLOATING)
def test_the_native_scores_do_not_depend_on_the_block(dtype):
    """One chain of fused multiply-adds a score: the same bits in every tile, at odd sizes, for one user and for all."""
    rng = np.random.default_rng(6)
    user, item = (torch.from_numpy(rng.normal(size=(n, 37))).to(dtype) for n in (61, 203))
    seen = some_lists(rng, 61, 203, 800)
    items, scores = top_items(user, item, seen, 30)
    for block in (1, 5, 24, 61, 10**6, sys.maxsize):
        again = top_items(user, item, seen, 30, block=block)
        assert torch.equal(items, again[0]) and torch.equal(scores, again[1])
    for u in (0, 60):
        alone = Lists.of(np.zeros(len(as_set(seen, u)), dtype=int), sorted(as_set(seen, u)), 1)
        again = top_items(user[u : u + 1], item, alone, 30)
        assert torch.equal(items[u : u + 1], again[0]) and torch.equal(scores[u : u + 1], again[1])


SCORES = """
import numpy as np, torch
from collm_fast.ranking import top_items
rng = np.random.default_rng(1)
text = ""
for dtype in (torch.float32, torch.float64):
    user, item = (torch.from_numpy(rng.normal(size=(n, 19))).to(dtype) for n in (29, 71))
    items, scores = top_items(user, item, None, 9)
    text += f"{items.tolist()} {[value.hex() for value in scores.flatten().tolist()]}"
"""


@requires("native")
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_every_instruction_set_gives_the_same_bits(simd):
    here: dict[str, str] = {}
    exec(SCORES, here)
    command, environment = [sys.executable, "-c", SCORES + "print(text)"], {**os.environ, "COLLM_FAST_SIMD": simd}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == here["text"], done.stderr


@requires("native")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": np.zeros((2, 4), np.float32)}, r"user \[U, D\] and item \[I, D\]"),
        ({"begin": i64(0)}, "begin and end of 2 users, got 1 and 2"),
        ({"k": 0}, "k, height and threads of at least 1, got 0, 5 and 1"),
        ({"end": i64(1, 9)}, r"spans in \[0, 3\], got 1 to 9 for user 1"),
        ({"begin": i64(2, 0), "end": i64(1, 3)}, "got 2 to 1 for user 0"),
    ],
)
def test_native_errors(changes, message):
    arguments = {
        "user": np.zeros((2, 3), np.float32),
        "item": np.zeros((4, 3), np.float32),
        "begin": i64(0, 1),
        "end": i64(1, 3),
        "seen": np.array([0, 1, 2], dtype=np.int32),
        "k": 1,
        "height": 5,
        "threads": 1,
    }
    with pytest.raises(ValueError, match="top_items: expected .*" + message):
        _native.C().top_items(**{**arguments, **changes})


def test_tables_that_need_a_gradient_or_are_strided():
    rng = np.random.default_rng(8)
    user, item = integers(rng, 6, 8).requires_grad_(), integers(rng, 30, 8)
    expected = top_items(user.detach()[:, ::2].contiguous(), item[:, ::2].contiguous(), None, 4)
    items, scores = top_items(user[:, ::2], item[:, ::2], None, 4)
    assert torch.equal(items, expected[0]) and torch.equal(scores, expected[1]) and not scores.requires_grad


def test_lists_sort_and_merge():
    lists = Lists.of(torch.tensor([2, 0, 2, 2]), np.array([7, 1, 3, 7], dtype=np.int32), 4)
    assert lists.offsets.tolist() == [0, 1, 1, 3, 3] and lists.items.tolist() == [1, 3, 7] and lists.num_users == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lists(i64(), i64()), r"Lists: expected offsets of shape \[U \+ 1\], int64, got \[0\], int64"),
        (lambda: Lists(np.zeros(2), i64()), "offsets of shape .* got .*float64"),
        (lambda: Lists(i64(0, 1), np.zeros(1)), "items of shape .* int32 or int64, got .*float64"),
        (lambda: Lists(i64(0, 2), i64(1)), "offsets from 0 to 1 that do not decrease"),
        (lambda: Lists(i64(0, 2, 1, 3), i64(1, 2, 3)), "offsets from 0 to 3 that do not decrease"),
        (lambda: Lists(i64(0, 1), i64(-1)), "items of at least 0, got -1 at place 0"),
        (lambda: Lists(i64(0, 1, 3), i64(5, 2, 2)), "items that ascend inside a user, got 2, 2 at place 1"),
        (lambda: Lists.of([0, 2], [0, 0], 2), r"users in \[0, 2\), got 2 in row 1"),
        (lambda: Lists.of([0], [-3], 2), r"items in \[0, .*\), got -3 in row 0"),
        (lambda: Lists.of([0], [0, 1], 2), "users and items of equal length, got 1 and 2"),
        (lambda: Lists.of([0.5], [0], 2), r"users of shape \[n\], integers, got \[1\], float64"),
    ],
)
def test_lists_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def replaced(**changes):
    arguments = {"user": torch.ones(2, 3), "item": torch.ones(4, 3), "seen": EMPTY, "held_out": EMPTY}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": torch.ones(2)}, r"user of shape \[n, D\], floating, got \[2\], torch.float32"),
        ({"item": torch.ones(4, 3, dtype=torch.int64)}, r"item of shape .* floating, got \[4, 3\], torch.int64"),
        ({"item": torch.ones(4, 2)}, "user and item of one width, dtype and device, got .* and .*"),
        ({"item": torch.ones(4, 3).double()}, "user and item of one width, dtype and device"),
        ({"user": torch.ones(2, 3, device="meta"), "item": torch.ones(4, 3, device="meta")}, "a CPU or a CUDA device"),
        ({"user": torch.tensor([[1, 1, 1], [1, math.nan, 1]])}, "finite user embeddings, got another number in row 1"),
        ({"item": torch.tensor([[-math.inf, 1, 1]])}, "finite item embeddings, got another number in row 0"),
        ({"user": torch.full((2, 3), 1e20), "item": torch.full((4, 3), -1e20)}, r"at most 3.4e\+38.* got 3e\+40"),
        ({"seen": Lists.of([], [], 3)}, "seen of 2 users, as the table has, got 3"),
        ({"seen": Lists.of([0], [4], 2)}, r"items of seen in \[0, 4\), got 4"),
        ({"held_out": Lists.of([0], [9], 2)}, r"items of held_out in \[0, 4\), got 9"),
        ({"k": 0}, "k to be an integer of at least 1, got 0"),
        ({"k": []}, "at least one k, got none"),
        ({"k": [3, 2.5]}, "k to be an integer of at least 1, got 2.5"),
        ({"k": 2.5}, "k to be an integer of at least 1, got 2.5"),
        ({"block": 0}, "block to be an integer of at least 1, got 0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match="full_ranking: expected .*" + message):
        full_ranking(**replaced(**changes))
    arguments = replaced(**{"k": 2, **changes})
    if arguments.pop("held_out") is EMPTY and changes.get("k") not in ([], [3, 2.5]):
        with pytest.raises(ValueError, match="top_items: expected .*" + message):
            top_items(**arguments)

"""Metrics against scikit-learn, a brute force over all pairs, and hand-made cases."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sk_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score

from collm_fast import metrics

# Few distinct scores and users: ties and one-class users are then common.
ROWS = st.lists(
    st.tuples(st.integers(-3, 3), st.sampled_from([-1.5, 0.0, 0.25, 0.5, 1e-300, 7.0]), st.integers(0, 1)),
    min_size=1,
    max_size=40,
)


def columns(rows: list[tuple[int, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    user, score, label = zip(*rows, strict=True)
    return np.array(user), np.array(score), np.array(label)


def brute_auc(score: np.ndarray, label: np.ndarray) -> float:
    pairs = [(p, n) for p in score[label == 1] for n in score[label == 0]]
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs) if pairs else math.nan


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) < 1e-12


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_auc_and_uauc_equal_a_brute_force(rows):
    user, score, label = columns(rows)
    result = metrics.auc(score, label)
    assert same(result.value, brute_auc(score, label))
    assert (result.positives, result.negatives) == (label.sum(), (1 - label).sum())
    per_user = [brute_auc(score[user == u], label[user == u]) for u in np.unique(user)]
    counted = [value for value in per_user if not math.isnan(value)]
    mine = metrics.uauc(user, score, label)
    assert same(mine.value, float(np.mean(counted)) if counted else math.nan)
    assert (mine.users_counted, mine.users_skipped) == (len(counted), len(per_user) - len(counted))


@settings(max_examples=200, deadline=None)
@given(ROWS, st.one_of(st.none(), st.integers(1, 12)))
def test_ndcg_equals_sklearn_user_by_user(rows, k):
    user, score, label = columns(rows)
    expected = []
    for u in np.unique(user):
        mine = user == u
        if label[mine].sum() == 0:
            continue
        # scikit-learn refuses lists of one row; such a user with a positive has NDCG 1.
        expected.append(1.0 if mine.sum() == 1 else ndcg_score([label[mine]], [score[mine]], k=k))
    result = metrics.ndcg(user, score, label, k=k)
    assert same(result.value, float(np.mean(expected)) if expected else math.nan)
    assert result.users_counted == len(expected)
    assert result.users_skipped == len(np.unique(user)) - len(expected)
    two = [u for u in np.unique(user) if 0 < label[user == u].mean() < 1]
    mine = np.isin(user, two)
    other = metrics.ndcg(user[mine], score[mine], label[mine], k)
    assert same(metrics.ndcg(user, score, label, k, both_classes=True).value, other.value)
    assert metrics.ndcg(user, score, label, both_classes=True).users_counted == len(two)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 1000))
def test_order_of_rows_and_monotone_maps_change_nothing(rows, seed):
    user, score, label = columns(rows)
    other = np.random.default_rng(seed).permutation(len(user))
    for a, b in (
        (metrics.auc(score, label), metrics.auc(4 * score[other], label[other])),
        (metrics.uauc(user, score, label), metrics.uauc(user[other] + 9, 4 * score[other], label[other])),
        (metrics.ndcg(user, score, label), metrics.ndcg(-user[other], 4 * score[other], label[other])),
    ):
        assert same(a.value, b.value)


def test_auc_and_log_loss_equal_sklearn(seed=3):
    rng = np.random.default_rng(seed)
    score, label = rng.random(2000).astype(np.float32).round(2), rng.integers(0, 2, 2000)
    assert metrics.auc(score, label).value == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    p = score.astype(np.float64).clip(0.01, 0.99)
    assert metrics.log_loss(p, label).value == pytest.approx(sk_log_loss(label, p), abs=1e-12)


def test_log_loss_of_saturated_probabilities_is_finite():
    assert metrics.log_loss([1.0, 0.0], [0, 1]).value == pytest.approx(-math.log(1e-7))
    assert metrics.log_loss([1.0, 0.0], [1, 0]).value == pytest.approx(0.0, abs=1e-6)


def test_undefined_values_are_nan_not_errors():
    nothing = np.empty(0)
    assert math.isnan(metrics.auc(nothing, nothing).value)
    assert metrics.uauc(nothing, nothing, nothing).users_counted == 0
    assert math.isnan(metrics.ndcg(nothing, nothing, nothing).value)
    assert metrics.log_loss(nothing, nothing).rows == 0
    assert math.isnan(metrics.bootstrap(nothing, nothing, nothing).uauc.low)
    one_class = metrics.bootstrap([1, 2], [0.1, 0.2], [1, 1], samples=5)
    assert math.isnan(one_class.auc.low) and math.isnan(one_class.uauc.high)


def test_bootstrap_is_deterministic_and_equals_explicit_resampling():
    rng = np.random.default_rng(0)
    user, label = rng.integers(0, 30, 600), rng.integers(0, 2, 600)
    score = (label * 0.4 + rng.standard_normal(600)).round(1)
    result = metrics.bootstrap(user, score, label, samples=200, seed=4)
    assert result == metrics.bootstrap(user, score, label, samples=200, seed=4)
    assert result != metrics.bootstrap(user, score, label, samples=200, seed=5)
    draw, aucs, uaucs = np.random.default_rng(4), [], []
    for _ in range(200):
        drawn = draw.integers(30, size=30)
        rows = np.concatenate([np.flatnonzero(user == u) for u in drawn])
        copy = np.concatenate([np.full((user == u).sum(), i) for i, u in enumerate(drawn)])
        aucs.append(metrics.auc(score[rows], label[rows]).value)
        uaucs.append(metrics.uauc(copy, score[rows], label[rows]).value)
    assert (result.auc.low, result.auc.high) == pytest.approx(tuple(np.quantile(aucs, [0.025, 0.975])), abs=1e-12)
    assert (result.uauc.low, result.uauc.high) == pytest.approx(tuple(np.quantile(uaucs, [0.025, 0.975])), abs=1e-12)
    assert result.auc.low < metrics.auc(score, label).value < result.auc.high


def test_a_million_rows_take_seconds():
    rng = np.random.default_rng(1)
    user, score, label = rng.integers(0, 50_000, 1_000_000), rng.random(1_000_000), rng.integers(0, 2, 1_000_000)
    begin = time.process_time()
    assert metrics.uauc(user, score, label).users_counted > 49_000
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc([0.1, 0.2], [1]), r"auc: expected score and label of equal length, got 2 and 1"),
        (lambda: metrics.auc([[0.1]], [1]), r"auc: expected score and label of shape \[n\], got \(1, 1\) and \(1,\)"),
        (lambda: metrics.auc([0.1, np.nan], [1, 0]), r"auc: expected finite score, got nan at row 1"),
        (lambda: metrics.auc([0.1, np.inf], [1, 0]), r"auc: expected finite score, got inf at row 1"),
        (lambda: metrics.auc(["a"], [1]), r"auc: expected score of real numbers, got dtype <U1"),
        (lambda: metrics.uauc([1], [0.5], [2]), r"uauc: expected label in \{0, 1\}, got 2 at row 0"),
        (lambda: metrics.uauc([1], [0.5], [0.5]), r"uauc: expected label in \{0, 1\}, got 0.5 at row 0"),
        (lambda: metrics.uauc([1], [0.5], [np.nan]), r"uauc: expected label in \{0, 1\}, got nan at row 0"),
        (lambda: metrics.uauc([1, 2], [0.5], [1]), r"uauc: expected user of shape \[1\], one a row, got \[2\]"),
        (lambda: metrics.ndcg([0.5], [0.5], [1]), r"ndcg: expected user of integer ids, got dtype float64"),
        (lambda: metrics.ndcg([1], [0.5], [1], k=0), r"ndcg: expected k to be at least 1 or None, got 0"),
        (lambda: metrics.log_loss([0.5, 1.5], [1, 0]), r"log_loss: expected probability in \[0, 1\], got 1.5 at row 1"),
        (lambda: metrics.bootstrap([1], [0.5], [1], samples=0), r"bootstrap: expected samples to be at least 1, got 0"),
        (lambda: metrics.bootstrap([1], [0.5], [1], level=1.0), r"bootstrap: expected level in \(0, 1\), got 1.0"),
    ],
)
def test_bad_input_names_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

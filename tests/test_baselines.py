"""The scores that need no learning: by hand, at their edges, and on the paper's split against numbers known before."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import data_folder, requires

from collm_fast import metrics
from collm_fast.baselines import item_mean, item_user_mean
from collm_fast.data.dataset import Split
from collm_fast.evaluate import metric_table


def split_of(uid, iid, label, not_cold=None) -> Split:
    n = len(uid)
    uid, iid, label = (np.asarray(values, dtype=np.int64) for values in (uid, iid, label))
    warm = np.ones(n, bool) if not_cold is None else np.asarray(not_cold, bool)
    return Split(uid, iid, label, np.arange(n), np.zeros(n + 1, np.int64), np.empty(0, np.int64), warm)


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


TRAIN = split_of([1, 1, 2, 2], [1, 2, 1, 3], [1, 0, 1, 0])


def test_item_mean_is_the_smoothed_share_of_likes():
    score = item_mean(TRAIN, split_of([1, 1, 1], [1, 3, 9], [0, 0, 0]))
    assert score == pytest.approx([(2 + 5 * 0.5) / 7, (0 + 5 * 0.5) / 6, 0.5])


def test_item_user_mean_adds_logits():
    train = split_of([1, 1, 2], [1, 2, 1], [1, 0, 1])
    g = 2 / 3
    score = item_user_mean(train, split_of([2, 7], [2, 1], [0, 0]))
    item2, user2, item1 = (0 + 5 * g) / 6, (1 + 5 * g) / 6, (2 + 5 * g) / 7
    assert score == pytest.approx([logit(item2) + logit(user2) - logit(g), logit(item1)])


def test_one_class_stays_finite():
    train = split_of([1, 2], [1, 2], [1, 1])
    assert np.isfinite(item_user_mean(train, TRAIN)).all()
    assert (item_mean(train, TRAIN) == 1.0).all()


@pytest.mark.parametrize("baseline", [item_mean, item_user_mean])
def test_an_empty_train_split_is_an_error(baseline):
    with pytest.raises(ValueError, match=f"{baseline.__name__}: expected rows in train, got none"):
        baseline(split_of([], [], []), TRAIN)


def test_metric_table_has_the_contract_s_keys_and_null_instead_of_nan():
    rng = np.random.default_rng(0)
    uid, label, p = rng.integers(1, 9, 200), rng.integers(0, 2, 200), rng.random(200)
    warm = uid < 6
    table = metric_table(uid, p, p, label, warm)
    assert list(table) == ["all", "warm", "cold"]
    for name, rows in (("all", warm | ~warm), ("warm", warm), ("cold", ~warm)):
        entry = table[name]
        assert list(entry) == [
            "auc", "auc_low", "auc_high", "uauc", "uauc_low", "uauc_high", "users_counted", "ndcg", "log_loss", "rows",
        ]  # fmt: skip
        assert entry["auc"] == metrics.auc(p[rows], label[rows]).value
        assert entry["uauc"] == metrics.uauc(uid[rows], p[rows], label[rows]).value
        assert entry["ndcg"] == metrics.ndcg(uid[rows], p[rows], label[rows]).value
        assert entry["log_loss"] == metrics.log_loss(p[rows], label[rows]).value
        assert entry["auc_low"] < entry["auc"] < entry["auc_high"]
        assert entry["uauc_low"] < entry["uauc"] < entry["uauc_high"]
        assert entry["rows"] == rows.sum()
    assert table == metric_table(uid, p, p, label, warm)
    empty = metric_table(uid, p, None, label, np.ones(200, bool))["cold"]
    assert empty == dict.fromkeys(empty, None) | {"users_counted": 0, "rows": 0}
    assert metric_table(uid, p, None, label, warm)["all"]["log_loss"] is None
    with pytest.raises(ValueError, match=r"metric_table: expected warm of \(200,\) bool, got \(200,\) int64"):
        metric_table(uid, p, p, label, warm.astype(np.int64))


@requires("data")
def test_the_paper_s_split_gives_the_numbers_known_before():
    splits = {}
    for name in ("train", "test"):
        table = pq.read_table(data_folder() / "ml-1m-collm" / f"{name}.parquet")
        splits[name] = split_of(*(table[column].to_numpy() for column in ("uid", "iid", "label", "not_cold")))
    train, test = splits["train"], splits["test"]

    def both(score, rows=slice(None)):
        uid, label = test.uid[rows], test.label[rows]
        return metrics.auc(score[rows], label).value, metrics.uauc(uid, score[rows], label).value

    assert both(item_mean(train, test)) == pytest.approx((0.7094, 0.6816), abs=5e-5)
    score = item_user_mean(train, test)
    assert both(score) == pytest.approx((0.7320, 0.6816), abs=5e-5)
    assert both(score, test.not_cold)[0] == pytest.approx(0.7611, abs=5e-5)
    assert both(score, ~test.not_cold)[0] == pytest.approx(0.6899, abs=5e-5)

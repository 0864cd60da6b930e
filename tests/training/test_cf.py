"""Fitting a collaborative model: the steps against a naive loop, determinism, held-out rows, files, each error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import data_folder, requires

from collm_fast import metrics, reference
from collm_fast.config import CFConfig
from collm_fast.data.dataset import Dataset, Split
from collm_fast.graph import BipartiteGraph
from collm_fast.models.cf.frozen import CFModel
from collm_fast.training.cf import fit_cf, held_out_rows, with_recipe

U, I = 31, 25  # noqa: E741


def split_of(uid, iid, label, timestamp=None) -> Split:
    n = len(uid)
    uid, iid, label = (np.asarray(values, dtype=np.int64) for values in (uid, iid, label))
    time = np.arange(n) if timestamp is None else np.asarray(timestamp)
    return Split(uid, iid, label, time, np.zeros(n + 1, np.int64), np.empty(0, np.int64), np.ones(n, bool))


def dataset(rows: int = 900, seed: int = 0, **replaced: Split) -> Dataset:
    """Two tastes and item quality, with noise; user 30 and item 24 occur in no split."""
    rng = np.random.default_rng(seed)
    taste, kind, quality = rng.normal(size=U), rng.normal(size=I), rng.normal(size=I)
    splits = {}
    for name, count in (("train", rows), ("valid", 300), ("test", 300)):
        uid, iid = rng.integers(1, U - 1, count), rng.integers(1, I - 1, count)
        liking = 2 * taste[uid] * kind[iid] + quality[iid] + 0.3 * rng.normal(size=count)
        splits[name] = split_of(uid, iid, liking > 0)
    raw = np.arange(max(U, I))
    return Dataset(Path("nowhere"), {}, [""] * I, splits | replaced, U, I, raw[:U], raw[:I])


QUICK = CFConfig(dim=8, lr=0.02, batch_size=128, max_epochs=12, patience=5, seed=3)


def naive(data: Dataset, config: CFConfig, epochs: int) -> torch.Tensor:
    """The published loop, step by step: dense tables, plain Adam, the reference's propagation."""
    train = data.splits["train"]
    generator = torch.Generator().manual_seed(config.seed)
    table = torch.empty(U + I, config.dim)
    table.normal_(0.0, 0.003 if config.model == "mf" else 0.1, generator=generator)
    seen = np.zeros(U + I, bool)
    seen[train.uid] = seen[U + train.iid] = True
    table[~torch.from_numpy(seen)] = 0
    table.requires_grad_()
    liked = train.label == 1
    graph = BipartiteGraph.from_interactions(train.uid[liked], train.iid[liked], U, I)
    optimizer = torch.optim.Adam([table], lr=config.lr, weight_decay=config.weight_decay)
    uid, iid, label = (torch.from_numpy(column) for column in (train.uid, train.iid, train.label))
    for _ in range(epochs):
        for rows in torch.randperm(len(uid), generator=generator).split(config.batch_size):
            nodes = reference.lightgcn_propagate(table, graph, 2) if config.model == "lightgcn" else table
            score = (nodes[uid[rows]] * nodes[U + iid[rows]]).sum(1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(score, label[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    nodes = reference.lightgcn_propagate(table, graph, 2) if config.model == "lightgcn" else table
    return nodes.detach()


@pytest.mark.parametrize("model", ["mf", "lightgcn"])
def test_the_steps_equal_a_naive_loop(model):
    data = dataset()
    # One epoch: the state is then the best one, whatever its validation AUC.
    config = with_recipe(replace(QUICK, model=model, max_epochs=1))
    fitted = fit_cf(data, config)
    expected = naive(data, config, 1)
    found = torch.cat((fitted.user, fitted.item))
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("config", [
    replace(QUICK, model="mf", max_epochs=60, patience=30),
    replace(QUICK, model="mf", bias=True, max_epochs=60, patience=30),
    replace(QUICK, model="lightgcn", max_epochs=60, patience=30),
    replace(QUICK, model="lightgcn", loss="bpr", max_epochs=60, patience=30),
    replace(QUICK, model="mf", loss="bpr", max_epochs=60, patience=30),
])  # fmt: skip
def test_every_kind_learns_what_is_there(config):
    data = dataset()
    fitted = fit_cf(data, config)
    test = data.splits["test"]
    assert metrics.auc(fitted.score(test.uid, test.iid), test.label).value > (0.6 if config.loss == "bpr" else 0.7)
    assert fitted.name == config.model and fitted.fingerprint == data.fingerprint
    assert (fitted.user[0] == 0).all() and (fitted.item[I - 1] == 0).all()


@pytest.mark.parametrize("model", ["mf", "lightgcn"])
@pytest.mark.parametrize("loss", ["bce", "bpr"])
def test_equal_seeds_give_equal_bits(model, loss):
    config = replace(QUICK, model=model, loss=loss, max_epochs=3, bias=True)
    first, second = fit_cf(dataset(), config), fit_cf(dataset(), config)
    other = fit_cf(dataset(), replace(config, seed=4))
    assert torch.equal(first.user, second.user) and torch.equal(first.item, second.item)
    assert torch.equal(first.user_bias, second.user_bias) and first.offset == second.offset
    assert not torch.equal(first.user, other.user)


def test_training_stops_after_patience_and_keeps_the_best_epoch():
    data = dataset()
    config = replace(QUICK, max_epochs=40, patience=3)
    valid = data.splits["valid"]

    def auc(epochs):
        fitted = fit_cf(data, replace(config, max_epochs=epochs))
        return metrics.auc(fitted.score(valid.uid, valid.iid), valid.label).value

    best = [auc(epochs) for epochs in (1, 5, 15, 40)]
    # The kept state can only become better with more epochs.
    assert best == sorted(best)


def test_validation_is_scored_in_blocks(monkeypatch):
    whole = fit_cf(dataset(), replace(QUICK, model="lightgcn"))
    monkeypatch.setattr("collm_fast.training.cf._BLOCK", 7)
    assert torch.equal(fit_cf(dataset(), replace(QUICK, model="lightgcn")).user, whole.user)


def test_held_out_rows_are_each_user_s_latest():
    uid, time = [1, 1, 1, 2, 1, 2, 3, 1], [5, 9, 9, 2, 1, 1, 4, 0]
    split = split_of(uid, [1] * 8, [1] * 8, time)
    # User 1 has rows 7 4 0 1 2 by time (1 before 2: equal times keep their order), user 2 rows 5 3, user 3 row 6.
    assert np.flatnonzero(held_out_rows(split, 0.4)).tolist() == [1, 2]
    assert np.flatnonzero(held_out_rows(split, 0.2)).tolist() == [2]
    assert np.flatnonzero(held_out_rows(split, 0.5)).tolist() == [1, 2, 3]
    assert not held_out_rows(split, 0.0).any()
    assert held_out_rows(split_of([7] * 10, [1] * 10, [1] * 10), 0.3).sum() == 3
    assert held_out_rows(split.take(np.arange(0)), 0.5).shape == (0,)
    with pytest.raises(ValueError, match=r"held_out_rows: expected fraction in \[0, 1\), got 1.0"):
        held_out_rows(split, 1.0)


@pytest.mark.parametrize("model", ["mf", "lightgcn"])
@pytest.mark.parametrize("loss", ["bce", "bpr"])
def test_held_out_rows_change_nothing(model, loss):
    data = dataset()
    train = data.splits["train"]
    config = replace(QUICK, model=model, loss=loss, held_out=0.25, max_epochs=3)
    hidden = held_out_rows(train, 0.25)
    assert 0 < hidden.sum() < len(train) / 4
    without = replace(data, splits=data.splits | {"train": train.take(~hidden)})
    fitted, expected = fit_cf(data, config), fit_cf(without, replace(config, held_out=0.0))
    assert torch.equal(fitted.user, expected.user) and torch.equal(fitted.item, expected.item)
    assert fitted.config.held_out == 0.25


def test_the_folder_holds_model_configuration_and_metrics(tmp_path, capfd):
    data, out = dataset(), tmp_path / "cf"
    fitted = fit_cf(data, replace(QUICK, dim=None, model="lightgcn"), out=out, progress=True)
    assert sorted(path.name for path in out.iterdir()) == ["cf.safetensors", "config.yaml", "metrics.json"]
    assert CFModel.load(out).config == fitted.config
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["model"], config["dim"], config["weight_decay"], config["lr"]) == ("lightgcn", 64, 1e-4, 0.02)
    tables = json.loads((out / "metrics.json").read_text())
    assert list(tables) == ["item_mean", "item_user_mean", "cf"]
    test = data.splits["test"]
    score = fitted.score(test.uid, test.iid)
    assert tables["cf"]["test"]["all"]["auc"] == metrics.auc(score, test.label).value
    for row in tables.values():
        assert list(row) == ["valid", "test"]
        assert row["test"]["all"]["rows"] == 300 and 0 < row["test"]["all"]["log_loss"] < 3
        assert row["test"]["cold"]["auc"] is None
    captured = capfd.readouterr()
    assert captured.out == "" and "lightgcn" in captured.err
    with pytest.raises(ValueError, match="fit_cf: expected a folder without a run, got .*cf"):
        fit_cf(data, QUICK, out=out)
    # Killed before the last file, a fit is repeated; what `train` wrote is not replaced.
    (out / "metrics.json").unlink()
    assert fit_cf(data, QUICK, out=out).config == CFModel.load(out).config
    (out / "metrics.json").rename(out / "run.json")
    with pytest.raises(ValueError, match="fit_cf: expected a folder without a run"):
        fit_cf(data, QUICK, out=out)


def test_a_seed_that_is_not_given_is_the_default_and_a_model_that_only_ranks_has_no_probability(tmp_path):
    data = dataset()
    fitted = fit_cf(data, replace(QUICK, seed=None, loss="bpr", max_epochs=2), out=tmp_path)
    assert fitted.config.seed == 2023
    tables = json.loads((tmp_path / "metrics.json").read_text())
    assert tables["cf"]["test"]["all"]["log_loss"] is None and tables["item_mean"]["test"]["all"]["log_loss"] > 0


def test_silent_without_progress(capfd):
    fit_cf(dataset(), replace(QUICK, max_epochs=2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model", ["sasrec", "din"])
def test_models_of_a_later_version(model, tmp_path):
    message = f"fit_cf: expected model mf or lightgcn, got '{model}', which a later version brings"
    with pytest.raises(ValueError, match=message):
        fit_cf(dataset(), CFConfig(model=model), out=tmp_path / "cf")
    assert not (tmp_path / "cf").exists()


def test_splits_without_the_needed_labels(tmp_path):
    disliked, liked = split_of([1, 2], [1, 2], [0, 0]), split_of([1, 2], [1, 2], [1, 1])
    for replaced, config, message in (
        ({"train": disliked}, QUICK, "expected train rows with label 1, got none of 2"),
        ({"train": liked}, QUICK, "expected train rows with label 0, got none of 2"),
        ({"train": disliked}, replace(QUICK, loss="bpr"), "expected train rows with label 1, got none of 2"),
        ({"valid": liked}, QUICK, "expected valid rows with label 0, got none of 2"),
    ):
        with pytest.raises(ValueError, match=f"fit_cf: {message}"):
            fit_cf(dataset(**replaced), config, out=tmp_path / "cf")
    fit_cf(dataset(train=liked), replace(QUICK, loss="bpr", max_epochs=1))
    everything = split_of([1, 1, 2], [1, 2, 1], [1, 1, 1])
    fit_cf(dataset(train=everything), replace(QUICK, loss="bpr", max_epochs=1))
    with pytest.raises(ValueError, match="expected an item that a user did not like for bpr, got users who like every"):
        fit_cf(dataset(train=everything.take([0, 1])), replace(QUICK, loss="bpr"), out=tmp_path / "cf")
    assert not (tmp_path / "cf").exists()


def test_a_learning_rate_that_diverges_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="fit_cf: expected lr small enough to train with, got 1e\\+30"):
        fit_cf(dataset(), replace(QUICK, lr=1e30), out=tmp_path / "cf")
    assert not (tmp_path / "cf").exists()


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("weight_decay", -1.0), ("max_epochs", 0), ("patience", 0)])
def test_the_configuration_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        CFConfig(**{field: value})


@requires("data")
def test_default_mf_does_not_stall_on_the_paper_s_split():
    import pyarrow.parquet as pq

    splits = {}
    for name in ("train", "valid", "test"):
        table = pq.read_table(data_folder() / "ml-1m-collm" / f"{name}.parquet")
        splits[name] = split_of(*(table[column].to_numpy() for column in ("uid", "iid", "label", "timestamp")))
    data = Dataset(Path("nowhere"), {}, [""] * 3256, splits, 839, 3256, np.arange(839), np.arange(3256))
    # Seed 2 stalls under N(0, 1): its validation AUC stays near one half for the whole patience.
    for seed in (1, 2):
        fitted = fit_cf(data, CFConfig(model="mf", seed=seed, patience=10, max_epochs=30))
        valid = data.splits["valid"]
        assert metrics.auc(fitted.score(valid.uid, valid.iid), valid.label).value > 0.66

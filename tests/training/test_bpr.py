"""LightGCN by BPR: the gradient of a step, bits that repeat, interruption and resumption, learning, each error."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import collm_fast
from collm_fast import reference
from collm_fast.config import BPRConfig
from collm_fast.data.sampler import batches_of, sample_triples
from collm_fast.graph import BipartiteGraph
from collm_fast.io import checkpoints
from collm_fast.training import bpr
from collm_fast.training.bpr import ahead, bpr_backward, fit_lightgcn
from collm_fast.training.interrupt import Interrupted

U, I = 60, 45  # noqa: E741
QUICK = BPRConfig(dim=8, lr=0.02, batch_size=64, epochs=4, evaluate_every=2, checkpoint_every=3, seed=1)


def pairs(seed: int = 0, count: int = 700) -> tuple[np.ndarray, np.ndarray]:
    """Users of two kinds, each with its half of the items; the last user and item occur nowhere."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, U - 1, count)
    return users, rng.integers(0, I // 2, count) * 2 + users % 2


def graph() -> BipartiteGraph:
    return BipartiteGraph.from_interactions(*pairs(), U, I)


def state(fitted: bpr.FittedLightGCN) -> list[object]:
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in fitted.history]
    return [fitted.user.tolist(), fitted.item.tolist(), fitted.embedding.tolist(), history]


def score_of(user: torch.Tensor, item: torch.Tensor) -> dict[str, float]:
    return {"spread": float((user @ item.T).std())}


@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("edge_dropout", [0.0, 0.4])
def test_the_gradient_equals_the_full_computation_in_float64(num_layers: int, edge_dropout: float):
    config = replace(QUICK, num_layers=num_layers, edge_dropout=edge_dropout, l2=0.3)
    nodes = sample_triples(graph(), 100, seed=2)
    nodes[1:] += U
    (batch,) = batches_of(nodes, U + I, 100)
    table = torch.randn(U + I, 8).requires_grad_()
    table.grad = torch.full_like(table, torch.nan)
    loss = bpr_backward(table, graph(), batch, config, 11)

    full = table.detach().double().requires_grad_()
    mean = reference.lightgcn_propagate(full, graph(), num_layers, dropout_p=edge_dropout, seed=11)
    user, positive, negative = (torch.from_numpy(column) for column in nodes)
    score = (mean[user] * mean[negative]).sum(1) - (mean[user] * mean[positive]).sum(1)
    own = sum(full[column].square().sum() for column in (user, positive, negative))
    expected = F.softplus(score).mean() + 0.3 / 2 * own / 100
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and not loss.requires_grad
    assert (table.grad - full.grad).norm() <= 1e-6 * full.grad.norm()


def test_a_step_reads_only_the_batch_s_rows(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def spy(*args: object, **options: torch.Tensor) -> torch.Tensor:
        asked.append(options["rows"])
        return lightgcn_propagate(*args, **options)

    lightgcn_propagate = bpr.lightgcn_propagate
    monkeypatch.setattr(bpr, "lightgcn_propagate", spy)
    (batch,) = batches_of(np.array([[0, 1, 1], [U, U, U + 1], [U + 2, U + 3, U + 2]]), U + I, 3)
    bpr_backward(torch.randn(U + I, 8, requires_grad=True), graph(), batch, QUICK)
    assert [rows.tolist() for rows in asked] == [[0, 1, U, U + 1, U + 2, U + 3]]


@pytest.mark.parametrize("options", [{}, {"storage_dtype": "bfloat16"}, {"edge_dropout": 0.3}, {"l2": 0.0}])
def test_training_ranks_what_users_like_and_repeats_bit_by_bit(options: dict[str, object]):
    config = replace(QUICK, epochs=6, **options)
    first = fit_lightgcn(*pairs(), U, I, config, evaluate=score_of)
    assert state(first) == state(fit_lightgcn(*pairs(), U, I, config, evaluate=score_of))
    assert state(first) != state(fit_lightgcn(*pairs(), U, I, replace(config, seed=2), evaluate=score_of))
    score = first.user @ first.item.T
    kinds = np.arange(U - 1)[:, None] % 2 == np.arange(I)[None] % 2
    kinds[:, I - 1] = False
    assert score[: U - 1][torch.from_numpy(kinds)].mean() > score[: U - 1][torch.from_numpy(~kinds)].mean() + 0.5
    assert first.history[-1]["loss"] < 0.5 * first.history[0]["loss"]
    assert [record["epoch"] for record in first.history if "spread" in record] == [2, 4, 6]
    assert first.user.shape == (U, 8) and first.item.shape == (I, 8) and first.embedding.shape == (U + I, 8)
    assert first.config == config and not first.embedding.requires_grad


def test_the_number_of_threads_changes_nothing():
    # Large enough for torch and the kernels to use two threads in every part of a step.
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 3000, 20_000), (2000 * rng.random(20_000) ** 2).astype(int)
    config = BPRConfig(batch_size=4000, epochs=1, edge_dropout=0.1)
    threads, states = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            states.append(state(fit_lightgcn(users, items, 3000, 2000, config)))
    finally:
        torch.set_num_threads(threads)
    assert states[0] == states[1]


def test_the_tables_are_the_propagated_embedding():
    fitted = fit_lightgcn(*pairs(), U, I, replace(QUICK, epochs=1))
    whole = reference.lightgcn_propagate(fitted.embedding.double(), graph(), 3)
    assert (torch.cat((fitted.user, fitted.item)) - whole).norm() <= 1e-6 * whole.norm()


def test_duplicates_count_once_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    users, items = pairs()
    whole = fit_lightgcn(users, items, U, I, replace(QUICK, edge_dropout=0.2))
    monkeypatch.setattr(bpr, "_CHUNK", 3)
    twice = fit_lightgcn(np.tile(users, 2), np.tile(items, 2), U, I, replace(QUICK, edge_dropout=0.2))
    assert state(whole) == state(twice)


def test_every_step_drops_other_edges(monkeypatch: pytest.MonkeyPatch):
    seeds = []
    monkeypatch.setattr(bpr, "bpr_backward", lambda *args: seeds.append(int(args[-1])) or bpr_backward(*args))
    fit_lightgcn(*pairs(), U, I, replace(QUICK, edge_dropout=0.3))
    assert len(set(seeds)) == len(seeds) == 4 * -(-graph().num_edges // 64)


@pytest.mark.parametrize("options", [{}, {"edge_dropout": 0.3, "storage_dtype": "bfloat16"}])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, options: dict[str, object]):
    config = replace(QUICK, epochs=7, **options)
    whole = fit_lightgcn(*pairs(), U, I, config, evaluate=score_of)
    for epochs in (2, 4, 7):
        fitted = fit_lightgcn(*pairs(), U, I, replace(config, epochs=epochs), evaluate=score_of, folder=tmp_path)
        assert len(fitted.history) == epochs and len(list(tmp_path.iterdir())) == 1
    # An evaluation after the last epoch of a part is one more than the whole run has.
    assert state(fitted)[:3] == state(whole)[:3]
    assert [record["loss"] for record in fitted.history] == [record["loss"] for record in whole.history]
    again = fit_lightgcn(*pairs(), U, I, config, folder=tmp_path)
    assert state(again) == state(fitted)


@pytest.mark.parametrize("at", [1, 3, 25])
def test_an_interrupted_run_saves_its_step_and_goes_on_from_it(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(QUICK, epochs=3)
    whole = fit_lightgcn(*pairs(), U, I, config)
    steps = 0

    def interrupting(*args: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGINT)
        return bpr_backward(*args)

    monkeypatch.setattr(bpr, "bpr_backward", interrupting)
    with pytest.raises(Interrupted):
        fit_lightgcn(*pairs(), U, I, config, folder=tmp_path)
    saved = checkpoints.latest(tmp_path)
    assert saved is not None and saved.step == at == steps
    assert state(fit_lightgcn(*pairs(), U, I, config, folder=tmp_path)) == state(whole)


def test_checkpoints_are_written_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = []
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda folder, c: steps.append(c.state["epoch"]) or save(folder, c))
    fit_lightgcn(*pairs(), U, I, QUICK, folder=tmp_path)
    assert steps == [3, 4]


@pytest.mark.parametrize("change,message", [
    ({"lr": 0.01}, "a checkpoint with lr 0.01, got 0.02"),
    ({"seed": 9}, "a checkpoint with seed 9, got 1"),
    ({"items": I + 1}, f"a checkpoint with items {I + 1}, got {I}"),
    ({"data": 5}, "a checkpoint with edges "),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, object], message: str, tmp_path: Path):
    fit_lightgcn(*pairs(), U, I, replace(QUICK, epochs=1), folder=tmp_path)
    num_items, data = change.pop("items", I), change.pop("data", 0)
    with pytest.raises(ValueError, match="fit_lightgcn: expected " + message):
        fit_lightgcn(*pairs(data), U, num_items, replace(QUICK, **change), folder=tmp_path)


def test_fewer_epochs_than_a_checkpoint_has_are_refused(tmp_path: Path):
    fit_lightgcn(*pairs(), U, I, replace(QUICK, epochs=2), folder=tmp_path)
    with pytest.raises(ValueError, match="expected epochs of at least 2, which the checkpoint has begun, got 1"):
        fit_lightgcn(*pairs(), U, I, replace(QUICK, epochs=1), folder=tmp_path)


def test_it_is_found_in_the_package():
    assert collm_fast.fit_lightgcn is fit_lightgcn and "fit_lightgcn" in dir(collm_fast)


def test_bad_input():
    with pytest.raises(ValueError, match=r"BipartiteGraph: expected users in \[0, 3\), got 3 at row 1"):
        fit_lightgcn([0, 3], [0, 0], 3, 3)
    with pytest.raises(ValueError, match="expected a user with a positive and with an item that is none, got none"):
        fit_lightgcn([0, 0], [0, 1], 1, 2)
    with pytest.raises(ValueError, match="sample_triples: expected "):
        fit_lightgcn([], [], 0, 0)
    with pytest.raises(ValueError, match="fit_lightgcn: expected lr small enough to train with, got 1e"):
        fit_lightgcn(*pairs(), U, I, replace(QUICK, lr=1e30))
    for name, value in {"dim": 0, "l2": -1.0, "edge_dropout": 1.0, "init_std": 0.0, "lr": 0.0, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"{name}: expected "):
            replace(QUICK, **{name: value})


def test_the_bar_goes_to_stderr(capfd: pytest.CaptureFixture[str]):
    fit_lightgcn(*pairs(), U, I, replace(QUICK, epochs=1), evaluate=score_of, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "lightgcn" in err and "spread" in err


def test_ahead_makes_the_next_item_while_one_is_in_use():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number

    assert list(ahead(items())) == [0, 1, 2]
    assert list(ahead(iter([]))) == []
    stream = ahead(items())
    made.clear()
    assert next(stream) == 0
    assert next(stream) == 1 and made[:2] == [0, 1]

    def broken():
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(ahead(broken()))

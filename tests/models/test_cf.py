"""MF, LightGCN and the frozen model: the equations, cold ids, the file, each error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from collm_fast import reference
from collm_fast.config import CFConfig
from collm_fast.data.sampler import batches_of
from collm_fast.graph import BipartiteGraph
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.cf.lightgcn import LightGCN
from collm_fast.models.cf.mf import MF

U, I = 6, 5  # noqa: E741
USERS, ITEMS = np.array([1, 1, 2, 3, 5]), np.array([1, 2, 2, 4, 1])


def graph() -> BipartiteGraph:
    return BipartiteGraph.from_interactions(USERS, ITEMS, U, I)


def model_of(name: str, *, bias: bool = False, dim: int | None = 8, init: str = "scaled") -> MF:
    config = CFConfig(model=name, dim=dim, bias=bias, init=init)
    model = MF(U, I, config) if name == "mf" else LightGCN(U, I, config, graph())
    seen_users, seen_items = torch.arange(U) % 6 > 0, torch.tensor([False, True, True, False, True])
    model.reset(torch.Generator().manual_seed(1), seen_users, seen_items)
    if bias:
        with torch.no_grad():
            model.bias.normal_(generator=torch.Generator().manual_seed(2))
            model.offset.fill_(0.5)
    return model


@pytest.mark.parametrize("name", ["mf", "lightgcn"])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_follow_the_equation(name, bias):
    model = model_of(name, bias=bias)
    nodes = model.embedding.detach().double()
    if name == "lightgcn":
        nodes = reference.lightgcn_propagate(nodes, graph(), 2)
    uid, iid = torch.tensor([1, 3, 5, 0]), torch.tensor([2, 3, 4, 0])
    expected = (nodes[uid] * nodes[U + iid]).sum(1)
    if bias:
        expected += model.bias.detach()[uid] + model.bias.detach()[U + iid] + 0.5
    score = model.score(uid, iid)
    assert (score - expected).norm() <= 1e-6 * expected.norm()
    frozen = CFModel(name, CFConfig(), *model.tables(), *model.biases())
    logits = frozen.score(uid.numpy(), iid.numpy())
    assert logits.dtype == np.float32
    assert np.linalg.norm(logits - expected.numpy()) <= 1e-6 * float(expected.norm())
    score.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["mf", "lightgcn"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_batch_scores_and_learns_the_same_from_its_rows_alone(name, bias, monkeypatch):
    uid, iid, other = torch.tensor([1, 3, 1, 2]), torch.tensor([2, 3, 2, 0]), torch.tensor([4, 2, 4, 1])
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.3, 1.0, -1.0, 2.0]])
    whole, trimmed = model_of(name, bias=bias), model_of(name, bias=bias)
    expected = torch.stack((whole.score(uid, iid), whole.score(uid, other)))
    (expected * weight).sum().backward()

    (batch,) = batches_of(torch.stack((uid, U + iid, U + other)), U + I, 4)
    rows, nodes = [], trimmed.nodes
    monkeypatch.setattr(trimmed, "nodes", lambda of=None: rows.append(of) or nodes(of))
    score = trimmed.score_batch(batch)
    (score * weight).sum().backward()
    assert [of.tolist() for of in rows] == [[1, 2, 3, U, U + 1, U + 2, U + 3, U + 4]]
    assert (score - expected).norm() <= 1e-6 * expected.norm()
    for ours, theirs in zip(trimmed.parameters(), whole.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


@pytest.mark.parametrize("name", ["mf", "lightgcn"])
def test_ids_that_train_does_not_mention_are_zero_and_stay_zero(name):
    model = model_of(name)
    user, item = model.tables()
    assert (user[0] == 0).all() and (item[[0, 3]] == 0).all()
    assert (user[1:] != 0).any(1).all() and (item[[1, 2, 4]] != 0).any(1).all()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    model.score(torch.from_numpy(USERS), torch.from_numpy(ITEMS)).sum().backward()
    optimizer.step()
    user, item = model.tables()
    assert (user[0] == 0).all() and (item[[0, 3]] == 0).all()
    # A copy: what is returned does not follow the training.
    assert user.data_ptr() != model.embedding.data_ptr() and not user.requires_grad


def test_initial_values_and_recipes():
    assert model_of("mf", dim=None).embedding.shape == (U + I, 256)
    assert model_of("lightgcn", dim=None).embedding.shape == (U + I, 64)
    for name, init, std in (("mf", "scaled", 0.003), ("mf", "official", 1.0), ("lightgcn", "official", 0.1)):
        seen = model_of(name, dim=512, init=init).embedding[1:U].detach()
        assert float(seen.std()) == pytest.approx(std, rel=0.1)


def test_lightgcn_needs_its_graph():
    with pytest.raises(ValueError, match="LightGCN: expected the graph of the liked interactions, got None"):
        LightGCN(U, I, CFConfig(model="lightgcn"))
    with pytest.raises(ValueError, match="LightGCN: expected a graph of 7 users and 5 items, got 6 and 5"):
        LightGCN(U + 1, I, CFConfig(model="lightgcn"), graph())


@pytest.mark.parametrize("bias", [False, True])
def test_the_file_gives_the_same_model_back(tmp_path, bias):
    model = model_of("mf", bias=bias)
    config = CFConfig(model="mf", dim=8, lr=0.1, bias=bias, seed=7)
    frozen = CFModel("mf", config, *model.tables(), *model.biases(), fingerprint="abc")
    path = frozen.save(tmp_path)
    assert path == tmp_path / "cf.safetensors" and frozen.dim == 8
    for place in (tmp_path, path, str(path)):
        again = CFModel.load(place)
        assert (again.name, again.config, again.offset) == ("mf", config, frozen.offset)
        assert again.fingerprint == "abc"
        assert torch.equal(again.user, frozen.user) and torch.equal(again.item, frozen.item)
        assert (again.user_bias is None) is not bias
        assert (again.score([1, 2], [2, 1]) == frozen.score([1, 2], [2, 1])).all()


def test_equal_models_are_equal_files(tmp_path):
    frozen = CFModel("mf", CFConfig(), *model_of("mf", bias=True).tables(), offset=0.1)
    files = {frozen.save(tmp_path / str(nth)).read_bytes() for nth in range(16)}
    assert len(files) == 1 and CFModel.load(tmp_path / "0").offset == 0.1


def test_only_a_model_of_the_label_s_rate_gives_probabilities():
    tables = model_of("mf").tables()
    assert CFModel("mf", CFConfig(loss="bce"), *tables).calibrated
    assert not CFModel("mf", CFConfig(loss="bpr"), *tables).calibrated


def test_many_pairs_are_scored_in_blocks():
    frozen = CFModel("mf", CFConfig(), *model_of("mf").tables())
    rng = np.random.default_rng(0)
    uid, iid = rng.integers(0, U, 40_000), rng.integers(0, I, 40_000)
    expected = (frozen.user[uid] * frozen.item[iid]).sum(1).numpy()
    assert np.abs(frozen.score(uid, iid) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert frozen.score(np.empty(0, int), np.empty(0, int)).shape == (0,)


def test_errors_of_the_frozen_model(tmp_path):
    user, item = torch.ones(4, 2), torch.ones(3, 2)
    frozen = CFModel("mf", CFConfig(), user, item)
    for call, message in (
        (lambda: frozen.score([1, 4], [1, 1]), r"CFModel.score: expected uid in \[0, 4\), got 4 at row 1"),
        (lambda: frozen.score([1], [-1]), r"CFModel.score: expected iid in \[0, 3\), got -1 at row 0"),
        (lambda: frozen.score([1.0], [1]), r"CFModel.score: expected uid \[n\] of integers, got \[1\] float64"),
        (lambda: frozen.score([1, 2], [1]), r"CFModel.score: expected uid and iid of equal length, got 2 and 1"),
        (lambda: CFModel("mf", CFConfig(), user, torch.ones(3, 5)), r"expected user \[U, D\] and item \[I, D\]"),
        (lambda: CFModel("mf", CFConfig(), user, item, torch.ones(3)), r"expected user_bias \[4\], got \[3\]"),
        (lambda: CFModel("mf", CFConfig(), user.double(), item), r"expected user in float32, got torch.float64"),
        (lambda: CFModel.load(tmp_path), r"CFModel.load: expected cf.safetensors or a folder with it, got "),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    path = tmp_path / "cf.safetensors"
    path.write_bytes(b"no safetensors file")
    with pytest.raises(ValueError, match="CFModel.load: expected a safetensors file, got .*cf.safetensors"):
        CFModel.load(path)
    from safetensors.torch import save_file

    save_file({"user": user}, path, metadata={"collm_fast": json.dumps({"format": 2, "config": {}})})
    with pytest.raises(ValueError, match="CFModel.load: expected a collaborative model of format 2, got "):
        CFModel.load(path)
    header = {"format": 2, "name": "mf", "config": {"dim": 0}, "offset": 0.0, "fingerprint": ""}
    save_file({"user": user, "item": item}, path, metadata={"collm_fast": json.dumps(header)})
    with pytest.raises(ValueError, match=r"cf.safetensors: dim: expected at least 1, got 0"):
        CFModel.load(path)

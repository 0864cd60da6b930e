"""The CIE mapper's shapes, forms and errors, and the statistics it may read, against a loop over rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from collm_fast.config import MapperConfig
from collm_fast.data.dataset import Dataset, Split
from collm_fast.models.mapper import IdStatistics, Mapper, id_statistics


def small_dataset(n: int = 200, users: int = 12, items: int = 15, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    train = Split(
        uid=rng.integers(1, users - 1, n),  # the last user has no row
        iid=rng.integers(1, items, n),
        label=rng.integers(0, 2, n),
        timestamp=np.arange(n),
        his_offsets=np.zeros(n + 1, dtype=np.int64),
        his=np.zeros(0, dtype=np.int64),
        not_cold=np.ones(n, dtype=bool),
    )
    empty = train.take(np.zeros(0, dtype=np.int64))
    splits = {"train": train, "valid": empty, "test": empty}
    return Dataset(
        path=Path("nowhere"),
        meta={},
        titles=[""] + [f"title {i}" for i in range(1, items)],
        splits=splits,
        num_users=users,
        num_items=items,
        raw_users=np.arange(users),
        raw_items=np.arange(items),
    )


@pytest.mark.parametrize("tokens_per_id", [1, 3])
def test_the_mapper_is_the_formula(tokens_per_id: int) -> None:
    torch.manual_seed(0)
    mapper = Mapper(4, 6, MapperConfig(hidden_factor=10, tokens_per_id=tokens_per_id))
    assert mapper.first.weight.shape == (40, 4) and mapper.second.weight.shape == (6 * tokens_per_id, 40)
    x = torch.randn(5, 4)
    hidden = (x @ mapper.first.weight.T + mapper.first.bias).clamp_min(0)
    expected = hidden @ mapper.second.weight.T + mapper.second.bias
    out = mapper(x)
    assert out.shape == (5 * tokens_per_id, 6) and out.dtype == torch.float32
    torch.testing.assert_close(out.reshape(5, -1), expected)


@pytest.mark.parametrize(("inputs", "d_in"), [("embedding", 4), ("+stats", 7), ("+pair", 8), ("+stats+pair", 11)])
def test_forms_differ_by_what_they_read(inputs: str, d_in: int) -> None:
    mapper = Mapper(4, 6, MapperConfig(inputs=inputs), stats_dim=3)  # type: ignore[arg-type]
    assert mapper.d_in == d_in and mapper.first.out_features == 40
    assert mapper(torch.zeros(2, d_in)).shape == (2, 6)


def test_mapper_errors() -> None:
    with pytest.raises(ValueError, match=r"mapper.inputs: expected stats_dim above 0 for '\+stats', got 0"):
        Mapper(4, 6, MapperConfig(inputs="+stats"))
    with pytest.raises(ValueError, match=r"mapper: expected features of shape \[S, 4\], got \[2, 5\]"):
        Mapper(4, 6, MapperConfig())(torch.zeros(2, 5))


def test_statistics_are_those_of_the_chosen_rows_alone() -> None:
    dataset = small_dataset()
    train = dataset.splits["train"]
    rows = np.arange(len(train)) < 150
    out = id_statistics(dataset, rows)
    assert out.user.shape == (12, 3) and out.item.shape == (15, 3) and out.dim == 3
    assert out.user.dtype == torch.float32 and torch.isfinite(out.user).all()

    prior = train.label[rows].mean()

    def rate(ids: np.ndarray, index: int) -> float:
        chosen = train.label[rows][ids[rows] == index]
        return float((chosen.sum() + 5 * prior) / (len(chosen) + 5))

    def raw(ids: np.ndarray, other: np.ndarray, index: int) -> list[float]:
        mine = np.flatnonzero(rows & (ids == index))
        residual = sum(train.label[r] - rate(other, other[r]) for r in mine) / (len(mine) + 5)
        own = rate(ids, index)
        return [np.log1p(len(mine)), np.log(own / (1 - own)), residual]

    for got, ids, other, size in (
        (out.user, train.uid, train.iid, 12),
        (out.item, train.iid, train.uid, 15),
    ):
        table = np.array([raw(ids, other, index) for index in range(size)])
        seen = table[np.isin(np.arange(size), ids[rows])]
        expected = (table - seen.mean(0)) / seen.std(0)
        expected[0] = 0
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)

    # Rows that were not chosen change nothing.
    changed = train.label.copy()
    changed[~rows] = 1 - changed[~rows]
    dataset.splits["train"] = Split(**(vars(train) | {"label": changed}))
    assert torch.equal(id_statistics(dataset, rows).user, out.user)


def test_statistics_that_do_not_vary_stay_finite() -> None:
    dataset = small_dataset()
    train = dataset.splits["train"]
    dataset.splits["train"] = Split(**(vars(train) | {"label": np.ones_like(train.label)}))
    out = id_statistics(dataset, np.ones(len(train), dtype=bool))
    assert torch.isfinite(out.user).all() and torch.isfinite(out.item).all()


def test_statistics_errors() -> None:
    dataset = small_dataset()
    with pytest.raises(ValueError, match=r"expected rows of bool \[200\], got int64 \[3\]"):
        id_statistics(dataset, np.arange(3))
    with pytest.raises(ValueError, match="expected at least one chosen train row, got none"):
        id_statistics(dataset, np.zeros(200, dtype=bool))
    with pytest.raises(ValueError, match=r"expected user \[U, k\] and item \[I, k\]"):
        IdStatistics(torch.zeros(3, 2), torch.zeros(3, 1))

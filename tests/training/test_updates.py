"""Optimizer steps whose losses are read late: the same losses and parameters, and nothing after what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collm_fast.config import StageConfig
from collm_fast.training.state import StageState
from collm_fast.training.updates import Updates

ROWS = np.arange(20)


def taken(
    losses: list[float], *, late: bool, clip: float | None = 1.0, gradient: float = 3.0
) -> tuple[StageState, list[tuple[int, float]]]:
    """The state after a step for each loss, and what was told of them, one call of `read` a step and one at the end."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    loop = StageState({"x": parameter}, StageConfig(lr=0.1), fused=late)
    updates, told = Updates("stage1", loop, clip, late=late), []
    for loss in losses:
        parameter.grad = torch.randn(3, 4, generator=generator) * gradient
        updates.take(torch.tensor(loss, dtype=torch.float64), ROWS)
        loop.advance(100)
        told += list(updates.read(all_of_them=False))
        assert len(told) == (loop.step - 1 if late else loop.step)
    told += list(updates.read(all_of_them=True))
    return loop, told


@pytest.mark.parametrize("clip", [1.0, None])
def test_late_or_at_once_is_the_same(clip: float | None) -> None:
    (at_once, told), (late, told_late) = (taken([0.5, 0.25, 0.75], late=late, clip=clip) for late in (False, True))
    assert told == told_late == [(0, 0.5), (1, 0.25), (2, 0.75)]
    torch.testing.assert_close(late.parameters["x"], at_once.parameters["x"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_moves_after_what_is_not_finite(what: str, late: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    loop = StageState({"x": parameter}, StageConfig(lr=0.1), fused=late)
    updates = Updates("stage1", loop, 1.0, late=late)
    with pytest.raises(
        FloatingPointError, match=rf"stage1: expected a finite {what}, got (nan|inf) at step 2, rows 0, 1"
    ):
        for step in range(5):
            bad = step == 2
            parameter.grad = torch.full((3, 4), float("inf") if bad and what == "gradient" else 1.0)
            if bad:
                before = parameter.detach().clone()
                moments = {k: v.clone() for k, v in loop.optimizer.state[parameter].items()}
            updates.take(torch.tensor(float("nan") if bad and what == "loss" else 1.0, dtype=torch.float64), ROWS)
            loop.advance(100)
            list(updates.read(all_of_them=False))
    assert torch.equal(parameter, before) and loop.step == (4 if late else 2)
    assert all(torch.equal(v, moments[k]) for k, v in loop.optimizer.state[parameter].items())


def test_a_fused_state_is_saved_and_restored() -> None:
    whole, _ = taken([0.5, 0.25], late=True)
    other = StageState({"x": torch.nn.Parameter(torch.zeros(3, 4))}, StageConfig(lr=0.1), fused=True)
    other.restore(whole.snapshot())
    assert torch.equal(other.parameters["x"], whole.parameters["x"]) and other.step == 2
    for state in (whole, other):
        state.parameters["x"].grad = torch.ones(3, 4)
        state.optimizer.step()
    assert torch.equal(other.parameters["x"], whole.parameters["x"])

"""How far a tensor is from the right one, for tests of arithmetic."""

from __future__ import annotations

from torch import Tensor


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in float64; 0 where they are equal, so where both are empty or zero."""
    assert value.shape == truth.shape
    difference = (value.double() - truth.double()).norm()
    return 0.0 if difference == 0 else float(difference / truth.double().norm())

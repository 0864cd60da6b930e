"""The emulator itself: a right kernel gives the right numbers in both thread orders, and planted faults are found."""

from __future__ import annotations

import emulation
import pytest
import torch
from conftest import requires

pytestmark = requires("compiler")


def run(fault: int, order: int = 0, n: int = 300) -> torch.Tensor:
    binary = emulation.build("selftest_main.cpp")
    x = torch.arange(n, dtype=torch.float32)
    return emulation.run(binary, {"in": x}, {"out": ((n,), torch.float32)}, fault=fault, order=order)["out"]


@pytest.mark.parametrize("order", [0, 1])
def test_shuffles_and_barriers(order: int) -> None:
    x = torch.arange(300, dtype=torch.float32)
    expected = torch.cat([part.cumsum(0) for part in x.split(128)])
    assert torch.equal(run(0, order), expected)


@pytest.mark.parametrize("order", [0, 1])
def test_a_barrier_between_blocks(order: int) -> None:
    x = torch.arange(192, dtype=torch.float32)
    assert torch.equal(run(4, order, 192), x.roll(-64))


def test_a_missing_barrier_shows_in_the_thread_order() -> None:
    assert not torch.equal(run(1, 0, 64), run(1, 1, 64))


def test_a_read_out_of_bounds_is_reported() -> None:
    with pytest.raises(emulation.EmulatorError, match="heap-buffer-overflow"):
        run(2)


def test_a_divergent_barrier_is_reported() -> None:
    with pytest.raises(emulation.EmulatorError, match="can never be released"):
        run(3)


def test_an_output_of_another_size_is_reported() -> None:
    binary = emulation.build("selftest_main.cpp")
    with pytest.raises(emulation.EmulatorError, match="got 64 elements"):
        emulation.run(binary, {"in": torch.ones(64)}, {"out": ((65,), torch.float32)}, fault=0, order=0)

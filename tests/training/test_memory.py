"""Memory that was freed in pieces goes back to the system."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from conftest import requires
from small_loop import run

from collm_fast.training import loop, memory


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@requires("peak")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs Linux's mark of the resident memory")
def test_holes_are_given_back() -> None:
    # Small enough for the heap; every second one is kept, so that the others cannot be merged and end as holes.
    blocks = [torch.ones(16_000) for _ in range(2_000)]
    before = resident()
    kept, blocks = blocks[::2], []
    memory.give_back_memory(torch.device("cuda"))  # whose memory is torch's own
    assert before - resident() < 8 << 20
    memory.give_back_memory(torch.device("cpu"))
    assert before - resident() > 40 << 20 and len(kept) == 1_000


def test_the_loop_gives_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    calls: list[torch.device] = []
    monkeypatch.setattr(loop, "EVERY_STEPS", 4)
    monkeypatch.setattr(loop, "give_back_memory", calls.append)
    run(tmp_path, total=11)
    assert calls == [torch.device("cpu")] * 2
    monkeypatch.setattr(memory, "_trim", lambda: None)
    memory.give_back_memory(torch.device("cpu"))


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "x")  # so that it is restored
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    memory.bound_caches()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "64")

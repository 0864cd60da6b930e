"""Steps leave nothing behind: neither tensors that stay alive, nor pages of what was freed."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os

import numpy as np
import pytest
import torch
from conftest import requires
from small_llm import random_prompts
from small_loop import CONFIG, lora_model, mapper_model, options, run

from collm_fast.training import loop, memory
from collm_fast.training.interrupt import Stop
from collm_fast.training.loop import train_stage
from collm_fast.training.stages import set_trainable


class Alive:
    """Events that count live tensors, and the bytes of their storages, after some steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps, self.found = steps, []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if tag.endswith("train/loss") and step in self.steps:
            gc.collect()
            # By the type: asking some objects for their class warns, and caches of torch.compile hold fake tensors.
            tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
            self.found.append((len(tensors), sum(storages.values())))


@pytest.mark.parametrize("case", ["parts and a sample", "kept prefixes"])
def test_memory_is_constant_over_a_hundred_steps(tmp_path, case, monkeypatch):
    monkeypatch.setattr("collm_fast.evaluate.BOOTSTRAP_SAMPLES", 5)
    stage = "cie" if case == "kept prefixes" else "lora"
    model = lora_model() if stage == "lora" else mapper_model(kv_cache_gb=0.01)
    train, valid = (random_prompts(seed, groups=4, slots=stage == "cie") for seed in (0, 1))
    # Before step 20 three states are kept and every prefix was met.
    config = dataclasses.replace(CONFIG, eval_every=6, batch_size=4)
    changes = {"tokens_per_batch": 40, "sample": np.arange(len(valid) - 2)} if stage == "lora" else {}
    alive = Alive((20, 70, 120))
    settings = options(tmp_path, events=alive, checkpoint_minutes=1e9, order="random", **changes)
    train_stage(model, set_trainable(model, stage), train, valid, config, 120, settings, Stop())
    first, *later = alive.found
    assert len(later) == 2 and first[0] > 20
    assert all(found == first for found in later), alive.found


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

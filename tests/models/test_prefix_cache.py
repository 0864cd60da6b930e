"""Kept prefixes: the same logits and gradients, the budget, which prefixes stay, and when all are dropped."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from hybrids import all_alone, hybrid, make_mapper
from small_llm import random_prompts, small_model
from torch import Tensor

from collm_fast.config import LoraConfig
from collm_fast.data.packing import pack
from collm_fast.models import prefix_cache
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import add_lora, lora_layers
from collm_fast.models.prefix_cache import PrefixCache


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens)


def values(number: int, size: int = 2) -> Tensor:
    return torch.full((size,), float(number), dtype=torch.float32)


def meet(cache: PrefixCache, number: int, size: int = 2) -> bool:
    """Look for a prefix as a step does; whether it was there."""
    found = cache.get(ids(number))
    if found is None:
        cache.put(ids(number), values(number, size))
        return False
    assert torch.equal(found, values(number, size))
    return True


def test_a_cyclic_epoch_finds_what_fits() -> None:
    cache = PrefixCache(5 * 8)
    for _ in range(6):
        hits = [meet(cache, number) for number in range(10)]
    assert hits == [True] * 5 + [False] * 5
    assert len(cache) == 5 and cache.bytes == cache.max_bytes
    assert (cache.tokens_met, cache.tokens_saved) == (60, 25)


def test_on_the_host_a_device_keeps_pinned_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: `meta` stands for the device, and a plain copy for the pinned one."""
    monkeypatch.setattr(prefix_cache, "_pinned", lambda x: torch.zeros(x.shape, dtype=x.dtype))
    for on, kept in (("host", "cpu"), ("device", "meta")):
        cache = PrefixCache(100, on)  # type: ignore[arg-type]
        for number, device in ((0, "meta"), (1, "cpu")):
            assert cache.get(ids(number)) is None
            given = torch.ones(2, device=device)
            cache.put(ids(number), given)
            found = cache.get(ids(number))
            assert found is not None and found.device.type == (kept if device == "meta" else "cpu")
            assert found is given or (on, device) == ("host", "meta")
        assert cache.bytes == 16
    with pytest.raises(ValueError, match="prefix_cache: expected on to be device or host, got 'disk'"):
        PrefixCache(8, "disk")  # type: ignore[arg-type]


@requires("cuda")
def test_pinned_copies_come_back_the_same() -> None:
    cache, given = PrefixCache(1 << 20, "host"), torch.arange(1000.0).cuda()
    assert cache.get(ids(3)) is None
    cache.put(ids(3), given)
    found = cache.get(ids(3))
    assert found is not None and found.is_pinned()
    assert torch.equal(found.to("cuda", non_blocking=True), given)


def test_the_place_of_the_cache_is_an_option_of_the_model() -> None:
    for on in ("device", "host"):
        model = CoLLM(small_model("llama"), yes_id=3, no_id=4, kv_cache_gb=1e-4, kv_cache_on=on)  # type: ignore[arg-type]
        assert model.prefixes is not None and model.prefixes.on == on


def test_what_is_met_far_more_often_displaces_what_is_not() -> None:
    cache = PrefixCache(2 * 8)
    meet(cache, 0), meet(cache, 1)
    assert meet(cache, 0)
    # 1 was met once and gives way at the third meeting; 0 was met twice and stays.
    assert [meet(cache, 2) for _ in range(4)] == [False, False, False, True]
    assert meet(cache, 0) and not meet(cache, 1)
    assert cache.bytes == 16
    # One that needs the place of two displaces both or none.
    for _ in range(9):
        meet(cache, 2)
    assert [meet(cache, 3, size=4) for _ in range(12)] == [False] * 12 and meet(cache, 2) and meet(cache, 0)
    assert not any(meet(cache, 4, size=5) for _ in range(50)) and len(cache) == 2


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected a budget of at least 0 bytes, got -1"):
        PrefixCache(-1)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected kv_cache_gb of at least 0, got"):
            hybrid(small_model("llama"), kv_cache_gb=wrong)


def stage2(family: str = "qwen3", cache: float = 1.0, **options: Any) -> CoLLM:
    llm = small_model(family, **options)
    for layer in add_lora(llm, LoraConfig(r=2, dropout=0.0), torch.Generator().manual_seed(1)):
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.3)
    llm.requires_grad_(False)
    return hybrid(llm, make_mapper(), kv_cache_gb=cache)


def both(model: CoLLM, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits and the mapper's gradient."""
    assert model.mapper is not None
    out = model(batch)
    grads = torch.autograd.grad(out.square().sum(), list(model.mapper.parameters()))
    return out.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_kept_prefixes_change_nothing(family: str) -> None:
    options = {"sliding_window": 4} if family == "mistral" else {}
    prompts, plain, model = random_prompts(1, groups=6), stage2(family, 0.0, **options), stage2(family, **options)
    assert plain.prefixes is None and model.prefixes is not None
    batches = [pack(prompts, rows) for rows in np.array_split(np.arange(len(prompts)), 3)]
    cold = [both(model, batch) for batch in batches]
    assert len(model.prefixes) > 1
    before = model.prefixes.tokens_saved
    for batch, first in zip(batches, cold, strict=True):
        warm, truth = both(model, batch), both(plain, batch)
        for a, b, c in zip(warm, first, truth, strict=True):
            # A resumed run begins cold: to the bit the same.
            assert torch.equal(a, b)
            assert (a - c).norm() <= 1e-5 * c.norm()
    assert model.prefixes.tokens_saved > before


def test_evaluation_keeps_whole_prefixes_of_text() -> None:
    prompts = random_prompts(2, groups=5, slots=False)
    rows, model = np.arange(len(prompts)), hybrid(small_model("llama"), kv_cache_gb=1.0)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                model(pack(prompts, rows)), all_alone(small_model("llama"), prompts, rows), rtol=0, atol=1e-5
            )
    assert model.prefixes is not None and model.prefixes.tokens_saved == model.prefixes.tokens_met / 2 > 0


def test_a_changed_model_is_never_read_from_the_cache() -> None:
    model, prompts = stage2(), random_prompts(3, groups=5)
    assert model.prefixes is not None
    batch = pack(prompts, np.arange(len(prompts)))

    def change_adapter() -> None:
        with torch.no_grad():
            next(lora_layers(model.llm))[1].lora_B.mul_(3)

    def other_weights() -> None:
        model.llm.model.layers[0].mlp.up_proj.weight.data = torch.randn_like(
            model.llm.model.layers[0].mlp.up_proj.weight
        )

    with torch.no_grad():
        first = model(batch)
        for change in (change_adapter, other_weights):
            change()
            changed = model(batch)
            kept, model.prefixes = model.prefixes, None
            torch.testing.assert_close(changed, model(batch), rtol=0, atol=1e-5)
            model.prefixes = kept
            assert not torch.allclose(first, changed, atol=1e-4)


def test_nothing_is_kept_while_the_language_model_trains_or_positions_float(caplog: pytest.LogCaptureFixture) -> None:
    prompts = random_prompts(4, groups=5)
    batch = pack(prompts, np.arange(len(prompts)))
    training = stage2()
    next(lora_layers(training.llm))[1].lora_A.requires_grad_(True)
    floating = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with caplog.at_level(logging.WARNING), torch.no_grad():
        dynamic = stage2("llama", rope_parameters=floating)
        for model in (training, dynamic):
            model(batch)
            assert model.prefixes is not None and len(model.prefixes) == 0
    assert dynamic.decoder is not None and not caplog.text

"""The text that all prompts of a batch begin with: it runs once, and changes neither logits nor gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flex_on_cpu import flex_attention  # noqa: F401  (a fixture)
from hybrids import all_alone, hybrid, make_mapper
from small_llm import FAMILIES, random_prompts, small_model
from torch import Tensor

from collm_fast.config import LoraConfig
from collm_fast.data.packing import PackedBatch, pack
from collm_fast.data.prompts import Prompts
from collm_fast.data.ragged import offsets_of
from collm_fast.models import layout
from collm_fast.models.collm import CoLLM
from collm_fast.models.decoder import Decoder
from collm_fast.models.lora import add_lora, set_dropout, set_step_seed

OPENING = (61, 62, 63, 64, 65, 66)


def opened(prompts: Prompts, tokens: tuple[int, ...] = OPENING) -> Prompts:
    """The prompts behind so many tokens of text."""
    lengths = np.diff(prompts.offsets) + len(tokens)
    at = np.repeat(prompts.offsets[:-1], len(tokens))
    text = {name: np.zeros(len(at), np.int64) for name in ("slot_role", "slot_id", "slot_part")}
    text["token_ids"] = np.tile(tokens, len(prompts))
    flat = {
        name: np.insert(getattr(prompts, name), at, new.astype(getattr(prompts, name).dtype))
        for name, new in text.items()
    }
    return replace(prompts, offsets=offsets_of(lengths), **flat)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many tokens each forward without a graph ran, and each of the others."""
    found: dict[str, list[int]] = {"past": [], "answers": []}
    for name in found:
        real = getattr(Decoder, name)

        def seen(self: Decoder, x: Tensor, *rest: Any, name: str = name, real: Any = real) -> Any:
            found[name].append(len(x))
            return real(self, x, *rest)

        monkeypatch.setattr(Decoder, name, seen)
    return found


def batch_of(seed: int, groups: int = 5) -> tuple[Prompts, np.ndarray, PackedBatch]:
    prompts = opened(random_prompts(seed, groups=groups))
    rows = np.random.default_rng(seed).permutation(len(prompts))
    return prompts, rows, pack(prompts, rows)


def gradients(model: CoLLM, logits: Tensor) -> list[Tensor]:
    assert model.mapper is not None
    weight = torch.linspace(-1, 1, len(logits))
    return list(torch.autograd.grad((logits * weight).sum(), list(model.mapper.parameters())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_each_prompt_alone(family: str, seed: int, ran: dict[str, list[int]]) -> None:
    window = {"sliding_window": 5} if family == "mistral" and seed else {}
    mapper = make_mapper()
    model = hybrid(small_model(family, **window), mapper)
    prompts, rows, batch = batch_of(seed)
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch), all_alone(model.llm, prompts, rows, mapper), rtol=0, atol=2e-5, check_dtype=False
        )
    trees = int(batch.tree.max()) + 1
    # Group 0 begins with its user's slot: nothing behind the opening is alike in all.
    assert ran == {"past": [6], "answers": [len(batch.token_ids) - 6 * trees]}
    with torch.no_grad():
        model(pack(prompts, rows[: len(rows) // 2]))
    assert len(ran["past"]) == 1 and model.openings.tokens_saved == 6, "it is kept"
    with torch.no_grad():
        next(model.llm.parameters()).add_(0.0)
        model(batch)
    assert ran["past"] == [6, 6], "until a weight was written to"


@pytest.mark.parametrize("kernel", ["on a CPU", "flex"])
@pytest.mark.parametrize("seed", range(3))
def test_stage_two_has_the_gradients_of_a_batch_without_one(
    seed: int, kernel: str, ran: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if kernel == "flex":
        request.getfixturevalue("flex_attention")
    model = hybrid(small_model("qwen3"), make_mapper())
    _, _, batch = batch_of(seed)
    logits = model(batch)
    found = gradients(model, logits)
    first, *others = ran["past"]
    trees = int(batch.tree.max()) + 1
    assert first == 6 and len(others) == 1
    ran["past"].clear()
    monkeypatch.setattr(layout, "_SHORTEST", 1000)
    plain = model(batch)
    assert ran["past"] == [others[0] + 6 * trees] and ran["answers"][0] == ran["answers"][1]
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)
    for got, want in zip(found, gradients(model, plain), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("grad", [True, False])
def test_bfloat16_stays_as_near(grad: bool, ran: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same prompts in float32, with the opening and without."""
    _, _, batch = batch_of(1)
    exact = hybrid(small_model("llama"), make_mapper())
    model = hybrid(small_model("llama").bfloat16(), make_mapper())
    with torch.set_grad_enabled(grad):
        want = exact(batch).detach()
        ran["past"].clear()
        with_it = model(batch).detach()
        assert ran["past"][0] == 6 and len(ran["past"]) == 1 + grad
        monkeypatch.setattr(layout, "_SHORTEST", 1000)
        without = model(batch).detach()
    assert (with_it - want).norm() <= 1.5 * (without - want).norm() + 0.01 * want.norm()


def test_nothing_is_kept_of_a_model_that_trains() -> None:
    """Also where a weight is written to in a way that torch does not count, as a fused optimizer may."""
    mapper = make_mapper()
    model = hybrid(small_model("llama"), mapper)
    prompts, rows, batch = batch_of(2)
    for trains in (True, True, False, True, False):
        model.llm.requires_grad_(trains)
        with torch.no_grad():
            torch.testing.assert_close(
                model(batch), all_alone(model.llm, prompts, rows, mapper), rtol=0, atol=2e-5, check_dtype=False
            )
            model(batch)
        assert (model.openings.tokens_saved > 0) is not trains
        model.openings.tokens_saved = 0
        if trains:
            model.llm.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)


def test_which_batches_have_one() -> None:
    def tokens(model: CoLLM, batch: PackedBatch, grad: bool = False) -> int:
        with torch.set_grad_enabled(grad):
            head = model.layout(batch).head
        return 0 if head is None or head.opening is None else head.opening.tokens

    model = hybrid(small_model("llama"), make_mapper())
    prompts = random_prompts(3, groups=5)
    _, rows, batch = batch_of(3)
    assert tokens(model, pack(prompts, rows)) == 0, "the first group begins with a slot"
    assert tokens(model, pack(opened(prompts, OPENING[:3]), rows)) == 0, "three tokens"
    assert tokens(model, pack(opened(prompts, OPENING[:4]), rows)) == 4
    one = np.flatnonzero(prompts.group == 2)
    assert tokens(model, pack(opened(prompts), one)) == 0, "one tree"
    assert tokens(hybrid(small_model("llama"), make_mapper(), kv_cache_gb=1.0), batch) == 0, "whole prefixes are kept"
    assert model.layout(batch, padded=True).head.opening is None, "a captured step"  # type: ignore[union-attr]
    assert model.decoder is not None
    model.decoder.fixed_positions = False
    assert tokens(model, batch) == 0, "its keys depend on the length of the batch"
    model.decoder.fixed_positions = True
    for layer in add_lora(model.llm, LoraConfig(r=2, dropout=0.2), torch.Generator().manual_seed(0)):
        layer.requires_grad_(False)
    assert tokens(model, batch, grad=True) == 6
    set_step_seed(model.train(), 1)
    assert tokens(model, batch, grad=True) == tokens(model, batch) == 0, "dropout draws"
    set_dropout(model.llm, False)
    assert tokens(model, batch, grad=True) == 6
    model.llm.requires_grad_(True)
    assert tokens(model, batch, grad=True) == 0 and tokens(model, batch) == 6, "it trains"


def test_openings_differ_between_batches() -> None:
    """Each is found by its own tokens."""
    model, prompts = hybrid(small_model("llama"), make_mapper()), random_prompts(4, groups=4)
    for tokens in (OPENING, OPENING[::-1], OPENING):
        some = opened(prompts, tokens)
        rows = np.arange(len(some))
        with torch.no_grad():
            got = model(pack(some, rows))
            torch.testing.assert_close(
                got, all_alone(model.llm, some, rows, model.mapper), rtol=0, atol=2e-5, check_dtype=False
            )
    assert len(model.openings) == 2 and model.openings.tokens_saved == 6

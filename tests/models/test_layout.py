"""Layouts that are padded for CUDA graphs: what nobody reads changes nothing, and shapes decide all shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flex_on_cpu import flex_attention  # noqa: F401  (a fixture)
from hybrids import hybrid, make_mapper
from small_llm import random_prompts, small_model
from torch import Tensor

from collm_fast.data.packing import pack
from collm_fast.models.collm import CoLLM
from collm_fast.models.flex import padded_length

pytestmark = pytest.mark.usefixtures("flex_attention")


def model_of(slots: bool, family: str = "llama", **options: int) -> CoLLM:
    if slots:
        return hybrid(small_model(family, **options), make_mapper())
    model = CoLLM(small_model(family, **options), yes_id=5, no_id=6)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("q_proj.weight", "v_proj.weight")))
    return model


def logits_and_gradients(model: CoLLM, layout) -> list[Tensor]:  # type: ignore[no-untyped-def]
    logits = model.compute(layout)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = torch.linspace(-1, 1, len(logits))
    return [logits.detach(), *torch.autograd.grad((logits * weight).sum(), trained)]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_what_nobody_reads_changes_nothing(seed: int, slots: bool, window: int | None) -> None:
    prompts = random_prompts(seed, groups=3 + 9 * seed, slots=slots)
    rows = np.random.default_rng(seed).permutation(len(prompts))
    model = model_of(slots, "mistral", sliding_window=window)  # type: ignore[arg-type]
    batch = pack(prompts, rows, pairs=False)
    plain, padded = (model.layout(batch, padded=padded) for padded in (False, True))
    tokens, first, count, slot_count = padded.shape
    assert first in (0, padded_length(first)) and tokens - first == padded_length(tokens - first)
    assert (first > 0) is slots and slot_count == (padded_length(slot_count) if slots else 0)
    assert count == len(rows) and plain.shape[0] == len(batch.token_ids) < tokens
    found = [logits_and_gradients(model, layout) for layout in (padded, plain)]
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("slots", [True, False])
def test_a_layout_fits_into_another_of_its_shape(slots: bool) -> None:
    """Copied over, its tensors give its own logits and gradients through the other layout's plan."""
    model = model_of(slots)
    kept: dict[tuple[int, ...], object] = {}
    met = 0
    for seed in range(12):
        prompts = random_prompts(seed, groups=5, slots=slots)
        batch = pack(prompts, np.random.default_rng(seed).permutation(len(prompts))[:8])
        layout = model.layout(batch, padded=True)
        want = logits_and_gradients(model, layout)
        other = kept.setdefault(layout.shape, layout)
        if other is layout:
            continue
        met += 1
        into, values = (x.tensors(model.decoder.windows[:1]) for x in (other, layout))  # type: ignore[attr-defined,union-attr]
        assert [x.shape for x in into] == [x.shape for x in values]
        assert not any(torch.equal(a, b) for a, b in zip(into[:2], values[:2], strict=True))
        for a, b in zip(into, values, strict=True):
            a.copy_(b)
        for got, expected in zip(logits_and_gradients(model, other), want, strict=True):
            assert torch.equal(got, expected)
    assert met >= 5


def test_nothing_to_pad() -> None:
    """A batch of just such lengths gets no tree: 128 tokens, none of them before a slot."""
    prompts = random_prompts(0, groups=40, slots=False)
    model = model_of(False)
    lengths = np.diff(prompts.offsets)
    rows, total = [], 0
    for row in range(len(prompts)):
        left = 128 - total - lengths[row]
        if left == 0 or left >= lengths.min() + 12:
            rows.append(row)
            total += int(lengths[row])
    assert total <= 128
    batch = pack(prompts, np.array(rows), share_prefix=False)
    layout = model.layout(batch, padded=True)
    trees = len(layout.plan.trees)
    assert trees == len(rows) + (total < 128) and layout.shape[0] == 128

"""The gradient of one optimizer step: in parts it is the whole one's, and masks belong to positions or samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_llm import H, random_prompts, small_model
from small_loop import CONFIG, StopAfter, lora_model, mapper_model, options, run
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_fast import reference
from collm_fast.config import LoraConfig
from collm_fast.data.packing import PackedBatch, pack
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import LoraLinear, add_lora, lora_layers, set_step_seed
from collm_fast.training.interrupt import Interrupted
from collm_fast.training.loop import add_gradient, derived_seed, micro_batches
from collm_fast.training.stages import set_trainable

TEXT = random_prompts(0, groups=8, slots=False)
ROWS = np.random.default_rng(5).permutation(len(TEXT))


def gradients(model: CoLLM, stage: str, prompts, folder, **changes) -> tuple[float, dict[str, Tensor]]:
    parameters = set_trainable(model, stage)
    for parameter in parameters.values():
        parameter.grad = None
    loss = float(add_gradient(model, prompts, ROWS[ROWS < len(prompts)], options(folder, **changes), 3))
    return loss, {name: parameter.grad.clone() for name, parameter in parameters.items()}


def with_random_b(model: CoLLM) -> CoLLM:
    for place, (_, layer) in enumerate(lora_layers(model)):
        torch.nn.init.normal_(layer.lora_B, std=0.3, generator=torch.Generator().manual_seed(place))
    return model


def seen_batches(model: CoLLM) -> list[PackedBatch]:
    seen: list[PackedBatch] = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    return seen


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("stage", ["lora", "cie"])
def test_the_parts_of_a_batch_add_up_to_the_gradient_of_the_whole(tmp_path, stage, share_prefix):
    model = with_random_b(lora_model(0.0)) if stage == "lora" else mapper_model()
    prompts = TEXT if stage == "lora" else random_prompts(0, groups=8)
    seen = seen_batches(model)
    loss, whole = gradients(model, stage, prompts, tmp_path, share_prefix=share_prefix, tokens_per_batch=10**6)
    assert len(seen) == 1
    for budget in (1, 40, 90):
        seen.clear()
        got, parts = gradients(model, stage, prompts, tmp_path, share_prefix=share_prefix, tokens_per_batch=budget)
        assert len(seen) > 2 and all(len(batch.token_ids) <= budget or len(batch) == 1 for batch in seen)
        assert sorted(torch.cat([batch.row for batch in seen]).tolist()) == sorted(ROWS[ROWS < len(prompts)].tolist())
        assert got == pytest.approx(loss, rel=1e-6)
        for name, value in whole.items():
            assert (parts[name] - value).norm() <= 3e-6 * value.norm(), name
        together, expected = (torch.cat([g.flatten() for g in each.values()]) for each in (parts, whole))
        # Small parts and the whole may take different kernels: float32 rounding remains.
        assert (together - expected).norm() <= 3e-6 * expected.norm()


def test_a_batch_that_fits_is_computed_as_it_stands(tmp_path):
    model = with_random_b(lora_model())
    loss, got = gradients(model, "lora", TEXT, tmp_path)
    parameters = set_trainable(model, "lora")
    for parameter in parameters.values():
        parameter.grad = None
    set_step_seed(model, derived_seed(3, "stage1", "dropout", 3))
    batch = pack(TEXT, ROWS)
    expected = binary_cross_entropy_with_logits(model(batch), batch.label)
    expected.backward()
    assert loss == expected.item()
    assert all(torch.equal(got[name], parameter.grad) for name, parameter in parameters.items())


def test_parts_keep_groups_together_and_draw_masks_of_their_own(tmp_path):
    model = lora_model()
    seeds: list[int] = []
    layer = next(layer for _, layer in lora_layers(model))
    model.register_forward_pre_hook(lambda module, arguments: seeds.append(layer.seed.item()))
    gradients(model, "lora", TEXT, tmp_path, tokens_per_batch=60)
    assert len(seeds) > 2 and len(set(seeds)) == len(seeds)
    parts = micro_batches(TEXT, ROWS, options(tmp_path, tokens_per_batch=60))
    groups = [set(TEXT.group[part.row.numpy()].tolist()) for part in parts]
    assert sum(map(len, groups)) == len(set(TEXT.group.tolist()))


@pytest.mark.parametrize("order", ["group", "random"])
def test_steps_of_parts_follow_those_of_whole_batches_and_continue_to_the_same_bits(tmp_path, order):
    config = dataclasses.replace(CONFIG, batch_size=8, eval_every=3)
    arguments = {"config": config, "order": order, "total": 6}
    whole, _ = run(tmp_path / "whole", model=lora_model(0.0), **arguments)
    parts, _ = run(tmp_path / "parts", model=lora_model(0.0), tokens_per_batch=50, **arguments)
    assert parts.history.loss == pytest.approx(whole.history.loss, rel=1e-4)
    expected, state = run(tmp_path / "dropout", tokens_per_batch=50, **arguments)
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", tokens_per_batch=50, stop=StopAfter(14), **arguments)
    result, again = run(tmp_path / "broken", tokens_per_batch=50, resume=True, **arguments)
    assert result.history == expected.history and result.history.loss != whole.history.loss
    assert all(torch.equal(again[name], state[name]) for name in state)


def twins() -> np.ndarray:
    """Two rows that are equal to the last token: the copy that `random_prompts` puts into its first group."""
    rows = np.flatnonzero(TEXT.group == 0)[-2:]
    first, second = (TEXT.token_ids[TEXT.offsets[row] : TEXT.offsets[row + 1]] for row in rows)
    assert np.array_equal(first, second)
    return rows


def test_masks_of_a_shared_prefix_are_shared_or_drawn_for_each_sample(tmp_path):
    model = with_random_b(lora_model(0.5))
    layer = next(layer for _, layer in lora_layers(model))
    updates: list[Tensor] = []
    layer.register_forward_hook(lambda module, x, y: updates.append((y - module.base(x[0])).reshape(-1, H)))
    seen = seen_batches(model)
    set_trainable(model, "lora")
    add_gradient(model, TEXT, twins(), options(tmp_path), 0)
    length = int(np.diff(TEXT.offsets)[twins()[0]])
    assert len(seen[0].token_ids) == length + 1 and len(updates[0]) == length + 1
    add_gradient(model, TEXT, twins(), options(tmp_path, share_prefix=False), 0)
    assert len(seen[1].token_ids) == 2 * length and int(seen[1].tree.max()) == 1
    first, second = updates[1].split(length)
    # Equal rows, so their updates differ by nothing but the masks.
    assert ((first - second).abs().amax(1) > 1e-3).all()


class Masked(torch.nn.Module):
    """A LoRA layer written out, with the mask of one stretch of the packed tokens."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.layer, self.mask = layer, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return layer.base(x) + layer.scaling * (x * self.mask) @ layer.lora_A.T @ layer.lora_B.T


def test_the_gradient_of_masks_per_sample_is_that_of_prompts_run_one_by_one(tmp_path):
    model = with_random_b(lora_model(0.3))
    loss, got = gradients(model, "lora", TEXT, tmp_path, share_prefix=False)
    seeds = [int(layer.seed) for _, layer in lora_layers(model)]

    llm = small_model("llama")
    add_lora(llm, LoraConfig(r=4, dropout=0.3), torch.Generator().manual_seed(1))
    layers = list(lora_layers(llm))
    for (name, layer), (_, like) in zip(layers, lora_layers(model), strict=True):
        layer.load_state_dict(like.state_dict())
        layer.requires_grad_(True).base.requires_grad_(False)
        llm.set_submodule(name, Masked(layer))
    total = int(np.diff(TEXT.offsets)[ROWS].sum())
    masks = [reference.dropout_mask(seed, total, H, 0.3).float() for seed in seeds]
    at, losses = 0, []
    for row in ROWS:
        tokens = torch.from_numpy(TEXT.token_ids[TEXT.offsets[row] : TEXT.offsets[row + 1]].astype(np.int64))
        for (name, _), mask in zip(layers, masks, strict=True):
            llm.get_submodule(name).mask = mask[at : at + len(tokens)]
        logit = llm(input_ids=tokens[None], use_cache=False).logits[0, -1, 5]
        losses.append(binary_cross_entropy_with_logits(logit, torch.tensor(float(TEXT.label[row]))))
        at += len(tokens)
    mean = torch.stack(losses).mean()
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    for name, layer in layers:
        for part in ("lora_A", "lora_B"):
            truth = getattr(layer, part).grad
            assert (got[f"llm.{name}.{part}"] - truth).norm() <= 1e-5 * truth.norm(), name

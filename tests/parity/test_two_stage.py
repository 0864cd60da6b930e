"""Both stages, step by step, against a naive implementation: transformers and peft, padded rows, full logits.

The naive way is written here and shares nothing with ours but the prompts: it looks every slot up on its own, fills a
[B, L] batch from the left, and reads the answer from [B, L, V]. Before each step both sides get the same parameters.
With dropout, both get the same masks: ours draws them per packed position, so each naive token takes the mask of the
packed position that computes it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_llm import ITEMS, USERS, H, random_prompts, small_model
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from collm_fast import reference
from collm_fast.config import LoraConfig, MapperConfig
from collm_fast.data.packing import PackedBatch, batches, pack
from collm_fast.data.prompts import USER, Prompts
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import add_lora, lora_layers, set_step_seed
from collm_fast.models.mapper import Mapper

YES, NO, D, STEPS, LR = 7, 11, 6, 5, 1e-3


class InjectedDropout(nn.Module):
    """Multiplies by the mask it was given."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x * self.mask


class Naive:
    """CoLLM as plain transformers and peft compute it."""

    def __init__(self, family: str, rank: int, alpha: float, loss: str) -> None:
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(small_model(family), config).eval()
        self.layers = {n: m for n, m in self.model.named_modules() if n.endswith((".q_proj", ".v_proj"))}
        self.dropouts = {name: InjectedDropout() for name in self.layers}
        for name, layer in self.layers.items():
            layer.lora_dropout["default"] = self.dropouts[name]
        generator = torch.Generator().manual_seed(0)
        self.user, self.item = (torch.randn(n, D, generator=generator) for n in (USERS, ITEMS))
        self.mapper = nn.Sequential(nn.Linear(D, 10 * D), nn.ReLU(), nn.Linear(10 * D, H))
        self.loss_name = loss

    def parameters(self, stage: str) -> dict[str, Tensor]:
        """The trained parameters by our names."""
        if stage == "cie":
            names = ("first.weight", "first.bias", "second.weight", "second.bias")
            return {f"mapper.{n}": p for n, p in zip(names, self.mapper.parameters(), strict=True)}
        out: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            ours = name.removeprefix("base_model.model.")
            out[f"llm.{ours}.lora_A"] = layer.lora_A["default"].weight
            out[f"llm.{ours}.lora_B"] = layer.lora_B["default"].weight
        return out

    def embed(self, prompts: Prompts, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(embeddings [B, L, H] padded on the right, lengths [B])."""
        lengths = torch.from_numpy(np.diff(prompts.offsets)[rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        slots, features = torch.zeros_like(ids, dtype=torch.bool), []
        for b, row in enumerate(rows):
            for place, t in enumerate(range(prompts.offsets[row], prompts.offsets[row + 1])):
                ids[b, place] = int(prompts.token_ids[t])
                if prompts.slot_role[t]:
                    slots[b, place] = True
                    features.append((self.user if prompts.slot_role[t] == USER else self.item)[prompts.slot_id[t]])
        embeds = self.model.get_input_embeddings()(ids)
        if features:
            embeds = embeds.masked_scatter(slots[..., None], self.mapper(torch.stack(features)))
        return embeds, lengths

    def loss(self, prompts: Prompts, rows: np.ndarray) -> Tensor:
        embeds, lengths = self.embed(prompts, rows)
        attention = torch.arange(embeds.shape[1])[None, :] < lengths[:, None]
        logits = self.model(inputs_embeds=embeds, attention_mask=attention.long()).logits
        last = logits[torch.arange(len(rows)), lengths - 1]
        answer = last[:, YES] if self.loss_name == "yes" else last[:, YES] - last[:, NO]
        return bce(answer, torch.from_numpy(prompts.label[rows]).float())

    def inject_masks(self, ours: CoLLM, batch: PackedBatch, p: float) -> None:
        """Gives every layer the mask that our layer of that name draws, by the packed position of each token."""
        tree, branch, answer = batch.tree.numpy(), batch.branch.numpy(), batch.answer.numpy()
        places = [np.flatnonzero((tree == tree[a]) & ((branch < 0) | (branch == branch[a]))) for a in answer]
        longest = max(len(place) for place in places)
        padded = torch.from_numpy(np.stack([np.pad(place, (0, longest - len(place))) for place in places]))
        by_name = {f"base_model.model.{name}": layer for name, layer in lora_layers(ours.llm)}
        for name, dropout in self.dropouts.items():
            layer = by_name[name]
            mask = reference.dropout_mask(layer.seed, len(tree), layer.in_features, p)
            dropout.mask = mask.float()[padded]


def build(family: str, dropout: float, loss: Any) -> tuple[CoLLM, Naive]:
    naive = Naive(family, rank=4, alpha=8.0, loss=loss)
    llm = small_model(family)
    generator = torch.Generator().manual_seed(1)
    for layer in add_lora(llm, LoraConfig(r=4, alpha=8.0, dropout=dropout), generator):
        # B starts at zero in training; here that would hide the adapters from every comparison.
        layer.lora_B.data.normal_(generator=generator).mul_(0.2)
    torch.manual_seed(2)
    cf: Any = SimpleNamespace(user=naive.user, item=naive.item)
    return CoLLM(llm, yes_id=YES, no_id=NO, loss=loss, cf=cf, mapper=Mapper(D, H, MapperConfig())), naive


def copy_parameters(ours: CoLLM, naive: Naive) -> None:
    mine = dict(ours.named_parameters())
    for stage in ("lora", "cie"):
        for name, parameter in naive.parameters(stage).items():
            parameter.data.copy_(mine[name].data)


@pytest.mark.parametrize(
    ("share_prefix", "dropout", "loss"),
    [(True, 0.0, "yes"), (True, 0.0, "yes-no"), (True, 0.3, "yes"), (False, 0.0, "yes"), (False, 0.3, "yes")],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_losses_and_gradients_of_both_stages(family: str, share_prefix: bool, dropout: float, loss: str) -> None:
    ours, naive = build(family, dropout, loss)
    for stage, slots in (("lora", False), ("cie", True)):
        prompts = random_prompts(3, groups=9, slots=slots)
        order = batches(prompts, order="group", batch_size=8, generator=np.random.default_rng(0)) * STEPS
        ours.requires_grad_(False).zero_grad(set_to_none=True)
        mine = dict(ours.named_parameters())
        trained = {name: mine[name].requires_grad_() for name in naive.parameters(stage)}
        optimizer = torch.optim.AdamW(trained.values(), lr=LR)
        losses = []
        for step, rows in enumerate(order[:STEPS]):
            copy_parameters(ours, naive)
            batch = pack(prompts, rows, share_prefix=share_prefix)
            set_step_seed(ours, 1000 + step)
            ours.train()
            if dropout:
                naive.inject_masks(ours, batch, dropout)

            expected = naive.loss(prompts, rows)
            theirs = naive.parameters(stage)
            truth = torch.autograd.grad(expected, list(theirs.values()))
            got = bce(ours(batch), batch.label)
            optimizer.zero_grad(set_to_none=True)
            got.backward()

            assert abs(got.item() - expected.item()) <= 1e-4 * abs(expected.item())
            for name, want in zip(theirs, truth, strict=True):
                grad = trained[name].grad
                assert grad is not None and want.norm() > 0, name
                assert (grad - want).norm() <= 1e-3 * want.norm(), (stage, step, name)
            assert all(p.grad is None for n, p in mine.items() if n not in trained)
            optimizer.step()
            losses.append(got.item())
        assert len(set(losses)) == STEPS


def test_the_shared_prefix_draws_one_mask_where_the_naive_way_draws_many() -> None:
    # What the mapping above hides: the same step with the rows unshared has other masks, and so another loss.
    ours, _ = build("llama", 0.3, "yes")
    prompts = random_prompts(3, groups=9, slots=False)
    ours.train()
    set_step_seed(ours, 1)
    with torch.no_grad():
        shared, flat = (ours(pack(prompts, np.arange(8), share_prefix=share)) for share in (True, False))
    assert not torch.allclose(shared, flat, atol=1e-3)

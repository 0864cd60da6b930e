"""LoRA over bases that only their own forward can multiply by: a written-out one, and those of bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from small_llm import random_prompts, small_model
from small_run import save_llm, write_world
from torch import Tensor, nn

import collm_fast
from collm_fast.config import LoraConfig
from collm_fast.data.packing import pack
from collm_fast.models.collm import CoLLM
from collm_fast.models.llm import fingerprint, load_llm
from collm_fast.models.lora import LoraLinear, add_lora, lora_layers, set_step_seed
from collm_fast.models.quantize import quantized


class Rounded(nn.Linear):
    """A base as a quantiser makes it: int8 weights in a packed shape, read by its own forward alone."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        scale = plain.weight.abs().amax() / 127
        self.scale = scale
        self.weight = nn.Parameter((plain.weight / scale).round().to(torch.int8).reshape(-1, 1), requires_grad=False)
        self.bias = plain.bias

    def whole(self) -> Tensor:
        return self.weight.reshape(self.out_features, self.in_features).float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.whole().to(x.dtype), self.bias)


def pair(bias: bool, dropout: float) -> tuple[LoraLinear, LoraLinear]:
    """The same layer over a rounded base, and over a plain one of the same values."""
    torch.manual_seed(0)
    rounded = Rounded(nn.Linear(48, 24, bias=bias))
    plain = nn.Linear(48, 24, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(rounded.whole())
        if bias:
            plain.bias.copy_(rounded.bias)
    layers = [LoraLinear(base, 4, 8.0, dropout, torch.Generator().manual_seed(1)) for base in (rounded, plain)]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.3, generator=torch.Generator().manual_seed(2))
        layer.seed.fill_(7)
    return layers[0], layers[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (0, 48)])
def test_a_layer_over_a_rounded_base_is_that_over_its_values(
    bias: bool, dropout: float, shape: tuple[int, ...]
) -> None:
    results = []
    for layer in pair(bias, dropout):
        assert layer.lora_A.dtype == torch.float32 and layer.training
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = layer(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
        results.append((y, x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).norm() <= 1e-6 * truth.norm()


def test_low_precision_and_evaluation_follow_the_base() -> None:
    rounded, plain = pair(False, 0.5)
    x = torch.randn(64, 48).bfloat16()
    drawn = rounded(x)
    got, truth = rounded.eval()(x), plain.eval()(x.float())
    assert got.dtype == torch.bfloat16 and not torch.equal(got, drawn)
    assert (got.float() - truth).norm() <= 1e-2 * truth.norm()


def test_a_model_with_rounded_layers_has_the_gradients_of_one_with_their_values() -> None:
    found = []
    for rounded in (True, False):
        llm = small_model("llama")
        for name, module in list(llm.named_modules()):
            if isinstance(module, nn.Linear) and name.startswith("model.layers"):
                base = Rounded(module)
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight.data.copy_(base.whole())
                llm.set_submodule(name, base if rounded else plain.requires_grad_(False))
        add_lora(llm, LoraConfig(r=4, dropout=0.2), torch.Generator().manual_seed(1))
        for place, (_, layer) in enumerate(lora_layers(llm)):
            nn.init.normal_(layer.lora_B, std=0.3, generator=torch.Generator().manual_seed(place))
        for decoder in (True, False):
            model = CoLLM(llm, yes_id=5, no_id=6, decoder=decoder).train()
            set_step_seed(model, 11)
            llm.zero_grad()
            logits = model(pack(random_prompts(0, slots=False), np.arange(6)))
            logits.square().sum().backward()
            found.append([logits.detach(), *(p.grad.clone() for p in llm.parameters() if p.grad is not None)])
    for ours, truth in zip(found[:2], found[2:], strict=True):
        assert len(ours) == len(truth) == 1 + 2 * len(list(lora_layers(llm)))
        for a, b in zip(ours, truth, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_rounded_head_is_read_by_its_own_forward() -> None:
    batch, logits = pack(random_prompts(0, slots=False), np.arange(6)), []
    for rounded in (True, False):
        llm = small_model("llama")
        base = Rounded(llm.lm_head)
        llm.lm_head = base if rounded else nn.Linear(base.in_features, base.out_features, bias=False)
        if not rounded:
            llm.lm_head.weight.data.copy_(base.whole())
        with torch.no_grad():
            logits.append(CoLLM(llm, yes_id=5, no_id=6, loss="yes-no")(batch))
    torch.testing.assert_close(*logits)


def test_what_is_missing_or_unknown_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantize: expected one of int8, nf4 or none, got 'int3'"):
        quantized("int3", torch.float32, torch.device("cpu"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(ValueError, match="quantize: expected bitsandbytes to be installed for nf4 .pip install bits"):
        load_llm(tmp_path, quantize="nf4", device="cpu")


def load(folder: Path, form: str | None) -> tuple[Any, str]:
    llm, tokenizer = load_llm(folder, dtype="float32", device="cpu", quantize=form)
    return llm, fingerprint(llm, tokenizer)


@requires("bitsandbytes")
def test_models_of_bitsandbytes_compute_what_their_weights_say(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    folder = save_llm(tmp_path / "llm")
    plain, mark = load(folder, None)
    marks = {mark}
    for form, kind in (("int8", bnb.nn.Linear8bitLt), ("nf4", bnb.nn.Linear4bit)):
        llm, mark = load(folder, form)
        assert mark == load(folder, form)[1] and mark not in marks
        marks.add(mark)
        layers = {name: m for name, m in llm.named_modules() if isinstance(m, kind)}
        assert len(layers) == 7 * len(llm.model.layers) and type(llm.lm_head) is nn.Linear
        for name, layer in layers.items():
            weight = (
                bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                if form == "nf4"
                else layer.weight.float() * layer.weight.SCB[:, None] / 127
            )
            plain.get_submodule(name).weight.data.copy_(weight)
        found = []
        for model in (llm, plain):
            add_lora(model, LoraConfig(r=4, dropout=0.2), torch.Generator().manual_seed(1))
            for place, (_, layer) in enumerate(lora_layers(model)):
                nn.init.normal_(layer.lora_B, std=0.3, generator=torch.Generator().manual_seed(place))
            hybrid, batch = (
                CoLLM(model, yes_id=5, no_id=6).to("cpu"),
                pack(random_prompts(0, slots=False), np.arange(6)),
            )
            with torch.no_grad():  # As the evaluation before the first step, which must leave the gradient alone.
                hybrid(batch)
            hybrid.train()
            set_step_seed(hybrid, 11)
            logits = hybrid(batch)
            logits.square().sum().backward()
            found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        # int8 rounds activations and goes through float16.
        limit = 1e-4 if form == "nf4" else 0.15
        for ours, truth in zip(*found, strict=True):
            assert (ours - truth).norm() <= limit * truth.norm(), form
        plain, _ = load(folder, None)


@requires("bitsandbytes")
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_run_trains_opens_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    write_world(tmp_path, monkeypatch)
    options = {
        **{"limit_train": 16, "limit_eval": 16, "max_steps": 2, "dtype": "float32", "quantize": form},
        **{"collaborative": {"max_epochs": 2, "dim": 4}, "prompt": {"history_length": 2}},
    }
    run = collm_fast.train(tmp_path / "data", tmp_path / "llm", "mf", tmp_path / "run", **options)
    assert run.record["quantize"] == form and "quantize" in (run.path / "report.md").read_text(encoding="utf-8")
    again = run.evaluate("test")["stage2"]["test"]["all"]
    assert again["auc"] == pytest.approx(run.metrics["stage2"]["test"]["all"]["auc"], abs=1e-6)
    with pytest.raises(ValueError, match=r"quantize: expected .* as in the run to be resumed"):
        collm_fast.train(
            tmp_path / "data", tmp_path / "llm", "mf", run.path, **{**options, "quantize": None}, resume="auto"
        )

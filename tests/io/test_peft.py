"""Adapter folders: stock PEFT reads ours and we read stock PEFT's, and a bad folder is a sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from collm_fast.config import LoraConfig
from collm_fast.io.peft import load_adapter, read_adapter_config, save_adapter
from collm_fast.models.lora import add_lora, lora_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(40).reshape(2, 20)
CONFIG = LoraConfig(r=4, alpha=12.0, dropout=0.1)


def llm(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(parameter)
    return model


def with_lora(family: str, config: LoraConfig = CONFIG) -> nn.Module:
    model = llm(family)
    for layer in add_lora(model, config, torch.Generator().manual_seed(1)):
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stock_peft_reads_ours(family: str, tmp_path: Path) -> None:
    import peft

    model = with_lora(family)
    assert save_adapter(model, tmp_path / "adapter", "some/base", CONFIG) == tmp_path / "adapter"
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    stock = peft.PeftModel.from_pretrained(llm(family), tmp_path / "adapter")
    with torch.no_grad():
        expected, plain = model(IDS).logits, llm(family)(IDS).logits
        assert (stock(IDS).logits - expected).abs().max() <= 1e-5
        assert (plain - expected).abs().max() > 1e-2
    config = stock.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.1)
    assert config.base_model_name_or_path == "some/base" and config.target_modules == {"q_proj", "v_proj"}
    merged = stock.merge_and_unload()
    with torch.no_grad():
        assert (merged(IDS).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_we_read_stock_peft(family: str, tmp_path: Path) -> None:
    import peft

    stock = peft.get_peft_model(
        llm(family),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    stock.save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path)
    assert (config.r, config.alpha, config.dropout, sorted(config.target_modules)) == (
        4,
        12.0,
        0.0,
        ["o_proj", "q_proj"],
    )
    model = with_lora(family, config)
    assert load_adapter(model, tmp_path) == config
    with torch.no_grad():
        assert (stock(IDS).logits - model(IDS).logits).abs().max() <= 1e-5


def test_rslora_becomes_the_alpha_of_the_same_scaling(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    stock = peft.get_peft_model(llm("llama"), config)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    stock.save_pretrained(tmp_path / "stock")
    ours = read_adapter_config(tmp_path / "stock")
    assert ours.alpha / ours.r == 3 / 2
    model = with_lora("llama", ours)
    load_adapter(model, tmp_path / "stock")
    save_adapter(model, tmp_path / "plain", "base", ours)
    again = peft.PeftModel.from_pretrained(llm("llama"), tmp_path / "plain")
    with torch.no_grad():
        for other in (model, again):
            assert (stock(IDS).logits - other(IDS).logits).abs().max() <= 1e-5


def test_a_round_trip_keeps_every_bit_and_replaces_what_was_there(tmp_path: Path) -> None:
    model, other = with_lora("llama"), with_lora("llama")
    for _, layer in lora_layers(other):
        nn.init.zeros_(layer.lora_A)
    save_adapter(other, tmp_path, "base", CONFIG)
    save_adapter(model, tmp_path, "base", CONFIG)
    load_adapter(other, tmp_path)
    for (_, a), (_, b) in zip(lora_layers(model), lora_layers(other), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file is left"


def test_alpha_that_is_no_integer(tmp_path: Path) -> None:
    config = LoraConfig(r=4, alpha=2.5)
    save_adapter(with_lora("llama", config), tmp_path, "base", config)
    assert read_adapter_config(tmp_path).alpha == 2.5


def test_a_model_without_lora_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_adapter: expected a model with LoRA layers"):
        save_adapter(nn.Linear(2, 2), tmp_path / "a", "base", CONFIG)
    assert not (tmp_path / "a").exists()
    save_adapter(with_lora("llama"), tmp_path, "base", CONFIG)
    with pytest.raises(ValueError, match="load_adapter: expected a model with LoRA layers"):
        load_adapter(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "expected use_dora=False in .*, got True"),
        ({"use_rslora": True, "r": -1}, r"adapter_config.json: r: expected in \[1, 256\], got -1"),
        ({"bias": "all"}, "expected bias='none' in .*, got 'all'"),
        ({"peft_type": "IA3"}, "expected peft_type='LORA' in .*, got 'IA3'"),
        ({"rank_pattern": {"q_proj": 2}}, "expected rank_pattern={} in .*, got {'q_proj': 2}"),
        ({"target_modules": "all-linear"}, "expected target_modules to be a list in .*, got 'all-linear'"),
        ({"r": None}, "expected a number r in .*, got None"),
        ({"lora_alpha": "16"}, "expected a number lora_alpha in .*, got '16'"),
        ({"r": 0}, r"adapter_config.json: r: expected in \[1, 256\], got 0"),
        ({"lora_alpha": 0}, "adapter_config.json: alpha: expected above 0, got 0.0"),
    ],
)
def test_settings_that_are_not_served(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save_adapter(with_lora("llama"), tmp_path, "base", CONFIG)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        read_adapter_config(tmp_path)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    model = with_lora("llama")
    with pytest.raises(ValueError, match="expected a PEFT adapter folder with adapter_config.json, got"):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "base", CONFIG)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good = config.read_text()
    for text, sentence in (("{", "expected JSON in"), ("[]", "expected a JSON object in .*, got list")):
        config.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_adapter(model, tmp_path)
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a safetensors file, got"):
        load_adapter(model, tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="expected a PEFT adapter folder with adapter_model.safetensors, got"):
        load_adapter(model, tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    model = with_lora("llama")
    save_adapter(model, tmp_path, "base", CONFIG)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(iter(sorted(tensors)))
    before = copy.deepcopy(model.state_dict())
    missing = {k: v for k, v in tensors.items() if k != key}
    for bad, sentence in (
        (missing, rf"expected the model's 8 keys in .*, got 1 missing \({key}\)"),
        ({**tensors, "zebra": torch.ones(1)}, r"got 1 unexpected \(zebra\)"),
        ({**missing, "zebra": torch.ones(1)}, rf"got 1 missing \({key}\) and 1 unexpected \(zebra\)"),
        ({**tensors, key: torch.ones(3, 32)}, rf"expected {key} of shape \[4, 32\] in .*, got \[3, 32\]"),
        ({**tensors, key: torch.full((4, 32), torch.nan)}, f"expected finite values of {key}"),
    ):
        save_file(bad, weights)
        with pytest.raises(ValueError, match=sentence):
            load_adapter(model, tmp_path)
    save_file(tensors, weights)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 16}))
    with pytest.raises(ValueError, match=r"expected scaling 3.0 of model.layers.0.self_attn.q_proj in .*, got 4.0"):
        load_adapter(model, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "nothing was copied"

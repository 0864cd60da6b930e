"""FastLoraLinear and accelerate_lora against stock PEFT: values, gradients, folders, switches, conversion and back.

Several processes, checkpointing and compilation are in test_peft_systems.py; the op itself in ops/test_lora.py.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear
from peft_models import IDS, OurMask, adapters, layers, llm, small
from torch import Tensor, nn

import collm_fast
from collm_fast.peft import AcceleratedLora, FastLoraLinear, accelerate_lora


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [1, 8, 64, 256])
@pytest.mark.parametrize("low", [False, True], ids=["float32 adapters", "adapters in the base's dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_eval_and_its_gradients(dtype: torch.dtype, low: bool, r: int, bias: bool) -> None:
    options: dict[str, Any] = {"r": r, "lora_alpha": 3, "use_rslora": bias, "autocast_adapter_dtype": not low}
    ours, theirs = (small(fast, dtype, bias=bias, **options) for fast in (True, False))
    exact = copy.deepcopy(theirs).double()
    x, grad = torch.randn(5, 7, 24).to(dtype), torch.randn(5, 7, 40).to(dtype)
    results = []
    for model in (ours, theirs, exact):
        leaf = x.to(model.base_model.model[0].weight.dtype).clone().requires_grad_()
        y = model.eval()(leaf)
        y.backward(grad.to(y.dtype))
        results.append([y.detach(), leaf.grad, *(p.grad for _, p in adapters(model))])
    assert isinstance(ours.base_model.model[0], FastLoraLinear)
    for got, peer, true in zip(*results, strict=True):
        assert got.dtype == peer.dtype
        assert error(got, true) <= max(2 * error(peer, true), 1e-6)


def test_a_language_model_in_eval() -> None:
    ours, theirs = (llm(fast).eval() for fast in (True, False))
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert (ours(IDS).logits - expected).norm() <= 1e-6 * expected.norm()
        with ours.disable_adapter(), theirs.disable_adapter():
            plain = theirs(IDS).logits
            assert torch.equal(ours(IDS).logits, plain)
        assert (plain - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_follow_peft_with_the_same_masks(dtype: torch.dtype) -> None:
    """The oracle is PEFT in float64 with our masks; each step starts from its parameters."""
    ours, theirs, exact = llm(True, dtype), llm(False, dtype), llm(False, dtype)
    exact.double()
    for model in (theirs, exact):
        for _, layer in layers(model):
            layer.lora_dropout["default"] = OurMask(layer.lora_dropout["default"].p)
    trained = [p for _, p in adapters(exact)]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(20):
        ids = torch.randint(0, 90, (2, 17))
        losses, gradients = [], []
        for model in (ours, theirs, exact):
            torch.manual_seed(step)
            model.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.double())
            gradients.append(torch.cat([p.grad.flatten().double() for _, p in adapters(model)]))
        floor = 1e-6 if dtype == torch.float32 else 1e-3
        assert error(losses[0], losses[2]) <= 2 * error(losses[1], losses[2]) + floor, step
        assert error(gradients[0], gradients[2]) <= 2 * error(gradients[1], gradients[2]) + 1e-6, step
        optimizer.step()
        for model in (ours, theirs):
            for (_, p), source in zip(adapters(model), trained, strict=True):
                p.data.copy_(source.data)


def test_the_masks_follow_torchs_seed_and_differ_between_layers_and_calls() -> None:
    model = llm(True)
    seen: list[Tensor] = []
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(IDS).logits)
        outputs.append(model(IDS).logits)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    for other in (outputs[1], outputs[4]):
        assert not torch.equal(outputs[0], other)
    # One layer twice on one input: each call draws its own mask.
    layer = next(layers(model))[1]
    x = torch.ones(1, 1, 32)
    seen = [layer(x) for _ in range(8)]
    assert len({tuple(y.flatten().tolist()) for y in seen}) == 8
    # What PEFT asks is the mode of the dropout itself.
    layer.lora_dropout.eval()
    assert torch.equal(layer(x), layer(x))


def test_dropout_keeps_the_share_that_peft_asks_for() -> None:
    model = small(True, r=1, lora_alpha=1, lora_dropout=0.3, bias=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A.default.weight.fill_(1.0)
        layer.lora_B.default.weight.fill_(1.0)
    sums = layer(torch.ones(20_000, 24))[:, 0]
    # A sum of 24 elements that are 1 / 0.7 with probability 0.7: mean 24, variance 24 * 0.3 / 0.7.
    assert abs(sums.mean() - 24) < 5 * (24 * 3 / 7 / 20_000) ** 0.5
    assert abs(sums.var() / (24 * 3 / 7) - 1) < 0.05


def test_bytes_kept_for_backward() -> None:
    """x, x A^T, the 8 bytes of the seed, and the parameters: no mask and no copy of x."""
    model = small(True, torch.bfloat16, r=4, lora_dropout=0.5)
    x = torch.randn(30, 24, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    parameters = {p.data_ptr() for p in model.parameters()}
    rest = {(t.data_ptr(), t.dtype, tuple(t.shape)) for t in kept if t.data_ptr() not in parameters}
    assert (x.data_ptr(), torch.bfloat16, (30, 24)) in rest
    assert sorted(shape for _, _, shape in rest) == [(1,), (30, 4), (30, 24)]
    assert sum(t.nbytes for t in kept if t.data_ptr() not in parameters) == 30 * 24 * 2 + 30 * 4 * 4 + 8


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [False, True])
def test_autocast(base: torch.dtype, low: bool) -> None:
    ours, theirs = (small(fast, base, r=4, autocast_adapter_dtype=not low) for fast in (True, False))
    exact, x = copy.deepcopy(theirs).double(), torch.randn(9, 24)
    results = []
    for model, cast in ((ours, True), (theirs, True), (exact, False)):
        leaf = (x if cast else x.double()).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
            y = model.eval()(leaf)
        y.float().square().mean().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for _, p in adapters(model))])
    for got, peer, true in zip(*results, strict=True):
        assert got.dtype == peer.dtype and error(got, true) <= 2 * error(peer, true)


def test_folders_of_ours_are_stock_folders(tmp_path: Path) -> None:
    ours = llm(True, lora_alpha=6, use_rslora=True)
    ours.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(llm(None), tmp_path)
    assert {type(layer) for _, layer in layers(stock)} == {Linear}
    for (name, p), (other, q) in zip(adapters(ours), adapters(stock), strict=True):
        assert name == other and torch.equal(p, q)
    with torch.no_grad():
        expected = stock(IDS, labels=IDS).loss
        assert abs(ours.eval()(IDS, labels=IDS).loss - expected) <= 1e-6 * expected
        # The same folder computed by the same code: no difference at all.
        for _, layer in layers(ours):
            layer.__class__ = Linear
        assert torch.equal(ours(IDS, labels=IDS).loss, expected)


def test_stock_folders_load_into_ours(tmp_path: Path) -> None:
    stock = llm(False, lora_alpha=6).eval()
    stock.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config._register_custom_module({nn.Linear: FastLoraLinear})
    ours = peft.PeftModel.from_pretrained(llm(None), tmp_path, config=config)
    assert {type(layer) for _, layer in layers(ours)} == {FastLoraLinear}
    assert list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        expected = stock(IDS, labels=IDS).loss
        assert abs(ours(IDS, labels=IDS).loss - expected) <= 1e-6 * expected
    ours.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("rslora", [False, True])
def test_merge_unmerge_and_unload(rslora: bool) -> None:
    ours, theirs = (llm(fast, use_rslora=rslora).eval() for fast in (True, False))
    with torch.no_grad():
        before = ours(IDS).logits
        for model in (ours, theirs):
            model.merge_adapter()
        merged = ours(IDS).logits
        assert torch.equal(merged, theirs(IDS).logits) and (merged - before).norm() <= 1e-5 * before.norm()
        ours.unmerge_adapter()
        assert (ours(IDS).logits - before).norm() <= 1e-5 * before.norm()
        plain = ours.merge_and_unload()
        assert not any(isinstance(m, FastLoraLinear) for m in plain.modules())
        assert (plain(IDS).logits - before).norm() <= 1e-5 * before.norm()


def test_several_adapters() -> None:
    models = [llm(fast, lora_dropout=0.0) for fast in (True, False)]
    for model in models:
        torch.manual_seed(5)
        # The second one is larger, scaled otherwise and for other layers too; PEFT makes it without our registration.
        config = peft.LoraConfig(r=6, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "o_proj"])
        model.add_adapter("other", config)
        for name, p in model.named_parameters():
            if "lora_B.other" in name:
                nn.init.normal_(p, std=0.3)
    ours, theirs = models
    results = []
    for names in ("default", "other", ["default", "other"]):
        for model in models:
            if isinstance(names, str):
                model.set_adapter(names)
            else:
                model.base_model.set_adapter(names)
            model.zero_grad()
        logits = [model(IDS).logits for model in models]
        for y in logits:
            y.square().mean().backward()
        assert (logits[0] - logits[1]).norm() <= 1e-6 * logits[1].norm()
        for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name
        results.append(logits[0].detach())
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    ours.delete_adapter("other")
    ours.set_adapter("default")
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, results[0])


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_are_trained_as_peft_says(bias: str) -> None:
    models = [small(fast, torch.bfloat16, r=4, bias=True, lora_bias_rule=bias) for fast in (True, False)]
    exact, x = copy.deepcopy(models[1]).double(), torch.randn(9, 24).bfloat16()
    for model in (*models, exact):
        model.eval()(x.to(model.base_model.model[0].weight.dtype)).double().square().sum().backward()
    for (name, p), (_, q), (_, true) in zip(*(m.named_parameters() for m in (*models, exact)), strict=True):
        assert p.requires_grad == q.requires_grad == (p.grad is not None), name
        assert p.requires_grad == ("lora_" in name or (bias != "none" and name.endswith("bias"))), name
        if p.grad is not None:
            assert error(p.grad, true.grad) <= 2 * error(q.grad, true.grad) + 1e-6, name


def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + 1


# Settings that the op does not serve: PEFT's own code must give PEFT's own bits.
NOT_SERVED: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    ({"use_dora": True}, lambda m: None, {}),
    ({"lora_bias": True}, lambda m: None, {}),
    ({"r": 257}, lambda m: None, {}),
    ({"lora_dropout": 1.0}, lambda m: None, {}),
    ({}, lambda m: m.base_layer.requires_grad_(True), {}),
    ({}, lambda m: m.base_layer.register_forward_hook(hook), {}),
    ({}, lambda m: m.lora_A.default.register_forward_hook(hook), {}),
    ({}, lambda m: (m.double(), m.lora_A.bfloat16(), m.lora_B.bfloat16()), {}),
    ({}, lambda m: m.lora_dropout.update({"default": nn.Tanh()}), {}),
    ({}, lambda m: m.scaling.update({"default": torch.tensor(2.0)}), {}),
    ({}, lambda m: None, {"adapter_names": ["default", "__base__"]}),
]


@pytest.mark.parametrize(("options", "change", "kwargs"), NOT_SERVED)
def test_what_the_op_does_not_serve_is_pefts(options: dict[str, Any], change: Any, kwargs: dict[str, Any]) -> None:
    results = []
    for fast in (True, False):
        model = small(fast, **{"r": 4, "lora_dropout": 0.5, **options})
        layer = model.base_model.model[0]
        assert type(layer) is (FastLoraLinear if fast else Linear)
        change(layer)
        x = torch.arange(48.0, dtype=layer.weight.dtype).reshape(2, 24).requires_grad_()
        torch.manual_seed(7)
        y = layer(x, **kwargs)
        y.sum().backward()
        results.append((y, x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_accelerate_and_restore() -> None:
    model, peer = llm(False, lora_dropout=0.2), llm(False, lora_dropout=0.2)
    before, parameters = model.state_dict(), list(model.parameters())
    modes = {name: module.training for name, module in model.named_modules()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    handle = collm_fast.accelerate_lora(model)
    assert isinstance(handle, AcceleratedLora)
    assert handle.converted == [name for name, _ in layers(model)] and len(handle.converted) == 6 and not handle.left
    assert repr(handle) == "AcceleratedLora: 6 of 6 layers converted"
    assert {type(layer) for _, layer in layers(model)} == {FastLoraLinear}
    assert list(model.state_dict()) == list(before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {name: module.training for name, module in model.named_modules()} == modes
    old = [p.detach().clone() for _, p in adapters(model)]
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for (_, p), q in zip(adapters(model), old, strict=True))
    handle.restore()
    handle.restore()
    assert {type(layer) for _, layer in layers(model)} == {Linear}
    peer.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, peer.eval()(IDS).logits)


def test_a_context_manager_restores_after_an_error() -> None:
    model = llm(False)
    with pytest.raises(KeyError), accelerate_lora(model) as handle:
        assert {type(layer) for _, layer in layers(model)} == {FastLoraLinear} and len(handle.converted) == 6
        raise KeyError
    assert {type(layer) for _, layer in layers(model)} == {Linear}


def test_layers_that_are_left_say_why() -> None:
    class Int8(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.round())

    torch.manual_seed(0)
    names = ("plain", "trained", "hooked", "wrapped", "wide", "tensor", "packed", "fast")
    parts = {name: nn.Linear(8, 8) for name in names}
    model = nn.ModuleDict({**parts, "int8": Int8(8, 8), "table": nn.Embedding(4, 8), "dora": nn.Linear(8, 8)})
    targets = [*parts, "int8", "table"]
    config = peft.LoraConfig(r=2, target_modules=targets, rank_pattern={"wide": 300})
    model = peft.inject_adapter_in_model(config, model)
    dora = peft.LoraConfig(r=2, use_dora=True, target_modules=["dora"])
    model = peft.inject_adapter_in_model(dora, model)
    model["trained"].base_layer.weight.requires_grad_()
    model["hooked"].base_layer.register_forward_hook(hook)
    model["wrapped"].forward = model["wrapped"].forward
    kind = type("Packed", (Tensor,), {})
    for layer in (model["tensor"].base_layer, model["packed"].lora_B.default):
        layer.weight = nn.Parameter(torch.ones(layer.weight.shape).as_subclass(kind), requires_grad=False)
    model["fast"].__class__ = FastLoraLinear
    handle = accelerate_lora(model)
    assert handle.converted == ["plain"]
    base = "its base layer, a {}, computes something else than nn.Linear or has hooks"
    assert handle.left == {
        "trained": "its base weight is trained",
        "hooked": base.format("Linear"),
        "wrapped": "its forward is wrapped",
        "wide": "adapter 'default' has rank 300, above 256",
        "tensor": "its base weight is a Packed",
        "packed": "adapter 'default' is a Parameter and a Packed",
        "fast": "it is a FastLoraLinear already",
        "int8": base.format("Int8"),
        "table": "it is a peft.tuners.lora.layer.Embedding, not a peft.tuners.lora.layer.Linear",
        "dora": "adapter 'default' is a DoraLinearVariant",
    }
    assert "1 of 11 layers converted; 1 left (trained, ...): its base weight is trained; 1 left (hooked, ...)" in repr(
        handle
    )
    same = AcceleratedLora(["a"], {"b": "x", "c": "y", "d": "x"})
    assert repr(same) == "AcceleratedLora: 1 of 4 layers converted; 2 left (b, ...): x; 1 left (c, ...): y"
    handle.restore()
    assert type(model["plain"]) is Linear and type(model["fast"]) is FastLoraLinear


def test_errors() -> None:
    class Int8(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.round())

    config = peft.LoraConfig(r=2, target_modules=["0"])
    config._register_custom_module({nn.Linear: FastLoraLinear})
    sentence = "^FastLoraLinear: expected a base layer that computes as nn.Linear does, got Int8$"
    with pytest.raises(ValueError, match=sentence):
        peft.get_peft_model(nn.Sequential(Int8(4, 4)), config)
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(hook)
    assert type(peft.get_peft_model(hooked, config).base_model.model[0]) is FastLoraLinear
    config.fan_in_fan_out = True
    with pytest.raises(ValueError, match="^FastLoraLinear: expected fan_in_fan_out=False over an nn.Linear, got True$"):
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    for model in (nn.Linear(2, 2), llm(None)):
        with pytest.raises(
            ValueError, match="^accelerate_lora: expected a model with PEFT LoRA layers, got .* without"
        ):
            accelerate_lora(model)
    layer = small(True, r=4).base_model.model[0]
    with pytest.raises(ValueError, match=r"^lora_linear: expected weight of shape \[N, 5\], got \[40, 24\]$"):
        layer(torch.ones(2, 5))
    with pytest.raises(ValueError, match="^lora_linear: expected weight in x's dtype bfloat16, got float32$"):
        layer(torch.ones(2, 24, dtype=torch.bfloat16))
    layer.lora_B.default.weight = nn.Parameter(torch.ones(40, 5))
    with pytest.raises(ValueError, match=r"^lora_linear: expected lora_B of shape \[40, 4\], got \[40, 5\]$"):
        layer(torch.ones(2, 24))

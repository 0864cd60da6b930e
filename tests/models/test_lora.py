"""LoraLinear, add_lora and the seeds, against stock PEFT: initial values, forward, and 20 training steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from collm_fast import reference
from collm_fast.config import LoraConfig
from collm_fast.models import lora as models_lora
from collm_fast.models.lora import (
    LoraLinear,
    add_lora,
    is_hooked,
    lora_layers,
    may_draw,
    project_together,
    set_dropout,
    set_step_seed,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.q_proj(x))[..., :8] * self.v_proj(x))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def small(**options: float) -> tuple[Small, list[LoraLinear]]:
    torch.manual_seed(0)
    model = Small()
    layers = add_lora(model, LoraConfig(r=4, **options), torch.Generator().manual_seed(1))
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    return model, layers


def test_add_lora_starts_as_the_base_and_trains_the_adapters_alone() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(5, 16)
    before = model(x)
    layers = add_lora(model, LoraConfig(r=4), torch.Generator().manual_seed(1))
    assert torch.equal(model(x), before), "lora_B starts at zero"
    assert [name for name, _ in lora_layers(model)] == [
        f"layers.{i}.{part}" for i in (0, 1) for part in ("q_proj", "v_proj")
    ]
    assert [layer for _, layer in lora_layers(model)] == layers
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name, _ in lora_layers(model) for part in "AB"}
    for layer in layers:
        assert layer.lora_A.dtype == torch.float32 and layer.lora_A.shape == (4, 16)
        assert layer.lora_B.shape == (layer.out_features, 4) and not layer.lora_B.any()
        # Kaiming uniform with a = sqrt 5 is U(-1/sqrt K, 1/sqrt K).
        assert 0.7 / math.sqrt(16) < layer.lora_A.abs().max() <= 1 / math.sqrt(16)
        assert layer.in_features == 16 and layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert "seed" not in "".join(model.state_dict())
    assert "r=4, alpha=16.0, dropout=0.05" in repr(layers[0])


def test_one_generator_gives_one_model() -> None:
    models = [add_lora(Small(), LoraConfig(), torch.Generator().manual_seed(5)) for _ in range(2)]
    for a, b in zip(*models, strict=True):
        assert torch.equal(a.lora_A, b.lora_A)
    assert not torch.equal(models[0][0].lora_A, models[0][1].lora_A)


def test_dtypes_and_modes_follow_the_base() -> None:
    for dtype, adapter in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = Small().to(dtype).eval()
        layers = add_lora(model, LoraConfig())
        assert layers[0].lora_A.dtype == adapter and not layers[0].training
        assert layers[0](torch.ones(2, 16, dtype=dtype)).dtype == dtype


def test_targets_match_by_the_end_of_the_name() -> None:
    assert len(add_lora(Small(), LoraConfig(target_modules=("layers.1.q_proj", "out")))) == 3
    assert len(add_lora(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=("0",)))) == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected target_modules among out, q_proj, v_proj, got 'k_proj'"):
        add_lora(Small(), LoraConfig(target_modules=("q_proj", "k_proj")))
    with pytest.raises(ValueError, match="expected every target to be an nn.Linear, got norm: LayerNorm"):
        add_lora(Small(), LoraConfig(target_modules=("norm",)))
    with pytest.raises(ValueError, match="expected target_modules among .*, got 'roj'"):
        add_lora(Small(), LoraConfig(target_modules=("roj",)))
    model, _ = small()
    with pytest.raises(ValueError, match="expected a model without LoRA layers"):
        add_lora(model, LoraConfig())
    with pytest.raises(ValueError, match="expected base to be an nn.Linear, got LayerNorm"):
        LoraLinear(nn.LayerNorm(4), 8, 16, 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^r: expected in \[1, 256\], got 0"):
        LoraLinear(nn.Linear(4, 4), 0, 16, 0.0)


def test_seeds_differ_between_layers_and_steps_and_repeat() -> None:
    model, layers = small()
    seen = set()
    for step in (0, 1, 2, -7, 2**63, 2**64 - 1):
        set_step_seed(model, step)
        seen.update(layer.seed.item() for layer in layers)
    assert len(seen) == 6 * len(layers)
    storage = layers[0].seed.data_ptr()
    set_step_seed(model, 3)
    first = [layer.seed.item() for layer in layers]
    set_step_seed(model, 4)
    set_step_seed(model, 3)
    assert [layer.seed.item() for layer in layers] == first and layers[0].seed.data_ptr() == storage


def test_a_model_may_draw_where_a_layer_has_dropout_that_is_on() -> None:
    model, layers = small(dropout=0.1)
    assert may_draw(model) and may_draw(model.eval()) and not may_draw(small(dropout=0.0)[0]) and not may_draw(Small())
    set_dropout(model, False)
    assert not may_draw(model)
    layers[-1].dropout_on = True
    assert may_draw(model)


def test_dropout_acts_in_training_only_and_can_be_turned_off() -> None:
    model, _ = small(dropout=0.5)
    x = torch.randn(5, 16)
    set_step_seed(model, 1)
    one = model(x)
    assert torch.equal(model(x), one)
    set_step_seed(model, 2)
    assert not torch.equal(model(x), one)
    set_dropout(model, False)
    still = model(x)
    assert torch.equal(still, model.eval()(x))
    set_dropout(model.train(), True)
    assert not torch.equal(model(x), still)


def test_a_layer_that_moves_takes_its_seed_along() -> None:
    model, layers = small()
    assert "seed" in dict(layers[0].named_buffers())
    again = copy.deepcopy(model)
    assert torch.equal(again(torch.ones(1, 16)), model(torch.ones(1, 16)))


class OurMask(nn.Module):
    """Stands where PEFT has its dropout, and multiplies by the mask of our layer's seed."""

    def __init__(self, ours: LoraLinear) -> None:
        super().__init__()
        self.ours = [ours]

    def forward(self, x: Tensor) -> Tensor:
        seed, p = self.ours[0].seed, self.ours[0].dropout
        return x * reference.dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], p).reshape(x.shape).to(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_like_peft_with_the_same_masks(dtype: torch.dtype) -> None:
    import peft

    torch.manual_seed(0)
    base = Small().to(dtype)
    config = LoraConfig(r=4, alpha=8.0, dropout=0.2)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]),
    )
    layers = add_lora(base, config)
    peers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for ours, peer in zip(layers, peers, strict=True):
        nn.init.normal_(ours.lora_B, std=0.3)
        peer.lora_A.default.weight.data.copy_(ours.lora_A.data)
        peer.lora_B.default.weight.data.copy_(ours.lora_B.data)
        peer.lora_dropout["default"] = OurMask(ours)
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-3) for m in (base, theirs)]
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for step in range(20):
        set_step_seed(base, step)
        x, target = torch.randn(3, 7, 16).to(dtype), torch.randn(3, 7, 16).to(dtype)
        losses = []
        for model, optimizer in zip((base, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(x) - target).float().square().mean()
            loss.backward()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) <= 0.1 * tolerance * losses[1], step
        for ours, peer in zip(layers, peers, strict=True):
            for a, b in ((ours.lora_A, peer.lora_A.default.weight), (ours.lora_B, peer.lora_B.default.weight)):
                assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm(), step
        for optimizer in optimizers:
            optimizer.step()
        for ours, peer in zip(layers, peers, strict=True):
            for a, b in ((ours.lora_A, peer.lora_A.default.weight), (ours.lora_B, peer.lora_B.default.weight)):
                if dtype == torch.float32:
                    assert (a - b).norm() <= tolerance * b.norm(), step
                else:
                    b.data.copy_(a.data)  # bfloat16 would compare two histories of rounding


def three(dtype: torch.dtype = torch.float32, dropout: float = 0.3) -> tuple[nn.Linear, list[nn.Module]]:
    """A frozen layer between two LoRA layers, as k between q and v, in training; and all three."""
    torch.manual_seed(0)
    bases = [nn.Linear(16, n, bias=n != 8).to(dtype).requires_grad_(False) for n in (16, 8, 12)]
    q, v = (LoraLinear(base, 4, 8.0, dropout, torch.Generator().manual_seed(1)) for base in (bases[0], bases[2]))
    for seed, layer in ((5, q), (-6, v)):
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.seed.fill_(seed)
    return bases[1], [q, bases[1], v]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each step of project_together took."""
    found: list[int] = []
    step = models_lora.project_group
    monkeypatch.setattr(models_lora, "project_group", lambda x, *args: found.append(len(args[0])) or step(x, *args))
    return found


@pytest.mark.parametrize("drops", [True, False])
def test_layers_of_one_input_share_a_step(drops: bool, steps: list[int]) -> None:
    """The numbers of each layer alone, its own mask with it."""
    _, layers = three(torch.float64)
    for layer in (layers[0], layers[2]):
        layer.dropout_on = drops
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    grads = [torch.randn(7, n, dtype=torch.float64) for n in (16, 8, 12)]
    together, alone = project_together(layers, x), [layer(x) for layer in layers]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    found = (torch.autograd.grad(ys, leaves, grads) for ys in (together, alone))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert steps == [3] and len(leaves) == 5


def test_layers_that_differ_run_alone(steps: list[int]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(5, 16)
    k, layers = three()
    doubled, trained = Doubled(16, 8).requires_grad_(False), nn.Linear(16, 8)
    slower = LoraLinear(nn.Linear(16, 8), 4, 8.0, 0.1)
    scaled = LoraLinear(nn.Linear(16, 8), 4, 16.0, 0.3)
    off = LoraLinear(nn.Linear(16, 8), 4, 8.0, 0.3)
    off.dropout_on = False
    of_doubled = LoraLinear(doubled, 4, 8.0, 0.3)
    for other in (doubled, trained, slower, scaled, off, of_doubled):
        mixed = [layers[0], other, layers[2]]
        for a, b in zip(project_together(mixed, x), (layer(x) for layer in mixed), strict=True):
            assert torch.equal(a, b)
    called: list[nn.Module] = []
    hook = k.register_forward_hook(lambda module, args, out: called.append(module))
    project_together(layers, x)
    assert called == [k] and steps == []
    hook.remove()
    assert torch.equal(project_together([k, k], x)[1], k(x)) and steps == [], "frozen layers alone gain nothing"
    project_together(layers, x)
    assert steps == [3]


def test_what_is_hooked_is_called_itself() -> None:
    """Also for backward hooks and a forward of the instance, as offloading sets it: one rule for every joined step."""
    layer = torch.nn.Linear(2, 2)
    assert not is_hooked(layer)
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(layer, f"register_{register}")(lambda *args: None)
        assert is_hooked(layer), register
        handle.remove()
        assert not is_hooked(layer)
    layer.forward = layer.forward  # type: ignore[method-assign]
    assert is_hooked(layer)

"""Times lora_linear against the frozen linear alone, PEFT, and plain torch calls.

`frozen` is the layer without LoRA: the price no LoRA layer can go below, not a peer. It computes y and dx only, and
where the adapters' gradients are asked for it hands over ready ones. `peft` is PEFT's own layer with its default
(float32 adapters); `peft-low` the same with adapters in the base's dtype; `torch` the shortest plain torch calls;
`unsloth-way` (only where there is no dropout), `axolotl-way` and `lorafusion-way` what `lora_peers.py` describes. What
each keeps for its backward stands beside its time.
With dropout the peers draw other masks than ours, so they are compared loosely there, and strictly in the pass fwd+bwd
without dropout (where `frozen` differs, as it must). Ours is compared with float64 and its own mask, strictly, before
it is timed. `fwd+dx` is a layer whose adapters are frozen (stage 2).

The cases `group` are layers that read the same x: `ours` is lora_linear_group, `loop` one lora_linear after the other
(same masks), `axolotl-way` all over one dropout of x, `frozen` and `peft` as above, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import torch
from lora_peers import Axolotl, formulations, kept_bytes
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from collm_fast import ops, reference

SCALING = 2.0
# (in, out) of the projections of SmolLM2-135M, Qwen2-1.5B and Llama-7B.
LAYERS = {
    "SmolLM2": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
    "Qwen2": [(1536, 1536)],
    "2048": [(2048, 2048)],
    "Llama": [(4096, 4096)],
}
# in, and the out of each projection of one x.
GROUPS = {"SmolLM2 q/k/v": (576, [576, 192, 192]), "Qwen2 gate/up": (1536, [8960, 8960])}


@dataclass
class Layer:
    """One layer's tensors, and the calls that are compared."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    grad: Tensor
    p: float
    seed: Tensor

    def ours(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        options = {"dropout_p": self.p, "seed": self.seed, "training": True}
        return ops.lora_linear(x, self.weight, None, lora_A, lora_B, SCALING, **options)

    def frozen(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return linear(x, self.weight)

    def torch(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        s = linear(dropout(x, self.p), lora_A.to(x.dtype))
        return torch.addmm(linear(x, self.weight), s, lora_B.to(x.dtype).T, alpha=SCALING)

    def truth(self) -> list[Tensor]:
        """y, dx, dA, dB in float64 with our mask."""
        leaves = [t.detach().double().requires_grad_() for t in (self.x, self.lora_A, self.lora_B)]
        options = {"dropout_p": self.p, "seed": self.seed, "training": True}
        y = reference.lora_linear(leaves[0], self.weight.double(), None, *leaves[1:], SCALING, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad.double())]


# Pass, how many results it has, how many products of the frozen weight.
PASSES = (("fwd", 1, 1), ("fwd+dx", 2, 2), ("fwd+bwd", 4, 2))


def peft_layer(layer: Layer, *, low: bool) -> nn.Module:
    """PEFT's LoRA layer over the same tensors."""
    import peft

    N, K = layer.weight.shape
    base = nn.Sequential(nn.Linear(K, N, bias=False, device=layer.x.device, dtype=layer.x.dtype))
    config = peft.LoraConfig(
        r=layer.lora_A.shape[0], lora_alpha=2 * layer.lora_A.shape[0], lora_dropout=layer.p, target_modules=["0"]
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=not low)
    module = model.base_model.model[0]
    with torch.no_grad():
        module.base_layer.weight.copy_(layer.weight)
        module.lora_A.default.weight.copy_(layer.lora_A)
        module.lora_B.default.weight.copy_(layer.lora_B)
    return module.train()


def _backward(call: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> harness.Impl:
    def run() -> list[Tensor]:
        y = call()
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    return run


def impls(layer: Layer, pass_: str, truth: Sequence[Tensor]) -> dict[str, harness.Impl]:
    """Every implementation of one pass, by name."""
    trained = pass_ == "fwd+bwd"
    leaves = [layer.x.detach().requires_grad_(pass_ != "fwd")]
    leaves += [t.detach().requires_grad_(trained) for t in (layer.lora_A, layer.lora_B)]
    wanted = [t for t in leaves if t.requires_grad]

    def of(fn: Callable[..., Tensor]) -> harness.Impl:
        if pass_ == "fwd":
            return lambda: fn(*leaves)
        return _backward(lambda: fn(*leaves), wanted, layer.grad)

    def of_frozen() -> harness.Impl:
        if pass_ == "fwd":
            return lambda: layer.frozen(*leaves)
        run = _backward(lambda: layer.frozen(*leaves), leaves[:1], layer.grad)
        return lambda: [*run(), *(truth[2:] if trained else [])]

    def of_peft(low: bool) -> harness.Impl:
        module = peft_layer(layer, low=low).requires_grad_(False)
        weights = [module.lora_A.default.weight, module.lora_B.default.weight]
        if pass_ == "fwd":
            return lambda: module(leaves[0])
        for weight in weights:
            weight.requires_grad_(trained)
        return _backward(lambda: module(leaves[0]), [leaves[0], *(weights if trained else [])], layer.grad)

    found = {"ours": of(layer.ours), "frozen": of_frozen(), "torch": of(layer.torch)}
    found |= {impl: of(call) for impl, call in formulations(layer.weight, SCALING, layer.p).items()}
    try:
        found["peft"] = of_peft(False)
        if layer.x.dtype != torch.float32:
            found["peft-low"] = of_peft(True)
    except ImportError as error:
        found["peft"] = _missing(str(error))
    return found


def _missing(reason: str) -> harness.Impl:
    def run() -> Tensor:
        raise ImportError(reason)

    return run


def lora(suite: harness.Suite, name: str, M: int, K: int, N: int, r: int, p: float, dtype: torch.dtype) -> None:
    title = f"{name} M={M} K={K} N={N} r={r} p={p}"
    if not suite.wanted(title, [pass_ for pass_, *_ in PASSES], dtype):
        return
    layer = Layer(
        x=suite.tensor(M, K, dtype=dtype),
        weight=suite.tensor(N, K, dtype=dtype, scale=K**-0.5),
        lora_A=suite.tensor(r, K, scale=K**-0.5),
        lora_B=suite.tensor(N, r, scale=0.02),
        grad=suite.tensor(M, N, dtype=dtype),
        p=p,
        seed=torch.tensor([1], device=suite.device),
    )
    truth = layer.truth()
    product = 2.0 * M * N * K
    moved = (M * K + N * K + M * N) * layer.x.element_size()
    for pass_, count, products in PASSES:
        if not suite.wanted(title, (pass_,), dtype):
            continue
        found = impls(layer, pass_, truth)
        ours = found["ours"]()
        gap = harness.distance([ours] if isinstance(ours, Tensor) else ours, truth[:count])
        if not gap <= harness.TOLERANCE[dtype]:
            raise ValueError(f"{name}: expected ours within {harness.TOLERANCE[dtype]} of float64, got {gap}")
        rows = suite.case(
            title,
            pass_,
            dtype,
            found,
            expected=lambda count=count: truth[:count],
            work=harness.Work(bytes=products * moved, flops=products * product),
            tolerance=None if p == 0 and pass_ == "fwd+bwd" else 0.5,
        )
        for row in rows:
            row.kept_bytes = kept_bytes(found[row.impl], M) if pass_ == "fwd+bwd" else None


@dataclass
class Group:
    """Layers that read the same x, and the calls that are compared."""

    layers: list[Layer]

    def ours(self, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[Tensor]:
        weights, none, one = [layer.weight for layer in self.layers], [None] * len(self.layers), self.layers[0]
        options = {"dropout_p": one.p, "seed": one.seed, "training": True}
        return ops.lora_linear_group(x, weights, none, As, Bs, SCALING, **options)

    def loop(self, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[Tensor]:
        return [
            ops.lora_linear(x, one.weight, None, A, B, SCALING, dropout_p=one.p, seed=one.seed, training=True, stream=j)
            for j, (one, A, B) in enumerate(zip(self.layers, As, Bs, strict=True))
        ]

    def frozen(self, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[Tensor]:
        return [linear(x, layer.weight) for layer in self.layers]

    def truth(self) -> list[Tensor]:
        """Each y, dx, each dA, each dB, in float64 with our masks."""
        leaf = lambda t: t.detach().double().requires_grad_()  # noqa: E731
        x, one = leaf(self.layers[0].x), self.layers[0]
        As, Bs = [leaf(layer.lora_A) for layer in self.layers], [leaf(layer.lora_B) for layer in self.layers]
        weights, none = [layer.weight.double() for layer in self.layers], [None] * len(As)
        options = {"dropout_p": one.p, "seed": one.seed, "training": True}
        ys = reference.lora_linear_group(x, weights, none, As, Bs, SCALING, **options)
        grads = [layer.grad.double() for layer in self.layers]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *As, *Bs], grads)]


def group_impls(group: Group, pass_: str, truth: Sequence[Tensor]) -> dict[str, harness.Impl]:
    """Every implementation of one pass, by name."""
    trained, count = pass_ == "fwd+bwd", len(group.layers)
    x = group.layers[0].x.detach().requires_grad_(pass_ != "fwd")
    leaf = lambda t: t.detach().requires_grad_(trained)  # noqa: E731
    As, Bs = [leaf(layer.lora_A) for layer in group.layers], [leaf(layer.lora_B) for layer in group.layers]
    grads = [layer.grad for layer in group.layers]

    def of(fn: Callable[[], list[Tensor]], wanted: Sequence[Tensor], ready: Sequence[Tensor] = ()) -> harness.Impl:
        def run() -> list[Tensor]:
            ys = fn()
            found = [] if pass_ == "fwd" else torch.autograd.grad(ys, wanted, grads)
            return [*(y.detach() for y in ys), *found, *ready]

        return run

    every = [x, *As, *Bs] if trained else [x]
    found = {
        "ours": of(lambda: group.ours(x, As, Bs), every),
        "frozen": of(lambda: group.frozen(x, As, Bs), [x], truth[count + 1 :] if trained else ()),
        "loop": of(lambda: group.loop(x, As, Bs), every),
    }
    one = group.layers[0]

    def axolotl() -> list[Tensor]:
        dropped, calls = dropout(x, one.p), zip(group.layers, As, Bs, strict=True)
        return [Axolotl.apply(x, dropped, layer.weight, A, B, SCALING) for layer, A, B in calls]

    found["axolotl-way"] = of(axolotl, every)
    try:
        modules = [peft_layer(layer, low=False).requires_grad_(False) for layer in group.layers]
    except ImportError as error:
        return found | {"peft": _missing(str(error))}
    weights = [m.lora_A.default.weight for m in modules] + [m.lora_B.default.weight for m in modules]
    for weight in weights:
        weight.requires_grad_(trained)
    found["peft"] = of(lambda: [module(x) for module in modules], [x, *weights] if trained else [x])
    return found


def lora_group(
    suite: harness.Suite, name: str, M: int, K: int, Ns: Sequence[int], r: int, p: float, dtype: torch.dtype
) -> None:
    title = f"group {name} M={M} K={K} N={'+'.join(map(str, Ns))} r={r} p={p}"
    if not suite.wanted(title, [pass_ for pass_, *_ in PASSES], dtype):
        return
    x, seed = suite.tensor(M, K, dtype=dtype), torch.tensor([1], device=suite.device)
    layers = [
        Layer(
            x=x,
            weight=suite.tensor(N, K, dtype=dtype, scale=K**-0.5),
            lora_A=suite.tensor(r, K, scale=K**-0.5),
            lora_B=suite.tensor(N, r, scale=0.02),
            grad=suite.tensor(M, N, dtype=dtype),
            p=p,
            seed=seed,
        )
        for N in Ns
    ]
    group = Group(layers)
    truth = group.truth()
    product = 2.0 * M * sum(Ns) * K
    moved = (M * K + sum(Ns) * (K + M)) * x.element_size()
    for pass_, _, products in PASSES:
        if not suite.wanted(title, (pass_,), dtype):
            continue
        count = {"fwd": len(Ns), "fwd+dx": len(Ns) + 1}.get(pass_, len(truth))
        found = group_impls(group, pass_, truth)
        for impl in ("ours", "loop"):
            gap = harness.distance(found[impl](), truth[:count])
            if not gap <= harness.TOLERANCE[dtype]:
                raise ValueError(f"{title}: expected {impl} within {harness.TOLERANCE[dtype]} of float64, got {gap}")
        rows = suite.case(
            title,
            pass_,
            dtype,
            found,
            expected=lambda count=count: truth[:count],
            work=harness.Work(bytes=products * moved, flops=products * product),
            tolerance=0.5,
        )
        for row in rows:
            row.kept_bytes = kept_bytes(found[row.impl], M) if pass_ == "fwd+bwd" else None


def cases(suite: harness.Suite) -> None:
    quick, on_gpu = suite.options.quick, suite.device.type == "cuda"
    layers = {"SmolLM2": [(576, 576)]} if quick else LAYERS
    for dtype in (torch.float32, torch.bfloat16):
        for name, sizes in layers.items():
            for K, N in sizes:
                # On a CPU one call of the wider layers on so many rows takes seconds.
                long = not quick and (on_gpu or K * N <= 576 * 576)
                for M in [256] if quick else [256, 2560, 16384] if long else [256, 2560]:
                    lora(suite, name, M, K, N, 8, 0.05, dtype)
        K, N = layers["SmolLM2"][0]
        M = 256 if quick else 16384 if on_gpu else 2560
        lora(suite, "SmolLM2", M, K, N, 8, 0.0, dtype)
        for r in () if quick else (16, 64):
            lora(suite, "SmolLM2", M, K, N, r, 0.05, dtype)
        for name, (K, Ns) in list(GROUPS.items())[: 1 if quick else None]:
            lora_group(suite, name, M, K, Ns, 8, 0.05, dtype)


if __name__ == "__main__":
    raise SystemExit(harness.main(cases, __doc__))

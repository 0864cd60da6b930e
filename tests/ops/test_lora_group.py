"""lora_linear_group on every backend: one op for the projections of one x, with one dx.

One projection alone is test_lora.py's; here: what the group shares, and that it changes neither masks nor sums. The
children at the end run the same tests on Triton's interpreter and on the reference; the device code of
csrc/cuda/lora.cuh is run by tests/cuda_on_cpu/test_lora.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from backends import CHILD as CHILD_VARIABLE
from backends import in_child, run_with_backend
from conftest import requires
from distances import relative
from torch import Tensor
from torch.nn.functional import linear

from collm_fast import _native, reference
from collm_fast.ops import lora_linear_group

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICES = ["cpu", pytest.param("cuda", marks=requires("cuda"))]
SCALING = 1.75
OP = torch.ops.collm_fast.lora_linear_group
BACKWARD = torch.ops.collm_fast.lora_linear_group_backward


@dataclass
class Case:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_As: list[Tensor | None]
    lora_Bs: list[Tensor | None]
    grads: list[Tensor | None]  # None: an output that is not used

    def to(self, dtype: torch.dtype) -> Case:
        cast = lambda ts: [None if t is None else t.to(dtype) for t in ts]  # noqa: E731
        lists = (self.weights, self.biases, self.lora_As, self.lora_Bs, self.grads)
        return Case(self.x.to(dtype), *map(cast, lists))


def make(
    shape: tuple[int, ...],
    projections: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """projections: (N, r) each, r = 0 without an adapter. Every second one has a bias."""
    K = shape[-1]
    draw = lambda *sizes, kind=dtype: torch.randn(sizes).to(device, kind)  # noqa: E731
    case = Case(draw(*shape), [], [], [], [], [])
    for j, (N, r) in enumerate(projections):
        case.weights.append((torch.randn(N, K) / math.sqrt(max(K, 1))).to(device, dtype))
        case.biases.append(draw(N) if j % 2 == 0 else None)
        case.lora_As.append((torch.randn(r, K) / math.sqrt(max(K, 1))).to(device, adapter) if r else None)
        case.lora_Bs.append(draw(N, r, kind=adapter) if r else None)
        case.grads.append(draw(*shape[:-1], N))
    return case


def run(function: Any, case: Case, **options: Any) -> dict[str, Tensor | None]:
    """Each y, dx, each dA and dB; None: no gradient."""
    leaf = lambda t: None if t is None else t.detach().requires_grad_()  # noqa: E731
    x, As, Bs = leaf(case.x), [leaf(A) for A in case.lora_As], [leaf(B) for B in case.lora_Bs]
    ys = function(x, case.weights, case.biases, As, Bs, SCALING, **options)
    assert type(ys) is list and len(ys) == len(case.weights)
    leaves = {"dx": x, **{f"dA{j}": A for j, A in enumerate(As)}, **{f"dB{j}": B for j, B in enumerate(Bs)}}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    used = [(y, g.to(y.dtype)) for y, g in zip(ys, case.grads, strict=True) if g is not None]
    outputs, grads = zip(*used, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    return {**{f"y{j}": y.detach() for j, y in enumerate(ys)}, **dict(zip(leaves, found, strict=True))}


def check(case: Case, **options: Any) -> None:
    """Normwise against float64: at most 1e-6 in float32, else at most twice torch's own in the same dtypes."""
    truth = run(reference.lora_linear_group, case.to(torch.float64), **options)
    torch_own = run(reference.lora_linear_group, case, **options)
    got = run(lora_linear_group, case, **options)
    assert got.keys() == truth.keys()
    for name, true in truth.items():
        value, own = got[name], torch_own[name]
        if true is None:
            assert value is None, name
            continue
        assert value is not None and own is not None and value.dtype == own.dtype, name
        bound = {torch.float32: 1e-6, torch.float64: 1e-14}.get(value.dtype, 2 * relative(own, true))
        assert relative(value, true) <= bound, (name, relative(value, true), relative(own, true))


def equal(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        other = expected[name]
        assert (value is None and other is None) or torch.equal(value, other), name


def drop(device: str = "cpu") -> dict[str, Any]:
    return {"dropout_p": 0.3, "seed": torch.tensor([-5], device=device), "training": True}


PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
# The shape of x, and (N, r) of each projection.
GROUPS = [
    ((37, 40), [(61, 8)]),
    ((2, 9, 35), [(33, 0), (70, 17)]),
    ((70, 24), [(40, 8), (16, 0), (24, 3)]),
    ((45, 9), [(5, 2), (7, 34), (3, 0), (6, 8)]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
@pytest.mark.parametrize(("shape", "projections"), GROUPS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_arithmetic(
    device: str,
    dtype: torch.dtype,
    adapter: torch.dtype,
    shape: tuple[int, ...],
    projections: list[tuple[int, int]],
    dropout_p: float,
) -> None:
    if device == "cuda" and dtype == torch.float64:
        with pytest.raises(ValueError, match="expected x in float32, bfloat16, float16, got float64"):
            run(lora_linear_group, make(shape, projections, dtype, adapter, device))
        return
    check(make(shape, projections, dtype, adapter, device), **{**drop(device), "dropout_p": dropout_p})


def test_arithmetic_runs_where_it_should() -> None:
    backend = os.environ.get(CHILD_VARIABLE, "native")
    for name in ("lora_linear_group", "lora_linear_group_backward"):
        assert _native.backends[name] == _native.backends["lora_linear"]
        if in_child():
            assert _native.backends[name]["cpu"] == backend


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_of_more_projections_than_a_launch_takes(device: str) -> None:
    check(make((9, 16), [(4, 2)] * 6, device=device), **drop(device))
    mixed = make((9, 16), [(4, 2)] * 3, torch.float16, torch.float16, device)
    mixed.lora_As[1], mixed.lora_Bs[1] = mixed.lora_As[1].float(), mixed.lora_Bs[1].float()
    check(mixed, **drop(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unused", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_arithmetic_of_unused_outputs(device: str, unused: tuple[int, ...]) -> None:
    case = make((300, 24), [(16, 4), (8, 0), (12, 2)], device=device)
    grads = [None if j in unused else grad for j, grad in enumerate(case.grads)]
    check(replace(case, grads=grads), **drop(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 0), (0, 8), (2, 0, 8), (2, 3, 4, 8), (5, 1)])
def test_arithmetic_of_shapes(device: str, shape: tuple[int, ...]) -> None:
    for projections in ([(6, 2), (4, 0)], [(0, 2), (3, 1)], [(6, 0), (0, 0), (2, 3)]):
        check(make(shape, projections, device=device), **drop(device))


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_of_strides(device: str) -> None:
    base = make((6, 10, 24), [(16, 4), (8, 0), (5, 2)], device=device)
    wide, columns = torch.randn(6, 10, 40, device=device), torch.randn(24, 10, 6, device=device)
    apart = lambda ts: [None if t is None else t.T.contiguous().T for t in ts]  # noqa: E731
    weights, As, Bs = apart(base.weights), apart(base.lora_As), apart(base.lora_Bs)
    biases = [torch.randn(2 * len(w), device=device)[::2] for w in weights]
    grads = [base.grads[0].permute(1, 0, 2).clone().permute(1, 0, 2), base.grads[1][:1, :1].expand(6, 10, 8)]
    for x in (wide[..., 3:27], columns.permute(2, 1, 0), base.x[:1].expand(6, 10, 24)):
        check(Case(x, weights, biases, As, Bs, [*grads, base.grads[2]]), **drop(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_without_terms(device: str, dtype: torch.dtype) -> None:
    """No columns of x: y is the bias. No outputs: dx is zero."""
    x, bias = torch.zeros(300, 0, dtype=dtype, device=device), torch.randn(33).to(device, dtype)
    ys = lora_linear_group(x, [x.new_zeros(33, 0), x.new_zeros(20, 0)], [bias, None], [None] * 2, [None] * 2, SCALING)
    assert torch.equal(ys[0], bias.expand(300, 33)) and ys[1].shape == (300, 20) and not ys[1].any()
    x = torch.randn(300, 33).to(device, dtype).requires_grad_()
    ys = lora_linear_group(x, [x.new_zeros(0, 33)], [None], [None], [None], SCALING)
    assert not torch.autograd.grad(ys, [x], [x.new_zeros(300, 0)])[0].any()


@requires("native")
@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "K", "projections"),
    [
        (331, 96, [(72, 5), (300, 0), (33, 8)]),  # tails of rows, terms and outputs
        (259, 700, [(49, 5), (50, 17)]),
        (300, 130, [(961, 8), (64, 8)]),  # more terms than stand side by side
        (41, 50, [(33, 3), (31, 0)]),  # fewer rows
        (600, 64, [(640, 0), (64, 8), (200, 0)]),  # blocks of steps that end inside a projection
    ],
)
def test_packed_weights(dtype: torch.dtype, M: int, K: int, projections: list[tuple[int, int]]) -> None:
    case = make((M, K), projections, dtype)
    check(case, **drop())
    check(case)
    strided = [torch.randn(2 * N, 3 * K).to(dtype)[::2, ::3] for N, _ in projections]
    check(replace(case, weights=strided), **drop())
    # What dropout leaves out may be anything.
    one = make((M, K), projections[:1], dtype)
    mask = reference.dropout_mask(-5, M, K, 0.3) == 0
    one.weights[0].zero_()
    equal(
        run(lora_linear_group, replace(one, x=one.x.masked_fill(mask, 1e30)), **drop()),
        run(lora_linear_group, one, **drop()),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_of_each_projection_is_that_of_lora_linear(device: str) -> None:
    """The same masks, and the same y and s, bit for bit."""
    case = make((300, 40), [(24, 4), (16, 0), (8, 2)], device=device)
    seed = torch.tensor([-5], device=device)
    absent = case.x.new_empty(())
    lists = [[absent if t is None else t for t in ts] for ts in (case.weights, case.biases, case.lora_As, case.lora_Bs)]
    ys, ss = OP(case.x, *lists, SCALING, 0.3, [seed] * 3, [0, 1, 2])
    for j, (weight, bias, A, B) in enumerate(zip(case.weights, case.biases, case.lora_As, case.lora_Bs, strict=True)):
        if A is None:
            assert ss[j].dim() == 0 and relative(ys[j], linear(case.x, weight, bias)) <= 1e-6
            continue
        y, s = torch.ops.collm_fast.lora_linear(case.x, weight, bias, A, B, SCALING, 0.3, seed, j)
        assert torch.equal(ss[j], s) and torch.equal(ys[j], y)


def test_arithmetic_of_masks_in_backward() -> None:
    """W = 0, A = B = 1 and gradients 1, 2, 4: dx spells the masks, of the seeds and streams that were given."""
    M, K, p, seeds, streams = 17, 61, 0.5, [torch.tensor([2**62 + 7]), torch.tensor([7]), torch.tensor(-7)], [0, 2, 2]
    for dtype in (torch.float64, torch.float32):
        weights = [torch.zeros(1, K, dtype=dtype)] * 3
        ones = [torch.ones(1, K, dtype=dtype)] * 3, [torch.ones(1, 1, dtype=dtype)] * 3
        grads = [torch.full((M, 1), float(2**j), dtype=dtype) for j in range(3)]
        none = [torch.empty((), dtype=dtype)] * 3
        no = [False] * 3
        dx, dAs, dBs = BACKWARD(grads, none[0], weights, *ones, none, 1.0, p, seeds, streams, True, no, no)
        masks = [reference.dropout_mask(seed, M, K, p, stream) for seed, stream in zip(seeds, streams, strict=True)]
        expected = sum(2**j * mask.to(dtype) for j, mask in enumerate(masks))
        assert torch.equal(dx, expected)
        assert [t.numel() for t in (*dAs, *dBs)] == [0] * 6


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_without_an_adapter_or_projections(device: str) -> None:
    case = make((9, 8), [(6, 0), (4, 0)], device=device)
    args = (case.x, case.weights, case.biases, case.lora_As, case.lora_Bs, 1.0)
    for y, weight, bias in zip(lora_linear_group(*args), case.weights, case.biases, strict=True):
        assert torch.equal(y, linear(case.x, weight, bias))
    assert lora_linear_group(case.x, [], [], [], [], 1.0) == []


def test_one_step_of_autograd_keeps_x_once() -> None:
    """One node for all outputs; x and each s, no mask, no masked copy; with frozen adapters nothing but parameters."""
    case = make((50, 96), [(32, 4), (16, 0), (8, 2)])
    parameters = [*case.weights, *case.lora_As, *case.lora_Bs]
    case.x.requires_grad_()
    trained = [t for t in (*case.lora_As, *case.lora_Bs) if t is not None]
    for wanted, expected in (
        (trained, [(50, 2), (50, 4), (50, 96)]),
        (trained[:2], [(50, 96)]),
        (trained[2:3], [(50, 4)]),
        ([], []),
    ):
        for t in trained:
            t.requires_grad_(any(t is w for w in wanted))
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            args = (case.x, case.weights, case.biases, case.lora_As, case.lora_Bs, SCALING)
            ys = lora_linear_group(*args, **drop())
        assert len({y.grad_fn for y in ys}) == 1
        names = {t.data_ptr() for t in parameters if t is not None}
        assert sorted(tuple(t.shape) for t in kept if t.data_ptr() not in names and t.numel() > 1) == expected


def test_gradients_that_nobody_wants_are_not_made() -> None:
    case = make((300, 24), [(16, 4), (12, 2)])
    for t in (*case.lora_As, *case.lora_Bs):
        t.requires_grad_(False)
    x = case.x.requires_grad_()
    ys = lora_linear_group(x, case.weights, case.biases, case.lora_As, case.lora_Bs, SCALING, **drop())
    (dx,) = torch.autograd.grad(ys, x, case.grads)
    assert torch.equal(dx, run(lora_linear_group, case, **drop())["dx"])
    B = case.lora_Bs[1].requires_grad_()
    ys = lora_linear_group(x.detach(), case.weights, case.biases, case.lora_As, case.lora_Bs, SCALING, **drop())
    assert torch.equal(torch.autograd.grad(ys, B, case.grads)[0], run(lora_linear_group, case, **drop())["dB1"])


def test_gradcheck() -> None:
    case = make((5, 11), [(7, 3), (4, 0), (3, 2)], torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in (case.x, *case.lora_As, *case.lora_Bs) if t is not None]
    for p in (0.0, 0.4):

        def function(*_: Tensor, p: float = p) -> tuple[Tensor, ...]:
            args = (case.x, case.weights, case.biases, case.lora_As, case.lora_Bs, SCALING)
            return tuple(lora_linear_group(*args, **{**drop(), "dropout_p": p}))

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    case = make((2, 5, 24), [(16, 4), (8, 0), (6, 2)], device=device)
    absent = case.x.new_empty(())
    leaf = lambda t: absent if t is None else t.detach().requires_grad_()  # noqa: E731
    biases = [absent if b is None else b for b in case.biases]
    for options in ((0.25, [torch.tensor([3], device=device)] * 3, [0, 1, 2]), (0.0, [], [0, 1, 2])):
        As, Bs = [leaf(t) for t in case.lora_As], [leaf(t) for t in case.lora_Bs]
        torch.library.opcheck(OP.default, (leaf(case.x), case.weights, biases, As, Bs, SCALING, *options))
        As, Bs = [t.detach() for t in As], [t.detach() for t in Bs]
        _, ss = OP(case.x, case.weights, biases, As, Bs, SCALING, *options)
        for grads, dx, dA in ((case.grads, True, [True, False, True]), ([absent, *case.grads[1:]], False, [False] * 3)):
            args = (grads, case.x, case.weights, As, Bs, ss, SCALING, *options, dx, dA, [dx, False, True])
            torch.library.opcheck(BACKWARD.default, args)


def test_checkpointing_draws_the_same_masks() -> None:
    from torch.utils.checkpoint import checkpoint

    case = make((50, 96), [(32, 4), (8, 0), (6, 2)])

    def again(*args: Any, **options: Any) -> list[Tensor]:
        return checkpoint(lora_linear_group, *args, use_reentrant=False, **options)

    equal(run(again, case, **drop()), run(lora_linear_group, case, **drop()))


@requires("native")
@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_every_number_of_threads(dtype: torch.dtype) -> None:
    case = make((700, 320), [(300, 8), (40, 0), (96, 8)], dtype)
    first = run(lora_linear_group, case, **drop())
    equal(run(lora_linear_group, case, **drop()), first)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(lora_linear_group, case, **drop())
            # Where the product is the vendor's (a CPU without AVX-512 or tiles), its bits are its own business.
            equal(*({k: v for k, v in got.items() if k[:2] in ("dA", "dB")} for got in (again, first)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
def test_compiles_once_for_every_seed() -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    case = make((9, 16), [(4, 2), (3, 0), (5, 1)])
    dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(*args: Any, seed: Tensor) -> list[Tensor]:
        return lora_linear_group(*args, dropout_p=0.5, seed=seed, training=True)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in range(10):
        seed = torch.tensor([step])
        equal(run(compiled, case, seed=seed), run(function, case, seed=seed))
    assert counter.frame_count == 1
    dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_frozen_products_in_its_dtype(dtype: torch.dtype) -> None:
    case = make((40, 64), [(32, 4), (8, 0)])
    low = replace(case.to(dtype), lora_As=case.lora_As, lora_Bs=case.lora_Bs)
    with torch.autocast("cpu", dtype=dtype):
        got = run(lora_linear_group, case)
        wide = case.to(torch.float64)
        args = (wide.weights, wide.biases, wide.lora_As, wide.lora_Bs, 1.0)
        assert lora_linear_group(wide.x, *args)[0].dtype == torch.float64
    expected = run(lora_linear_group, low)
    equal(got, {name: value.to(got[name].dtype) for name, value in expected.items()})
    assert [got[name].dtype for name in ("y0", "y1", "dx", "dA0")] == [dtype, dtype, torch.float32, torch.float32]


def test_no_second_derivative() -> None:
    case = make((3, 4), [(2, 1), (3, 0)])
    x, A = case.x.requires_grad_(), case.lora_As[0].requires_grad_()
    ys = lora_linear_group(x, case.weights, case.biases, case.lora_As, case.lora_Bs, 1.0)
    (dx,) = torch.autograd.grad(ys[0].sum(), x, create_graph=True)
    sentence = "^lora_linear_group: expected a first derivative, got a request for the second"
    with pytest.raises(RuntimeError, match=sentence):
        torch.autograd.grad(dx.sum(), A)


t = torch.zeros
NAMES = ("weights", "biases", "lora_As", "lora_Bs")


def _good() -> dict[str, Any]:
    lists = {"weights": [t(6, 8), t(5, 8)], "biases": [None, t(5)]}
    lists |= {"lora_As": [None, t(2, 8)], "lora_Bs": [None, t(5, 2)]}
    return {"x": t(4, 8), **lists, "scaling": 1.0, "dropout_p": 0.5, "seed": torch.tensor([1])}


def _inner(args: dict[str, Any]) -> dict[str, Any]:
    """The same as the registered op takes it."""
    lists = {k: [t(()) if e is None else e for e in v] if k in NAMES else v for k, v in args.items()}
    seed = lists.pop("seed")
    return {**lists, "seeds": [] if seed is None else [seed] * 2, "streams": [0, 1]}


# The argument of the second projection, or of the op, that is changed; the sentence.
BAD_FORWARD: list[tuple[str, Any, str]] = [
    ("x", t(()), r"expected x of shape \[\.\.\., K\], got \[\]"),
    ("weights", t(5, 9), r"expected weights\[1\] of shape \[N, 8\], got \[5, 9\]"),
    ("biases", t(7), r"expected biases\[1\] of shape \[5\], got \[7\]"),
    ("lora_As", t(2, 9), r"expected lora_As\[1\] of shape \[r, 8\] with r in \[1, 256\], got \[2, 9\]"),
    ("lora_Bs", t(5, 3), r"expected lora_Bs\[1\] of shape \[5, 2\], got \[5, 3\]"),
    ("x", t(4, 8, dtype=torch.int64), "expected x in float32, bfloat16, float16, float64, got int64"),
    ("weights", t(5, 8).double(), r"expected weights\[1\] in x's dtype float32, got float64"),
    ("biases", t(5).half(), r"expected biases\[1\] in x's dtype float32, got float16"),
    ("lora_As", t(2, 8).half(), r"expected lora_As\[1\] in float32 or x's dtype float32, got float16"),
    ("lora_Bs", t(5, 2).double(), r"expected lora_Bs\[1\] in lora_As\[1\]'s dtype float32, got float64"),
    ("dropout_p", 1.0, r"expected dropout_p in \[0, 1\) with round\(dropout_p 2\^16\) below 2\^16, got 1.0$"),
    ("seed", None, "expected a seed where dropout_p > 0 in training, got None"),
    ("seed", t(1), "expected seed in int64, got float32"),
    ("seed", t(2, dtype=torch.int64), r"expected seed of one element, got \[2\]"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), BAD_FORWARD)
def test_errors_of_forward(name: str, value: Any, sentence: str) -> None:
    from torch._subclasses import FakeTensorMode

    args = _good()
    args[name] = [args[name][0], value] if name in NAMES else value
    with pytest.raises(ValueError, match="^lora_linear_group: " + sentence):
        lora_linear_group(**args, training=True)
    # The registered kernel and the fake say the same.
    inner = _inner(args)
    with pytest.raises(ValueError, match="^lora_linear_group: " + sentence):
        OP(*inner.values())
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="^lora_linear_group: " + sentence):
        fake = lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v  # noqa: E731
        OP(*([fake(e) for e in v] if isinstance(v, list) else fake(v) for v in inner.values()))


def test_errors_of_lists() -> None:
    args = _good()
    for name in NAMES:
        with pytest.raises(ValueError, match=r"^lora_linear_group: expected lists of equal length, got \["):
            lora_linear_group(**{**args, name: args[name][:1]}, training=True)
    none, weights = [t(())] * 2, args["weights"]
    for streams, seeds, lengths in (([0], [], "2, 2, 2, 2, 1, 1"), ([0, 1], [t(1).long()] * 3, "2, 2, 2, 2, 2, 3")):
        with pytest.raises(ValueError, match=rf"^lora_linear_group: expected lists of equal length, got \[{lengths}\]"):
            OP(t(4, 8), weights, none, none, none, 1.0, 0.0, seeds, streams)
    for name in ("lora_As", "lora_Bs"):
        sentence = r"^lora_linear_group: expected lora_As\[1\] and lora_Bs\[1\] both given or both "
        with pytest.raises(ValueError, match=sentence + "None, got one of them"):
            lora_linear_group(**{**args, name: [None, None]}, training=True)
        inner = _inner(args)
        with pytest.raises(ValueError, match=sentence + "absent, got one of them"):
            OP(*{**inner, name: [t(()), t(())]}.values())
    for change, sentence in (
        ({"weights": [t(6, 8), t(5, 9)]}, r"weights\[1\] of shape"),
        ({"x": t(4, 9)}, r"weights\[0\]"),
    ):
        none = {**args, "lora_As": [None, None], "lora_Bs": [None, None], **change}
        with pytest.raises(ValueError, match="^lora_linear_group: expected " + sentence):
            lora_linear_group(**none, training=True)


def test_errors_of_frozen_parameters() -> None:
    for name in ("weights", "biases"):
        args = _good()
        args[name][1].requires_grad_()
        sentence = rf"^lora_linear_group: expected {name}\[1\] without requires_grad, got requires_grad=True"
        with pytest.raises(ValueError, match=sentence):
            lora_linear_group(**args, training=True)
        inner = _inner(args)
        with pytest.raises(ValueError, match=sentence):
            OP(*inner.values())
        with torch.no_grad():
            assert [y.shape for y in lora_linear_group(**args, training=True)] == [(4, 6), (4, 5)]


BAD_BACKWARD: list[tuple[dict[str, Any], str]] = [
    ({"grads": [t(()), t(())]}, "expected a gradient of one projection at least, got none"),
    ({"dA": [True]}, r"expected lists of equal length, got \[2, 2, 2, 2, 2, 1, 2, 2, 2\]"),
    ({"dA": [True, True]}, "expected an adapter of projection 0 whose gradient is asked for, got none"),
    ({"grads": [t(4, 6), t(4, 4)]}, r"expected grads\[1\] of shape \[\.\.\., 5\], got \[4, 4\]"),
    ({"grads": [t(4, 6), t(3, 5)]}, r"expected grads\[1\] of shape \[4, 5\], got \[3, 5\]"),
    ({"grads": [t(4, 6), t(4, 5).double()]}, "expected grads in one dtype float32, got float64"),
    ({"weights": [t(6, 8), t(5, 9)]}, r"expected weights\[1\] of shape \[5, 8\], got \[5, 9\]"),
    ({"x": t(5, 8)}, r"expected x of shape \[4, 8\], got \[5, 8\]"),
    ({"ss": [t(()), t(4, 3)]}, r"expected ss\[1\] of shape \[4, 2\], got \[4, 3\]"),
    ({"ss": [t(()), t(4, 2).double()]}, r"expected ss\[1\] in float32, got float64"),
    ({"lora_As": [t(()), t(2, 9)]}, r"expected lora_As\[1\] of shape \[r, 8\] with r in \[1, 256\], got \[2, 9\]"),
    ({"seeds": []}, "expected a seed where dropout_p > 0 in training, got None"),
    ({"streams": [0, -1]}, r"expected stream in \[0, 2\^32\), got -1"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_errors_of_backward(change: dict[str, Any], sentence: str) -> None:
    args = {"grads": [t(4, 6), t(4, 5)], "x": t(4, 8), "weights": [t(6, 8), t(5, 8)], "lora_As": [t(()), t(2, 8)]}
    args |= {"lora_Bs": [t(()), t(5, 2)], "ss": [t(()), t(4, 2)], "scaling": 1.0, "dropout_p": 0.5}
    args |= {
        "seeds": [torch.tensor([1])] * 2,
        "streams": [0, 1],
        "dx": True,
        "dA": [False, True],
        "dB": [False, True],
    } | change
    with pytest.raises(ValueError, match="^lora_linear_group_backward: " + sentence):
        BACKWARD(*args.values())


def test_meta_tensors() -> None:
    meta = lambda v: v.to("meta") if isinstance(v, Tensor) else v  # noqa: E731
    good = {name: [meta(e) for e in v] if name in NAMES else meta(v) for name, v in _good().items()}
    assert [y.shape for y in lora_linear_group(**good, training=True)] == [(4, 6), (4, 5)]


@requires("triton")
def test_arithmetic_launches_once_for_all_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.BACKEND != "triton":
        return
    from collm_fast.kernels import lora, lora_group

    launched: list[str] = []
    for module in (lora, lora_group):
        monkeypatch.setattr(module, "on", lambda tensor, name=module.__name__: launched.append(name) or nullcontext())
    run(lora_linear_group, make((5, 16), [(4, 2), (3, 1), (6, 4)]))
    # Forward: one project for all, expand for each; backward: for each project and twice outer, one expand for all.
    assert launched.count("collm_fast.kernels.lora_group") == 2
    assert launched.count("collm_fast.kernels.lora") == 12


@requires("triton")
@pytest.mark.skipif(in_child(), reason="needs triton")
@pytest.mark.parametrize(("x", "factor", "r"), [("*bf16", "*fp32", 8), ("*fp32", "*fp32", 8), ("*fp16", "*fp16", 64)])
def test_triton_compiles_for_hopper_without_spills(x: str, factor: str, r: int) -> None:
    import triton.language as tl
    from collm_fast.kernels import lora, lora_group
    from triton_aot import compile_for_hopper

    types = dict.fromkeys(("M", "C", "v_row", "threshold", "tiles"), "i32") | {"scale": "fp32", "v": x, "out": x}
    for count in (2, lora_group.MOST):
        each = dict.fromkeys(("ranks", "factor_js", "factor_cs", "streams"), ("i32",) * count)
        each |= {
            "seeds": ("*i64",) * count,
            "factors": (factor,) * count,
            "outs": ("*fp32",) * count,
            "ss": ("*fp32",) * count,
        }
        for kernel, rank in ((lora_group.project_group_kernel, r), (lora_group.expand_group_kernel, min(r, 16))):
            names = kernel.arg_names
            constants = {"COUNT": count, "ADD": True, "DROP": True, "SUM": tl.float32, **lora.blocks(rank)}
            signature = {n: kind for n, kind in {**types, **each}.items() if n in names}
            code = compile_for_hopper(kernel, signature, {n: v for n, v in constants.items() if n in names})
            assert code.spills == 0, (kernel.__name__, count, code.spills)


CHILD = "arithmetic or errors_of or nobody_wants"


@requires("triton")
@pytest.mark.skipif(in_child(), reason="needs triton")
def test_triton_interpreter() -> None:
    assert run_with_backend("triton", __file__, CHILD) > 60


@pytest.mark.skipif(in_child(), reason="needs triton")
def test_reference_backend() -> None:
    assert run_with_backend("reference", __file__, CHILD + " or gradcheck or opcheck") > 60


def test_a_bias_without_dimensions_is_not_none() -> None:
    x, weight, A, B = torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    zero = torch.tensor(5.0)
    with pytest.raises(ValueError, match=r"lora_linear_group: expected biases\[0\] of one dimension at least, got "):
        lora_linear_group(x, [weight], [zero], [A], [B], 1.0)
    with pytest.raises(ValueError, match=r"lora_linear_group: expected lora_As\[1\] of one dimension at least, got "):
        lora_linear_group(x, [weight] * 2, [None] * 2, [A, zero], [B, zero], 1.0)


def test_the_seed_of_a_frozen_projection_is_not_read() -> None:
    absent, x, weight = torch.zeros(()), torch.randn(2, 8), torch.randn(4, 8)
    nothing = torch.empty(0, dtype=torch.int64)
    ys, _ = torch.ops.collm_fast.lora_linear_group(x, [weight], [absent], [absent], [absent], 1.0, 0.5, [nothing], [0])
    torch.testing.assert_close(ys[0], x @ weight.T)

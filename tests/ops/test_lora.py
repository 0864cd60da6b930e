"""lora_linear and lora_linear_group on every backend: values, gradients, errors, determinism, compilation.

The children at the end run the same tests on Triton's interpreter and on the reference; the device code of
csrc/cuda/lora.cuh is run by tests/cuda_on_cpu/test_lora.py, the mask bit for bit by test_philox.py.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import ROOT, in_child, run_with_backend
from conftest import requires
from distances import relative
from torch import Tensor
from torch.nn.functional import linear

from collm_fast import _native, reference
from collm_fast.ops import lora_linear, lora_linear_group

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICES = ["cpu", pytest.param("cuda", marks=requires("cuda"))]
SCALING = 1.75


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        rest = (self.lora_A.to(dtype), self.lora_B.to(dtype), self.grad.to(dtype))
        return Case(self.x.to(dtype), self.weight.to(dtype), bias, *rest)


def make(
    shape: tuple[int, ...], N: int, r: int, dtype: torch.dtype, adapter: torch.dtype, device: str, bias: bool = True
) -> Case:
    K = shape[-1]
    return Case(
        torch.randn(shape).to(device, dtype),
        (torch.randn(N, K) / math.sqrt(max(K, 1))).to(device, dtype),
        torch.randn(N).to(device, dtype) if bias else None,
        (torch.randn(r, K) / math.sqrt(max(K, 1))).to(device, adapter),
        torch.randn(N, r).to(device, adapter),
        torch.randn(*shape[:-1], N).to(device, dtype),
    )


def run(function: Any, case: Case, **options: Any) -> list[Tensor]:
    """[y, dx, dA, dB]."""
    leaves = [t.detach().requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]
    y = function(leaves[0], case.weight, case.bias, leaves[1], leaves[2], SCALING, **options)
    grads = torch.autograd.grad(y, leaves, case.grad.to(y.dtype))
    return [y.detach(), *grads]


def check(case: Case, **options: Any) -> None:
    """Normwise against float64: at most 1e-6 in float32, else at most twice torch's own in the same dtypes."""
    truth = run(reference.lora_linear, case.to(torch.float64), **options)
    torch_own = run(reference.lora_linear, case, **options)
    for name, got, own, true in zip(
        ("y", "dx", "dA", "dB"), run(lora_linear, case, **options), torch_own, truth, strict=True
    ):
        dtype = {"dA": case.lora_A.dtype, "dB": case.lora_B.dtype}.get(name, case.x.dtype)
        assert got.dtype == dtype, name
        bound = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 2 * relative(own, true))
        assert relative(got, true) <= bound, (name, relative(got, true), relative(own, true))


PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]
SIZES = [((37, 100), 61, 8), ((2, 19, 72), 130, 17), ((70, 33), 40, 64), ((600, 24), 16, 3)]
if _native.backends["lora_linear"]["cpu"] == "triton":
    # The interpreter runs a program in milliseconds: still several tiles of rows, columns, ranks and parts.
    SIZES = [((37, 70), 61, 8), ((2, 9, 35), 33, 34), ((70, 9), 5, 3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
@pytest.mark.parametrize(("shape", "N", "r"), SIZES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_arithmetic(
    device: str, dtype: torch.dtype, adapter: torch.dtype, shape: tuple[int, ...], N: int, r: int, dropout_p: float
) -> None:
    if device == "cuda" and dtype == torch.float64:
        with pytest.raises(ValueError, match="expected x in float32, bfloat16, float16, got float64"):
            run(lora_linear, make(shape, N, r, dtype, adapter, device))
        return
    case = make(shape, N, r, dtype, adapter, device, bias=N != 61)
    check(case, dropout_p=dropout_p, seed=torch.tensor([-5], device=device), training=True, stream=3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("r", [1, 16, 256])
def test_arithmetic_of_ranks(device: str, r: int) -> None:
    case = make((12, 40), 24, r, torch.float32, torch.float32, device)
    check(case, dropout_p=0.3, seed=11, training=True)


@requires("native")
@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_layer(dtype: torch.dtype) -> None:
    """More columns than a stretch, more rows than one partial sum."""
    case = make((2100, 1111), 1030, 8, dtype, torch.float32, "cpu")
    check(case, dropout_p=0.05, seed=11, training=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 0), (0, 8), (2, 0, 8), (2, 3, 4, 8), (5, 1)])
def test_arithmetic_of_shapes(device: str, shape: tuple[int, ...]) -> None:
    case = make(shape, 6, 2, torch.float32, torch.float32, device)
    check(case, dropout_p=0.5, seed=1, training=True)
    assert lora_linear(case.x, case.weight, None, case.lora_A, case.lora_B, 1.0).shape == (*shape[:-1], 6)


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_of_strides(device: str) -> None:
    base = make((6, 10, 24), 16, 4, torch.float32, torch.float32, device)
    wide, columns = torch.randn(6, 10, 40, device=device), torch.randn(24, 10, 6, device=device)
    views = [wide[..., 3:27], wide[::2, :, :24], columns.permute(2, 1, 0), base.x[:1].expand(6, 10, 24), base.x.mT.mT]
    for x in views:
        for grad in (base.grad, base.grad[:1, :1, :1].expand(6, 10, 16), base.grad.permute(1, 0, 2).clone().mT.mT):
            grad = grad.reshape(6, 10, 16)[: x.shape[0]]
            weight, A, B = base.weight.T.contiguous().T, base.lora_A.T.contiguous().T, base.lora_B.T.contiguous().T
            bias = torch.randn(32, device=device)[::2]
            check(Case(x, weight, bias, A, B, grad), dropout_p=0.5, seed=2, training=True)


@requires("native")
@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "K", "N", "r"),
    [
        (32, 31, 33, 5),
        (41, 960, 50, 5),
        (45, 50, 961, 5),
        (259, 700, 49, 5),
        (64, 1, 1, 5),
        (331, 96, 672, 5),
        (531, 576, 1400, 8),  # the panels of the weight in two parts, masks drawn beside the products before
        (290, 1024, 70, 13),  # rows that would all fall on the same sets of a cache
        (290, 70, 1024, 16),
        (35, 1100, 1200, 5),  # too few rows for so large a weight
        (290, 2100, 40, 5),  # too wide in one direction, and in the other
        (290, 40, 2100, 5),
    ],
)
def test_packed_weights(dtype: torch.dtype, M: int, K: int, N: int, r: int) -> None:
    """Tails of rows, terms and outputs; weights packed from either order in memory and from neither."""
    if dtype == torch.float32 and M < 128:
        M += 128  # with fewer rows the vendor's product does not pack them
    case = make((M, K), N, r, dtype, torch.float32, "cpu", bias=N != 33)
    padded = torch.randn(2 * N, 3 * K).to(dtype)
    padded[::2, ::3] = case.weight
    for weight in (case.weight, case.weight.T.contiguous().T, padded[::2, ::3]):
        again = Case(case.x, weight, case.bias, case.lora_A, case.lora_B, case.grad)
        check(again, dropout_p=0.25, seed=11, training=True)
    check(case)
    # Rows apart, on the borders of cache lines and off them.
    for first in (32, 5) if K > 1 else ():  # a gradient of one sum may nearly cancel
        apart = torch.randn(M, K + 64).to(dtype)
        grad = torch.randn(M, N + 64).to(dtype)
        views = (apart[:, first : first + K], grad[:, first : first + N])
        check(
            Case(views[0], case.weight, case.bias, case.lora_A, case.lora_B, views[1]),
            dropout_p=0.25,
            seed=1,
            training=True,
        )
    if dtype == torch.bfloat16:
        # torch's own products use the tiles too: neither may find them as the other left them.
        ours, own = run(lora_linear, case), case.x @ case.weight.T
        assert torch.equal(own, case.x @ case.weight.T)
        for a, b in zip(run(lora_linear, case), ours, strict=True):
            assert torch.equal(a, b)
    # What dropout leaves out may be anything.
    mask = reference.dropout_mask(3, M, K, 0.5) == 0
    options = {"dropout_p": 0.5, "seed": 3, "training": True}
    zero = Case(case.x, torch.zeros_like(case.weight), None, case.lora_A, case.lora_B, case.grad)
    huge = Case(case.x.masked_fill(mask, 1e30), zero.weight, None, case.lora_A, case.lora_B, case.grad)
    for a, b in zip(run(lora_linear, huge, **options), run(lora_linear, zero, **options), strict=True):
        assert torch.equal(a, b)


@requires("native")
@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")
@pytest.mark.parametrize(
    ("threads", "M", "K", "N", "products"),
    [
        (1, 127, 40, 24, (0, 0)),
        (1, 128, 40, 24, (1, 1)),
        (1, 255, 40, 24, (1, 1)),
        (1, 513, 40, 24, (3, 3)),
        (1, 17000, 40, 24, (67, 67)),
        (2, 1031, 40, 24, (0, 0)),  # one of two threads would wait while the other packs
        (2, 2050, 40, 24, (10, 0)),  # nine parts for two threads
        (2, 3000, 24, 2100, (24, 12)),  # packed by two threads
        (2, 3000, 2100, 24, (12, 24)),
        (3, 4500, 40, 24, (18, 18)),
    ],
)
def test_blocks_of_rows(
    threads: int, M: int, K: int, N: int, products: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Whole blocks and the rest; rows that overlap, and a weight whose rows do, which no packed product takes."""
    case = make((M, K), N, 3, torch.float32, torch.float32, "cpu")
    wide, ends = torch.randn(M, K + 7), torch.randn(M + K + N)
    weight, *rest = case.weight, case.bias, case.lora_A, case.lora_B, case.grad
    options = {"dropout_p": 0.25, "seed": 11, "training": True}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (case.x, wide[:, 3 : K + 3], case.x[:1].expand(M, K), ends.as_strided((M, K), (1, 1))):
            check(Case(x, weight, *rest), **options)
        check(Case(case.x, weight[:1].expand(N, K), *rest), **options)
        check(Case(case.x, weight, *rest[:-1], ends.as_strided((M, N), (1, 1))), **options)
        x = case.x.clone().requires_grad_()
        y = lora_linear(x, weight, *rest[:-1], SCALING)
        counts = []
        for call in (lambda: lora_linear(x, weight, *rest[:-1], SCALING), lambda: y.backward(case.grad)):
            with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
                call()
            ctypes.CDLL(None).fflush(None)
            counts.append(capfd.readouterr().out.count("SGEMM_COMPUTE("))
        assert tuple(counts) == products
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_without_an_adapter_or_dropout(device: str) -> None:
    case = make((9, 8), 6, 2, torch.float32, torch.float32, device)
    args = (case.x, case.weight, case.bias, case.lora_A, case.lora_B, SCALING)
    assert torch.equal(lora_linear(*args[:3], None, None, 1.0), linear(*args[:3]))
    still = lora_linear(*args)
    # Outside training, dropout does nothing; a p that rounds to no 16-bit step does nothing either.
    assert torch.equal(lora_linear(*args, dropout_p=0.5, seed=1), still)
    assert torch.equal(lora_linear(*args, dropout_p=1e-6, seed=1, training=True), still)
    assert torch.equal(lora_linear(*args, seed=1, training=True), still)
    assert not torch.equal(lora_linear(*args, dropout_p=0.5, seed=1, training=True), still)


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_of_group(device: str) -> None:
    q, k, v = (make((7, 16), N, 4, torch.float32, torch.float32, device, bias=N != 8) for N in (16, 8, 24))
    lists = ([q.weight, k.weight, v.weight], [q.bias, None, v.bias], [q.lora_A, None, v.lora_A])
    lists = (*lists, [q.lora_B, None, v.lora_B])
    options = {"dropout_p": 0.3, "seed": torch.tensor([5], device=device), "training": True}
    got = lora_linear_group(q.x, *lists, SCALING, **options)
    expected = reference.lora_linear_group(q.x, *lists, SCALING, **options)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) <= 1e-6
    same = lora_linear_group(q.x, [q.weight] * 2, [None] * 2, [q.lora_A] * 2, [q.lora_B] * 2, 1.0, **options)
    assert not torch.equal(*same), "projections must not share a mask"
    with pytest.raises(ValueError, match=r"lora_linear_group: expected lists of equal length, got \[3, 3, 3, 1\]"):
        lora_linear_group(q.x, *lists[:3], [None], SCALING)
    assert lora_linear_group(q.x, [], [], [], [], SCALING) == []


def test_gradcheck() -> None:
    case = make((5, 11), 7, 3, torch.float64, torch.float64, "cpu")
    seed = torch.tensor([9])
    leaves = [t.detach().requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]
    for p in (0.0, 0.4):

        def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, p: float = p) -> Tensor:
            args = (x, case.weight, case.bias, lora_A, lora_B, SCALING)
            return lora_linear(*args, dropout_p=p, seed=seed, training=True, stream=2)

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    case = make((2, 5, 24), 16, 4, torch.float32, torch.float32, device)
    seed = torch.tensor([3], device=device)
    leaves = [t.detach().requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]
    forward = torch.ops.collm_fast.lora_linear.default
    for options in ((0.25, seed, 1), (0.0, None, 0)):
        torch.library.opcheck(forward, (leaves[0], case.weight, case.bias, *leaves[1:], SCALING, *options))
        torch.library.opcheck(forward, (case.x, case.weight, None, case.lora_A, case.lora_B, SCALING, *options))
        _, s = forward(case.x, case.weight, None, case.lora_A, case.lora_B, SCALING, *options)
        backward = torch.ops.collm_fast.lora_linear_backward.default
        for mask in ([True, True, True], [True, False, False], [False, True, True]):
            x, kept = (case.x if mask[1] else case.x.new_empty(0)), (s if mask[2] else s.new_empty(0))
            args = (case.grad, x, case.weight, case.lora_A, case.lora_B, kept, SCALING, *options, mask)
            torch.library.opcheck(backward, args)


def test_gradients_that_nobody_wants_are_empty() -> None:
    case = make((5, 24), 16, 4, torch.float32, torch.float32, "cpu")
    backward, none = torch.ops.collm_fast.lora_linear_backward, torch.empty(0)
    args = (case.grad, none, case.weight, case.lora_A, case.lora_B, none, SCALING, 0.0, None, 0)
    assert [g.numel() for g in backward(*args, [False, False, False])] == [0, 0, 0]
    assert [g.numel() for g in backward(*args, [True, False, False])] == [120, 0, 0]
    x = case.x.requires_grad_()
    frozen = torch.autograd.grad(lora_linear(x, *_frozen(case)), x, case.grad)[0]
    assert torch.equal(frozen, backward(*args, [True, False, False])[0])


def _frozen(case: Case) -> tuple[Any, ...]:
    return case.weight, case.bias, case.lora_A, case.lora_B, SCALING


def test_bytes_kept_for_backward() -> None:
    """x and s = dropout(x) A^T, no mask, no masked copy; with frozen adapters nothing but the parameters."""
    case = make((50, 96), 32, 4, torch.float32, torch.float32, "cpu")
    parameters = {id(t) for t in (case.weight, case.lora_A, case.lora_B)}
    for trained, expected in ((True, {case.x.shape, (50, 4)}), (False, set())):
        kept: list[Tensor] = []
        case.x.requires_grad_()
        case.lora_A.requires_grad_(trained)
        case.lora_B.requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            lora_linear(case.x, *_frozen(case), dropout_p=0.5, seed=1, training=True)
        shapes = {tuple(t.shape) for t in kept if id(t) not in parameters and t.numel() > 1}
        assert shapes - {tuple(t.shape) for t in (case.weight, case.lora_A, case.lora_B)} == {
            tuple(e) for e in expected
        }


def test_checkpointing_draws_the_same_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    case = make((50, 96), 32, 4, torch.float32, torch.float32, "cpu")
    seed = torch.tensor([4])

    def again(*args: Any) -> Tensor:
        return checkpoint(lora_linear, *args, use_reentrant=False, **options)

    options = {"dropout_p": 0.5, "seed": seed, "training": True}
    for a, b in zip(run(again, case), run(lora_linear, case, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("M", [700, 2561])
def test_the_same_bits_every_time(M: int) -> None:
    same_bits(torch.float32, M=M)


@requires("native")
@pytest.mark.parametrize("r", [8, 40])
def test_the_same_bits_in_bfloat16(r: int) -> None:
    same_bits(torch.bfloat16, r)


def same_bits(dtype: torch.dtype, r: int = 8, M: int = 700) -> None:
    case = make((M, 600), 520, r, dtype, torch.float32, "cpu")
    options = {"dropout_p": 0.05, "seed": 8, "training": True}
    first = run(lora_linear, case, **options)
    for a, b in zip(first, run(lora_linear, case, **options), strict=True):
        assert torch.equal(a, b)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            # Our own sums; y and dx may hold the vendor's product, whose bits are its own business.
            args = (case.x, case.weight, None, case.lora_A, case.lora_B, SCALING, 0.05, torch.tensor([8]), 0)
            _, s = torch.ops.collm_fast.lora_linear(*args)
            again = run(lora_linear, case, **options)
            if _native.backends["lora_linear"]["cpu"] == "native":
                assert torch.equal(again[2], first[2]) and torch.equal(again[3], first[3])
            assert relative(s, torch.ops.collm_fast.lora_linear(*args)[1]) == 0
    finally:
        torch.set_num_threads(threads)


def test_a_seed_decides_the_mask() -> None:
    case = make((9, 16), 4, 2, torch.float32, torch.float32, "cpu")
    draw = lambda seed, stream=0: lora_linear(  # noqa: E731
        case.x, *_frozen(case), dropout_p=0.5, seed=seed, training=True, stream=stream
    )
    assert torch.equal(draw(7), draw(torch.tensor([7]))) and torch.equal(draw(7), draw(torch.tensor(7)))
    assert not torch.equal(draw(7), draw(8)) and not torch.equal(draw(7), draw(7, 1))
    assert not torch.equal(draw(7), draw(7 + 2**40)), "the high word of a seed counts"


@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
def test_compiles_once_for_every_seed() -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    case = make((9, 16), 4, 2, torch.float32, torch.float32, "cpu")
    dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(*args: Any, seed: Tensor) -> Tensor:
        return lora_linear(*args, dropout_p=0.5, seed=seed, training=True)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in range(12):
        seed = torch.tensor([step])
        for a, b in zip(run(compiled, case, seed=seed), run(function, case, seed=seed), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
    dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_frozen_product_in_its_dtype(dtype: torch.dtype) -> None:
    case = make((40, 64), 32, 4, torch.float32, torch.float32, "cpu")
    low = Case(case.x.to(dtype), case.weight.to(dtype), case.bias.to(dtype), case.lora_A, case.lora_B, case.grad)
    with torch.autocast("cpu", dtype=dtype):
        got = run(lora_linear, case)
        assert lora_linear(case.x.double(), *_frozen(case.to(torch.float64))).dtype == torch.float64
        assert lora_linear(case.x, case.weight, None, None, None, 1.0).dtype == dtype
    for a, b in zip(got, run(lora_linear, low), strict=True):
        assert torch.equal(a, b.to(a.dtype))
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_of_the_op_does_not_see_autocast(dtype: torch.dtype) -> None:
    """The public function has cast by then; what an implementation computes in float32 stays so."""
    if dtype == torch.bfloat16 and _native.BACKEND == "triton":
        return
    case = make((9, 16), 4, 2, dtype, torch.float32, "cpu")
    args = (case.x, case.weight, case.bias, case.lora_A, case.lora_B, SCALING, 0.5, torch.tensor([3]), 0)
    y, s = torch.ops.collm_fast.lora_linear(*args)
    back = (case.grad, case.x, case.weight, case.lora_A, case.lora_B, s, *args[5:], [True, True, True])
    grads = torch.ops.collm_fast.lora_linear_backward(*back)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = (*torch.ops.collm_fast.lora_linear(*args), *torch.ops.collm_fast.lora_linear_backward(*back))
    for a, b in zip((y, s, *grads), again, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_no_second_derivative() -> None:
    case = make((3, 4), 2, 1, torch.float32, torch.float32, "cpu")
    x = case.x.requires_grad_()
    A = case.lora_A.requires_grad_()
    (dx,) = torch.autograd.grad(lora_linear(x, *_frozen(case)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear: expected a first derivative, got a request for the second"):
        torch.autograd.grad(dx.sum(), A)


def test_s_is_not_differentiable() -> None:
    case = make((3, 4), 2, 1, torch.float32, torch.float32, "cpu")
    args = (case.x.requires_grad_(), *_frozen(case), 0.0, None, 0)
    y, s = torch.ops.collm_fast.lora_linear(*args)
    assert y.requires_grad and not s.requires_grad


t = torch.zeros
BAD_FORWARD: list[tuple[dict[str, Any], str]] = [
    ({"x": t(())}, r"expected x of shape \[\.\.\., K\], got \[\]"),
    ({"weight": t(6)}, r"expected weight of shape \[N, 8\], got \[6\]"),
    ({"weight": t(6, 9)}, r"expected weight of shape \[N, 8\], got \[6, 9\]"),
    ({"bias": t(7)}, r"expected bias of shape \[6\], got \[7\]"),
    ({"bias": t(6, 1)}, r"expected bias of shape \[6\], got \[6, 1\]"),
    ({"lora_A": t(2, 9)}, r"expected lora_A of shape \[r, 8\] with r in \[1, 256\], got \[2, 9\]"),
    ({"lora_A": t(0, 8)}, r"expected lora_A of shape \[r, 8\] with r in \[1, 256\], got \[0, 8\]"),
    ({"lora_A": t(257, 8)}, r"expected lora_A of shape \[r, 8\] with r in \[1, 256\], got \[257, 8\]"),
    ({"lora_A": t(8)}, r"expected lora_A of shape \[r, 8\] with r in \[1, 256\], got \[8\]"),
    ({"lora_B": t(6, 3)}, r"expected lora_B of shape \[6, 2\], got \[6, 3\]"),
    ({"lora_B": t(5, 2)}, r"expected lora_B of shape \[6, 2\], got \[5, 2\]"),
    ({"x": t(4, 8, dtype=torch.int64)}, "expected x in float32, bfloat16, float16, float64, got int64"),
    ({"x": t(4, 8, dtype=torch.complex128)}, "expected x in float32, bfloat16, float16, float64, got complex128"),
    ({"weight": t(6, 8).double()}, "expected weight in x's dtype float32, got float64"),
    ({"bias": t(6).half()}, "expected bias in x's dtype float32, got float16"),
    ({"lora_A": t(2, 8).bfloat16()}, "expected lora_A in float32 or x's dtype float32, got bfloat16"),
    ({"lora_A": t(2, 8).double()}, "expected lora_A in float32 or x's dtype float32, got float64"),
    ({"lora_B": t(6, 2).double()}, "expected lora_B in lora_A's dtype float32, got float64"),
    ({"dropout_p": 1.0}, r"expected dropout_p in \[0, 1\) with round\(dropout_p 2\^16\) below 2\^16, got 1.0$"),
    ({"dropout_p": -0.1}, r"expected dropout_p in \[0, 1\) .*, got -0.1"),
    ({"dropout_p": math.nan}, r"expected dropout_p in \[0, 1\) .*, got nan"),
    ({"dropout_p": 1 - 2**-20}, r"expected dropout_p in \[0, 1\) .*, got 0.999999"),
    ({"seed": None}, "expected a seed where dropout_p > 0 in training, got None"),
    ({"seed": t(1)}, "expected seed in int64, got float32"),
    ({"seed": t(2, dtype=torch.int64)}, r"expected seed of one element, got \[2\]"),
    ({"stream": -1}, r"expected stream in \[0, 2\^32\), got -1"),
    ({"stream": 2**32}, r"expected stream in \[0, 2\^32\), got 4294967296"),
]


def test_numpy_seeds_are_ints() -> None:
    case = make((9, 16), 4, 2, torch.float32, torch.float32, "cpu")
    for seed in (np.int64(7), np.uint8(7)):
        drawn = lora_linear(case.x, *_frozen(case), dropout_p=0.5, seed=seed, training=True)
        assert torch.equal(drawn, lora_linear(case.x, *_frozen(case), dropout_p=0.5, seed=7, training=True))


SIMD = """
import sys, torch
from collm_fast.ops import lora_linear
torch.manual_seed(0)
out = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for M in (19, 83):
        x, weight = torch.randn(M, 70).to(dtype).requires_grad_(), torch.randn(45, 70).to(dtype)
        A, B = torch.randn(9, 70, requires_grad=True), torch.randn(45, 9, requires_grad=True)
        y = lora_linear(x, weight, None, A, B, 0.5, dropout_p=0.2, seed=3, training=True)
        out += [y.detach(), *torch.autograd.grad(y, (x, A, B), torch.randn(M, 45).to(dtype))]
# Several blocks of rows in each of the 64 parts: dA and dB have the same bits with any number of threads.
x, weight, grad = torch.randn(17000, 40), torch.randn(24, 40), torch.randn(17000, 24)
A, B = torch.randn(3, 40, requires_grad=True), torch.randn(24, 3, requires_grad=True)
grads = []
for threads, wants_dx in ((1, True), (1, False), (5, True)):
    torch.set_num_threads(threads)
    y = lora_linear(x.requires_grad_(wants_dx), weight, None, A, B, 0.5, dropout_p=0.2, seed=3, training=True)
    grads.append(torch.autograd.grad(y, (A, B), grad))
assert all(torch.equal(a, b) for other in grads for a, b in zip(other, grads[0], strict=True))
torch.save([*out, *grads[0]], sys.argv[1])
"""


@requires("native")
@pytest.mark.skipif(in_child(), reason="needs the compiled libraries")
def test_every_instruction_set_gives_the_same_result(tmp_path: Path) -> None:
    results = []
    for simd in ("", "avx512", "avx2", "baseline"):
        path = tmp_path / f"simd_{simd}.pt"
        environment = {**os.environ, "COLLM_FAST_SIMD": simd}
        subprocess.run([sys.executable, "-c", SIMD, str(path)], env=environment, cwd=ROOT, check=True)
        results.append(torch.load(path))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative(a, b) <= {torch.float32: 1e-6}.get(a.dtype, 1e-2)
    if "avx2" in torch.backends.cpu.get_cpu_capability().lower() or "512" in torch.backends.cpu.get_cpu_capability():
        # Only the vector copies fuse multiplications into additions: other bits show that the cap was heeded.
        assert any(not torch.equal(a, b) for a, b in zip(results[0], results[3], strict=True))


def _good() -> dict[str, Any]:
    tensors = {"x": t(4, 8), "weight": t(6, 8), "bias": t(6), "lora_A": t(2, 8), "lora_B": t(6, 2)}
    return {**tensors, "scaling": 1.0, "dropout_p": 0.5, "seed": torch.tensor([1]), "stream": 0}


@pytest.mark.parametrize(("change", "sentence"), BAD_FORWARD)
def test_errors_of_forward(change: dict[str, Any], sentence: str) -> None:
    args = {**_good(), **change}
    with pytest.raises(ValueError, match="^lora_linear: " + sentence):
        lora_linear(**args, training=True)
    # The registered kernel and the fake say the same.
    with pytest.raises(ValueError, match="^lora_linear: " + sentence):
        torch.ops.collm_fast.lora_linear(*args.values())
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises(ValueError, match="^lora_linear: " + sentence):
        fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in args.values()]
        torch.ops.collm_fast.lora_linear(*fakes)


BAD_BACKWARD: list[tuple[dict[str, Any], str]] = [
    ({"mask": [True]}, "expected mask of 3 booleans, got 1"),
    ({"mask": []}, "expected mask of 3 booleans, got 0"),
    ({"mask": [True] * 4}, "expected mask of 3 booleans, got 4"),
    ({"weight": t(6)}, r"expected weight of shape \[N, K\], got \[6\]"),
    ({"grad": t(4, 5)}, r"expected grad of shape \[\.\.\., 6\], got \[4, 5\]"),
    ({"lora_A": t(2, 9)}, r"expected lora_A of shape \[r, 8\] with r in \[1, 256\], got \[2, 9\]"),
    ({"lora_B": t(6, 3)}, r"expected lora_B of shape \[6, 2\], got \[6, 3\]"),
    ({"x": t(5, 8)}, r"expected x of shape \[4, 8\], got \[5, 8\]"),
    ({"s": t(4, 3)}, r"expected s of shape \[4, 2\], got \[4, 3\]"),
    ({"x": t(4, 8).double()}, "expected x in grad's dtype float32, got float64"),
    ({"s": t(4, 2).double()}, "expected s in float32, got float64"),
    ({"seed": None}, "expected a seed where dropout_p > 0 in training, got None"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_errors_of_backward(change: dict[str, Any], sentence: str) -> None:
    good = _good()
    args = {"grad": t(4, 6), **{k: good[k] for k in ("x", "weight", "lora_A", "lora_B")}, "s": t(4, 2)}
    args |= {k: good[k] for k in ("scaling", "dropout_p", "seed", "stream")} | {"mask": [True, True, True]} | change
    with pytest.raises(ValueError, match="^lora_linear_backward: " + sentence):
        torch.ops.collm_fast.lora_linear_backward(*args.values())


def test_errors_of_frozen_parameters_and_halves_of_an_adapter() -> None:
    good = _good()
    for name in ("weight", "bias"):
        args = {**good, name: good[name].clone().requires_grad_()}
        sentence = f"^lora_linear: expected {name} without requires_grad, got requires_grad=True"
        with pytest.raises(ValueError, match=sentence):
            lora_linear(**args, training=True)
        with pytest.raises(ValueError, match=sentence):
            torch.ops.collm_fast.lora_linear(*args.values())
        with torch.no_grad():
            assert lora_linear(**args, training=True).shape == (4, 6)
    for name in ("lora_A", "lora_B"):
        with pytest.raises(ValueError, match="expected lora_A and lora_B both given or both None"):
            lora_linear(**{**good, name: None})
    with pytest.raises(ValueError, match=r"expected seed in \[-2\^63, 2\^63\), got 9223372036854775808"):
        lora_linear(**{**good, "seed": 2**63}, training=True)
    with pytest.raises(ValueError, match=r"^lora_linear: expected seed None, an int or an int64 tensor, got 1\.5$"):
        lora_linear(**{**good, "seed": 1.5}, training=True)


@pytest.mark.parametrize(
    ("change", "sentence"), [(c, s) for c, s in BAD_FORWARD if not {"lora_A", "lora_B", "seed", "stream"} & set(c)]
)
def test_errors_of_forward_without_an_adapter(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^lora_linear: " + sentence):
        lora_linear(**{**_good(), "lora_A": None, "lora_B": None, **change}, training=True)


def test_meta_tensors() -> None:
    good = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in _good().items()}
    assert lora_linear(**good, training=True).shape == (4, 6)
    assert lora_linear(**{**good, "lora_A": None, "lora_B": None}).device.type == "meta"


@requires("cuda")
def test_errors_of_devices() -> None:
    good = _good()
    for name in ("weight", "bias", "lora_A", "lora_B", "seed"):
        with pytest.raises(ValueError, match=f"expected {name} on x's device cpu, got cuda:0"):
            lora_linear(**{**good, name: good[name].cuda()}, training=True)


@requires("triton")
def test_arithmetic_launches_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.BACKEND != "triton":
        return
    from collm_fast.kernels import lora as kernels

    guarded: list[Tensor] = []
    monkeypatch.setattr(kernels, "on", lambda tensor: guarded.append(tensor) or nullcontext())
    run(lora_linear, make((5, 16), 4, 2, torch.float32, torch.float32, "cpu"))
    assert len(guarded) == 6  # forward: project, expand; backward: project, expand and twice outer


CHILD = "arithmetic or errors_of_forward or errors_of_backward or wants"


@requires("triton")
@pytest.mark.skipif(in_child(), reason="needs triton")
@pytest.mark.parametrize(("x", "factor", "r"), [("*bf16", "*fp32", 8), ("*fp32", "*fp32", 8), ("*fp16", "*fp16", 64)])
def test_triton_compiles_for_hopper_without_spills(x: str, factor: str, r: int) -> None:
    import triton.language as tl
    from collm_fast.kernels import lora as kernels
    from triton_aot import compile_for_hopper

    size = kernels.blocks(r)
    types = dict.fromkeys(("M", "C", "r", "v_row", "factor_j", "factor_c", "bias_column", "rows_per_part"), "i32")
    types |= {"stream": "i32", "threshold": "i32", "scale": "fp32", "seed": "*i64", "s": "*fp32", "partial": "*fp32"}
    types |= {"v": x, "factor": factor, "bias": x}
    constants = {"DROP": True, "BIAS": True, "SUM": tl.float32, **size}
    for kernel, out in ((kernels.project_kernel, "*fp32"), (kernels.expand_kernel, x), (kernels.outer_kernel, "")):
        names = kernel.arg_names
        signature = {n: kind for n, kind in {**types, "out": out}.items() if n in names}
        code = compile_for_hopper(kernel, signature, {n: v for n, v in constants.items() if n in names})
        assert code.spills == 0, (kernel.__name__, code.spills)


@requires("triton")
@pytest.mark.skipif(in_child(), reason="needs triton")
def test_triton_interpreter() -> None:
    assert run_with_backend("triton", __file__, CHILD) > 80


@pytest.mark.skipif(in_child(), reason="needs triton")
def test_reference_backend() -> None:
    assert run_with_backend("reference", __file__, CHILD + " or gradcheck or opcheck or same_bits") > 80

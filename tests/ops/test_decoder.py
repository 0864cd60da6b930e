"""rms_norm, swiglu, rotate_heads: against float64, their gradients, bits, and the sentences."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from backends import ROOT
from conftest import requires
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.ops.decoder import rms_norm, rotate_heads, swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("rms_norm", "swiglu", "rotate_heads")
ops = torch.ops.collm_fast


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments(name: str, size: int = 37) -> tuple[Tensor | float, ...]:
    """Operands in float64: an odd size, one token that is far larger than the others."""
    x = rows(5, size)
    x[2] *= 300
    if name == "rms_norm":
        return x, rows(size, seed=1), 1e-5
    if name == "swiglu":
        return x, rows(5, size, seed=1)
    return rows(5, 3 * 2 * size), rows(5, 2 * size, seed=1), rows(5, 2 * size, seed=2)


def call(name: str, *args: object) -> Tensor:
    return {"rms_norm": rms_norm, "swiglu": swiglu, "rotate_heads": rotate_heads}[name](*args)  # type: ignore[operator]


def cast(args: tuple[object, ...], dtype: torch.dtype) -> list[object]:
    """Every operand in `dtype`."""
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in args]


def gradients(function: object, args: list[object], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) and i in (0,) else a for i, a in enumerate(args)]
    out = function(*leaves)  # type: ignore[operator]
    return out.detach(), list(torch.autograd.grad(out, leaves[0], grad))


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def test_compiled_kernels_serve_the_cpu() -> None:
    if _native.BACKEND == "auto" and (_native.FOLDER / "libcollm_fast_cpu.so").is_file():
        assert {_native.backends[name]["cpu"] for name in NAMES} == {"native"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 37, 64, 576])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=requires("cuda"))])
def test_error_against_float64(name: str, dtype: torch.dtype, size: int, device: str) -> None:
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments(name, size))
    low = cast(args, dtype)
    exact = [a.double() if isinstance(a, Tensor) and a.dtype == dtype else a for a in low]
    specification = getattr(reference, name)
    grad = rows(*specification(*exact).shape, seed=7).to(device)
    truth, true_grad = gradients(specification, exact, grad.to(dtype).double())
    plain, plain_grad = gradients(specification, low, grad.to(dtype))
    ours, our_grad = gradients(lambda *a: call(name, *a), low, grad.to(dtype))
    # In low precision what is kept for the gradient is rounded too.
    limit = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2)
    for got, other, right in ((ours, plain, truth), (our_grad[0], plain_grad[0], true_grad[0])):
        if right.norm() == 0:
            assert got.abs().max() == 0
            continue
        assert got.dtype == dtype
        assert error(got, right) <= max(limit, 2 * error(other, right))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_opcheck(name: str) -> None:
    args = [a.clone() if isinstance(a, Tensor) else a for a in arguments(name, 6)]
    args[0] = args[0][..., :6] if name == "swiglu" else args[0]  # type: ignore[index]
    frozen = args[1:]
    first = (args[0] / 10).requires_grad_()  # type: ignore[operator]
    assert torch.autograd.gradcheck(lambda x: call(name, x, *frozen), first)
    if name == "swiglu":
        second = frozen[0].clone().requires_grad_()  # type: ignore[union-attr]
        assert torch.autograd.gradcheck(lambda u: swiglu(first.detach(), u), second)
    torch.library.opcheck(getattr(ops, name).default, (first, *frozen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2, 37, 576])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=requires("cuda"))])
def test_a_norm_of_float32_in_half_precision(dtype: torch.dtype, size: int, device: str) -> None:
    """The result and its gradient are rounded once each; what is normed, and its own gradient, not at all."""
    x, weight, eps = (a.to(device) if isinstance(a, Tensor) else a for a in arguments("rms_norm", size))
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    x, low = x.float(), weight.to(dtype)
    y, grad = reference.rms_norm(x, low.float(), eps), rows(5, size, seed=7).to(device, dtype)  # type: ignore[arg-type]
    got, dx = gradients(lambda *a: call("rms_norm", *a), [x, low, eps], grad)
    assert got.dtype == dtype and dx[0].dtype == torch.float32
    assert error(got, y.to(dtype).double()) <= torch.finfo(dtype).eps / 8
    _, truth = gradients(reference.rms_norm, [x.double(), low.double(), eps], grad.double())
    assert error(dx[0], truth[0]) <= 1e-6
    residual = rows(5, size, seed=6).to(device, torch.float32)
    _, scale = ops.rms_norm(x, low, eps)
    summed = ops.rms_norm_backward(grad, x, low, scale, residual)
    torch.testing.assert_close(summed, dx[0] + residual, rtol=1e-6, atol=1e-6)
    torch.library.opcheck(ops.rms_norm.default, (x.requires_grad_(), low, eps))


def test_the_residual_is_added_in_the_same_pass() -> None:
    x, weight, eps = arguments("rms_norm")
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    grad, residual = rows(*x.shape, seed=5), rows(*x.shape, seed=6)
    _, scale = ops.rms_norm(x, weight, eps)
    without = ops.rms_norm_backward(grad, x, weight, scale, None)
    torch.testing.assert_close(ops.rms_norm_backward(grad, x, weight, scale, residual), without + residual)


def test_a_norm_of_no_width() -> None:
    x = torch.empty(5, 0, requires_grad=True)
    y, scale = ops.rms_norm(x, torch.empty(0), 1e-5)
    y.sum().backward()
    assert scale.shape == (5,) and scale.isnan().all() and x.grad is not None and x.grad.shape == (5, 0)


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_empty_operands(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = cast(arguments(name), dtype)
        strided = [torch.stack((a, a), dim=-1)[..., 1] if isinstance(a, Tensor) else a for a in args]
        assert torch.equal(call(name, *strided), call(name, *args))
    empty = {
        "rms_norm": (torch.empty(0, 8), torch.ones(8), 1e-5),
        "swiglu": (torch.empty(0, 8), torch.empty(0, 8)),
        "rotate_heads": (torch.empty(0, 16), torch.empty(0, 8), torch.empty(0, 8)),
    }[name]
    assert call(name, *empty).numel() == 0


def test_extreme_values() -> None:
    gate = torch.tensor([-1e4, -200.0, -88.0, -87.0, 0.0, 88.0, 200.0, 1e4])
    torch.testing.assert_close(swiglu(gate, torch.ones(8)), torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-30)
    assert swiglu(torch.tensor([float("nan")]), torch.ones(1)).isnan().all()
    huge = torch.tensor([[float("inf"), float("nan"), -float("inf"), 3.3e38]]).bfloat16()
    out = swiglu(torch.full_like(huge, 1.0), huge)
    assert torch.equal(out.isnan(), huge.isnan()) and torch.equal(out.isinf(), huge.isinf())


_BITS = """
import hashlib, sys, torch
sys.path[:0] = ['tests', 'tests/ops']
from test_decoder import NAMES, arguments, call, cast, gradients
torch.set_num_threads({threads})
digest = hashlib.sha256()
for name in NAMES:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = cast(arguments(name, 3001), dtype)
        out = call(name, *args)
        for tensor in (out, *gradients(lambda *a: call(name, *a), args, torch.ones_like(out))[1]):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_bits_depend_on_neither_instruction_set_nor_threads() -> None:
    def digest(simd: str, threads: int) -> str:
        environment = {**os.environ, "COLLM_FAST_SIMD": simd}
        code = _BITS.format(threads=threads)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert len({digest("", 1), digest("", 2), digest("avx2", 1), digest("baseline", 1)}) == 1


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("rms_norm", (torch.ones(2, 3), torch.ones(4), 1e-5), "expected weight of shape [3], got [4]"),
        (
            "rms_norm",
            (torch.ones(2, 3), torch.ones(3).double(), 1e-5),
            "expected weight of the dtype of x, or in half precision for x in float32, got float64",
        ),
        ("rms_norm", (torch.ones(3).int(), torch.ones(3), 1e-5), "expected x in float32, bfloat16, float16 or float64"),
        ("swiglu", (torch.ones(3), torch.ones(4)), "expected up of the shape of gate [3], got [4]"),
        ("rotate_heads", (torch.ones(2, 6), torch.ones(2, 3), torch.ones(2, 3)), "with d even, got [2, 3]"),
        ("rotate_heads", (torch.ones(2, 6), torch.ones(2, 4), torch.ones(2, 4)), "a multiple of 4 columns, got 6"),
        ("rotate_heads", (torch.ones(3, 8), torch.ones(2, 4), torch.ones(2, 4)), "cos of shape [3, d]"),
    ],
)
def test_bad_arguments_are_a_sentence(name: str, args: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        call(name, *args)
    assert str(caught.value).startswith(f"{name}: expected ") and sentence in str(caught.value)


def test_a_trainable_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="rms_norm: expected a frozen weight"):
        rms_norm(torch.ones(2, 3), torch.ones(3, requires_grad=True), 1e-5)

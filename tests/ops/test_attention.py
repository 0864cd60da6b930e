"""path_attention: the plain form and the compiled kernels against float64, gradients, bits, and the sentences."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from backends import ROOT
from conftest import requires
from torch import Tensor

from collm_fast import reference
from collm_fast.ops import attention
from collm_fast.ops.attention import path_attention

ops = torch.ops.collm_fast
# (past, own, asked) of each piece, by tree.
TREES = {
    "one token": [[(0, 0, 0), (0, 1, 1)]],
    "sequences": [[(0, 0, 0), (0, 70, 70)], [(0, 0, 0), (0, 150, 150)], [(0, 0, 0), (0, 3, 3)]],
    "branches": [[(0, 150, 150), (0, 22, 22), (0, 64, 64), (0, 33, 33)], [(0, 0, 0), (0, 170, 170)]],
    "prefix alone": [[(0, 45, 45)], [(0, 5, 5), (0, 2, 2)]],
    "answers": [[(0, 40, 0), (0, 9, 1), (0, 33, 1)], [(0, 0, 0), (0, 31, 1)]],
    "past": [[(127, 30, 30), (0, 22, 22), (0, 26, 1), (0, 33, 0)], [(20, 0, 0), (17, 51, 20), (0, 1, 1)]],
}
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {"smollm2": (9, 3, 64), "one head": (2, 2, 40), "tiny": (4, 1, 6)}


def tables(name: str) -> tuple[Tensor, Tensor]:
    trees = TREES[name]
    return torch.tensor([piece for tree in trees for piece in tree]), torch.tensor([len(tree) for tree in trees])


def operands(name: str, shape: str, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(query, key, value as a layer gives them, past keys and values where there are some, the output's gradient)."""
    generator = torch.Generator().manual_seed(0)
    heads, key_heads, width = SHAPES[shape]
    past, own, asked = tables(name)[0].sum(0).tolist()

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    value = random(own, key_heads, width).transpose(0, 1)
    inputs = [random(heads, asked, width), random(key_heads, own, width), value]
    before = [random(key_heads, past, width) for _ in range(2)] if past else []
    return inputs, before, random(asked, heads, width)


def run(function: object, name: str, inputs: list[Tensor], past: list[Tensor], grad: Tensor, **options: object) -> list:
    leaves = [x.detach().requires_grad_() for x in inputs]
    before = (past[0], past[1]) if past else None
    out = function(*leaves, *tables(name), scale=0.2, past=before, **options)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-300))


@requires("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("name", TREES)
def test_error_against_float64(name: str, window: int | None, shape: str, dtype: torch.dtype) -> None:
    inputs, past, grad = operands(name, shape, dtype)
    exact = [[x.double() for x in given] for given in (inputs, past)]
    truth = run(reference.path_attention, name, *exact, grad.double(), window=window)
    theirs = run(reference.path_attention, name, inputs, past, grad, window=window)
    ours = run(path_attention, name, inputs, past, grad, window=window)
    for got, other, right in zip(ours, theirs, truth, strict=True):
        assert got.dtype == dtype and got.shape == right.shape
        least = 4e-3 if dtype == torch.bfloat16 else 1e-6
        if right.norm() < 1e-9 * grad.double().norm():  # one key alone: the gradient of its score is zero
            assert got.abs().max() <= 12 * least
            continue
        assert error(got, right) <= max(least, error(other, right))


def test_plain_form_is_the_specification() -> None:
    """What serves where nothing is compiled, in float64, and its gradient."""
    for name in TREES:
        inputs, past, grad = operands(name, "tiny")
        exact = [[x.double() for x in given] for given in (inputs, past)]
        truth = run(reference.path_attention, name, *exact, grad.double(), window=9)
        given = [*exact[0], *(exact[1] or (None, None))]
        out, sums = attention._path_attention(*given, *tables(name), 0.2, 9)
        grads = attention._path_attention_backward(grad.double(), *given, sums, *tables(name), 0.2, 9)
        for got, right in zip((out, grads[0], grads[1], grads[2].transpose(0, 1)), truth, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


def test_the_specification_is_a_softmax_along_each_path() -> None:
    pieces, counts = tables("past")
    visible = reference.path_visible(pieces, counts, window=60)
    ends, past = pieces[:, 1].cumsum(0), int(pieces[:, 0].sum())
    # The one query of the third piece stands at position 127 + 30 + 26 - 1.
    row = visible[int(pieces[:2, 2].sum())]
    seen = set(range(123, 127)) | set(range(past, past + 30)) | set(range(past + int(ends[1]), past + int(ends[2])))
    assert set(row.nonzero().flatten().tolist()) == seen and len(seen) == 60


@requires("native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    inputs, past, _ = operands("past", "tiny", dtype)
    leaves = [x.requires_grad_() for x in inputs]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.path_attention.default, (*leaves, *past, *tables("past"), 0.2, 9), test_utils=utilities)


@requires("native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_empty_packs_and_large_scores(dtype: torch.dtype) -> None:
    inputs, past, grad = operands("branches", "smollm2", dtype)
    strided = [torch.stack((x, x), dim=-1)[..., 1] for x in inputs]
    dense = run(path_attention, "branches", inputs, past, grad)
    for a, b in zip(run(path_attention, "branches", strided, past, grad), dense, strict=True):
        assert torch.equal(a, b)
    none = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    empty = [torch.empty(h, 0, 8, dtype=dtype) for h in (4, 2, 2)]
    assert path_attention(*empty, *none, scale=1.0).shape == (0, 4, 8)
    large = [inputs[0] * 300, inputs[1] * 300, inputs[2]]
    out = path_attention(*large, *tables("branches"), scale=1.0)
    truth = reference.path_attention(*(x.double() for x in large), *tables("branches"), scale=1.0)
    # With scores of 10^5 the exponents alone lose digits of float32.
    theirs = reference.path_attention(*large, *tables("branches"), scale=1.0)
    limit = 4e-3 if dtype == torch.bfloat16 else max(torch.finfo(dtype).eps / 2, 2 * error(theirs, truth))
    assert error(out, truth) <= limit
    large[1][0, 3, 1] = float("nan")
    assert path_attention(*large, *tables("branches"), scale=1.0)[3:150, :3].isnan().all()


_BITS = """
import hashlib, itertools, sys, torch
sys.path[:0] = ['tests', 'tests/ops']
from test_attention import DTYPES, SHAPES, TREES, error, operands, path_attention, reference, run
torch.set_num_threads({threads})
digest, worst = hashlib.sha256(), 0.0
for dtype, shape, name, window in itertools.product(DTYPES, SHAPES, TREES, (None, 33)):
    inputs, past, grad = operands(name, shape, dtype)
    exact = [[x.double() for x in given] for given in (inputs, past)]
    truth = run(reference.path_attention, name, *exact, grad.double(), window=window)
    for tensor, right in zip(run(path_attention, name, inputs, past, grad, window=window), truth, strict=True):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        if right.norm() > 1e-9 * grad.double().norm():
            worst = max(worst, error(tensor, right) / (1e-6 if dtype == torch.float32 else 8e-3))
print(digest.hexdigest(), worst <= 1)
"""


@requires("native")
@pytest.mark.parametrize("simd", [pytest.param("", marks=requires("tiles"), id="tiles"), "avx512", "avx2", "baseline"])
def test_every_instruction_set_is_exact_and_its_bits_do_not_depend_on_threads(simd: str) -> None:
    def found(threads: int) -> list[str]:
        command = [sys.executable, "-c", _BITS.format(threads=threads)]
        environment = {**os.environ, "COLLM_FAST_SIMD": simd}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    one = found(1)
    assert one == found(2) and one[1] == "True"


def wrong(**changes: object) -> dict[str, object]:
    half = torch.zeros(4, 5, 8).bfloat16()
    given = {
        "query": half,
        "key": half[:2],
        "value": half[:2],
        "pieces": torch.tensor([[0, 2, 2], [0, 3, 3]]),
        "counts": torch.tensor([2]),
        "scale": 1.0,
    }
    return given | changes


HALF = torch.zeros(4, 5, 8).bfloat16()


@requires("native")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"query": HALF[0]}, "expected query of shape [h, Q, d]"),
        (dict.fromkeys(("query", "key", "value"), HALF.half()), "expected query in float32 or bfloat16, got float16"),
        ({"value": HALF[:2].float()}, "expected value of the dtype of query, got float32"),
        ({"key": HALF[:3]}, "expected key of shape [heads that divide 4, T, d], got [3, 5, 8]"),
        ({"value": HALF[:2, :4]}, "expected value of shape [2, 5, "),
        ({"past": (HALF[:2, :1], HALF[:2, :2])}, "expected past_value of shape [2, 1, "),
        ({"past": (HALF[:2, :1], HALF[:2, :1])}, "expected pieces of 1 past tokens, got 0"),
        ({"pieces": torch.tensor([[0, 2, 2], [0, 2, 3]])}, "0 <= asked <= own of every piece, got 0, 3, 2"),
        ({"pieces": torch.tensor([[0, 2, 2], [0, 3, 2]])}, "expected pieces of 5 asked tokens, got 4"),
        ({"pieces": torch.tensor([[0, 2, 2], [0, 4, 3]])}, "expected pieces of 5 own tokens, got 6"),
        ({"pieces": torch.zeros(2, 3)}, "expected dense int64 pieces [N, 3] and counts [trees], got [2, 3] and [1]"),
        ({"counts": torch.tensor([1])}, "expected counts of 2 pieces, got 1"),
        ({"counts": torch.tensor([2, 0])}, "expected at least a prefix in every tree, got 0 pieces"),
        ({"window": 0}, "expected window None or at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_a_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        path_attention(**wrong(**changes))  # type: ignore[arg-type]
    assert str(caught.value).startswith("path_attention: expected ") and sentence in str(caught.value)


@requires("native")
def test_past_keys_with_a_gradient_are_refused() -> None:
    inputs, past, _ = operands("past", "tiny")
    leaves = inputs[0].requires_grad_(), *inputs[1:]
    with pytest.raises(ValueError, match="expected past keys and values without a gradient"):
        path_attention(*leaves, *tables("past"), scale=1.0, past=(past[0].requires_grad_(), past[1]))

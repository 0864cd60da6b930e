"""Tree attention against one dense mask over the whole pack; layouts it must refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import requires
from small_llm import dense_mask, random_layout
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from collm_fast.models import attention
from collm_fast.models.attention import tree_attention
from collm_fast.models.tree_plan import TreePlan


@pytest.mark.parametrize("per_branch", [True, False])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_dense_mask_with_gradients(seed: int, window: int | None, per_branch: bool) -> None:
    tree, branch, position = random_layout(np.random.default_rng(seed), trees=4)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, len(tree), 8), (1, 2, len(tree), 8), (1, 2, len(tree), 8))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64)

    plan = TreePlan(tree.numpy(), branch.numpy(), per_branch=per_branch)
    out = tree_attention(*inputs, plan, scaling=0.3, window=window)
    got = torch.autograd.grad(out, inputs, grad)

    mask = dense_mask(tree, branch, position, window)
    q, k, v = inputs[0], *(x.repeat_interleave(2, dim=1) for x in inputs[1:])
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for a, b in zip(got, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def as_exact_as_torch(
    dtype: torch.dtype, window: int | None, per_branch: bool
) -> tuple[TreePlan, list[Tensor], list[Tensor]]:
    """Output and gradients are at most twice as far from float64 as a dense mask's; returns plan, inputs and truth."""
    tree, branch, position = random_layout(np.random.default_rng(7), trees=3)
    generator = torch.Generator().manual_seed(7)
    low = [torch.randn(1, h, len(tree), 16, generator=generator).to(dtype) for h in (4, 2, 2)]
    grad = torch.randn(1, 4, len(tree), 16, generator=generator).to(dtype)
    mask = dense_mask(tree, branch, position, window)
    plan = TreePlan(tree.numpy(), branch.numpy(), per_branch=per_branch)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, plan, scaling=None, window=window)

    found = []
    for function, kind in ((dense, torch.float64), (dense, dtype), (ours, dtype)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in low]
        out = function(*leaves)
        assert out.dtype == kind
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))])
    for truth, theirs, got in zip(*found, strict=True):
        assert got.shape == truth.shape and (got - truth).norm() <= 2 * (theirs - truth).norm()
    return plan, low, found[0]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("per_branch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["fused", pytest.param("paths", marks=requires("native"))])
def test_it_is_as_exact_as_torch(
    kernel: str, dtype: torch.dtype, per_branch: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "kernel_of", lambda query: kernel)
    plan, low, truth = as_exact_as_torch(dtype, window, per_branch)
    assert plan.kernel == kernel
    with torch.no_grad():
        out = tree_attention(*low, plan, scaling=None, window=window)
    torch.testing.assert_close(out, truth[0].to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("tree", "branch", "message"),
    [
        ([], [], "expected tree and branch of one shape"),
        ([0, 0], [0], "expected tree and branch of one shape"),
        ([0, 1, 0], [-1, 0, 1], "one contiguous run"),
        ([0, 0, 0, 0], [-1, 0, 1, 0], "one contiguous run"),
        ([0, 0, 0], [0, -1, 1], "expected a prefix before the branches"),
    ],
)
def test_broken_layouts_are_refused(tree: list[int], branch: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreePlan(np.array(tree, dtype=np.int64), np.array(branch, dtype=np.int64), per_branch=True)

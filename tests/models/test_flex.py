"""FlexAttention's mask of a plan against the plan's own masks, and one uncompiled call against tree attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import available, requires
from small_llm import dense_mask, random_layout
from torch import Tensor

from collm_fast import reference
from collm_fast.models import attention, flex
from collm_fast.models.attention import tree_attention
from collm_fast.models.tree_plan import TreePlan

CPU = torch.device("cpu")


def plans(seed: int) -> list[tuple[TreePlan, TreePlan | None]]:
    """(a plan, that of its past): whole, its answers alone, and cut anywhere, with and without answers alone."""
    rng = np.random.default_rng(seed)
    tree, branch, _ = (x.numpy() for x in random_layout(rng, trees=4))
    whole = TreePlan(tree, branch, per_branch=False)
    cut = [[int(rng.integers(0, piece.own + (j == 0))) for j, piece in enumerate(pieces)] for pieces in whole.trees]
    for sizes, pieces in zip(cut, whole.trees, strict=True):
        if sizes[0] < pieces[0].own:
            sizes[1:] = [0] * len(sizes[1:])
    head, tail = whole.split(cut)
    return [(whole, None), (whole.answers(), None), (tail, head), (tail.answers(), head)]


def mask_of(plan: TreePlan, window: int | None) -> Tensor:
    """[Q, P + T] bool that the mask_mod computes, and nothing but one key for what stands behind the queries."""
    places = flex.axes(plan.trees)
    queries, keys = len(places.query), len(places.key)
    mask_mod, read = flex.visible(places, window, CPU)
    rows, columns = (torch.arange(flex.padded_length(count)) for count in (queries, keys))
    assert [len(x) for x in read] == [len(rows)] * 3 + [len(columns)] * 2
    none = torch.zeros((), dtype=torch.int64)
    found = mask_mod(none, none, rows[:, None], columns[None, :])
    assert torch.equal(found[queries:].nonzero()[:, 1], torch.zeros(len(rows) - queries, dtype=torch.int64))
    assert not found[:, keys:].any()
    return found[:queries, :keys]


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_that_of_the_paths(seed: int, window: int | None) -> None:
    for plan, _ in plans(seed):
        assert torch.equal(mask_of(plan, window), reference.path_visible(*plan.tables(), window))
    whole, _ = plans(seed)[0]
    tree, branch, position = random_layout(np.random.default_rng(seed), trees=4)
    assert torch.equal(mask_of(whole, window), dense_mask(tree, branch, position, window))


def test_lengths_are_few() -> None:
    found = {flex.padded_length(count) for count in range(5000)}
    assert found == {128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144}
    assert all(flex.padded_length(length) == length for length in found)
    assert flex.padded_length(0) == 128 and flex.padded_length(257) == 384 and flex.padded_length(1537) == 2048


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """FlexAttention as it runs without a compiler; the masks it was called with."""
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention, "kernel_of", lambda query: "flex")
    masks: list[Any] = []

    def call(*args: Any, block_mask: Any, **kwargs: Any) -> Tensor:
        masks.append(block_mask)
        return module.flex_attention(*args, block_mask=block_mask, **kwargs)

    monkeypatch.setattr(flex, "_compiled", lambda: call)
    return masks


@pytest.mark.parametrize("window", [None, 5])
def test_one_call_equals_tree_attention(
    window: int | None, uncompiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    for plan, past in plans(7):
        asked, own = (sum(p[place] for tree in plan.trees for p in tree) for place in (2, 1))
        before = None if past is None else sum(p.own for tree in past.trees for p in tree)
        query = torch.randn(1, 4, asked, 16, generator=generator)
        key, value = (torch.randn(1, 2, own, 16, generator=generator) for _ in range(2))
        given = None
        if before is not None:
            given = tuple(torch.randn(1, 2, before, 16, generator=generator) for _ in range(2))
        got = [tree_attention(query, key, value, plan, scaling=0.3, window=window, past=given) for _ in range(2)]
        assert plan.kernel == "flex" and torch.equal(*got)
        assert uncompiled[-1] is uncompiled[-2], "the layers of a plan share its mask"
        with monkeypatch.context() as patch:
            patch.setattr(attention, "kernel_of", lambda query: "fused")
            expected = tree_attention(query, key, value, plan, scaling=0.3, window=window, past=given)
        torch.testing.assert_close(got[0], expected, rtol=0, atol=2e-6)


def test_the_rule_and_what_a_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TreePlan(np.zeros(3, np.int64), np.array([-1, 0, 1]), per_branch=True)
    assert plan.kernel is None
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(1, 2, 3, 8, dtype=dtype)
        tree_attention(x, x, x, plan, scaling=None, window=None)
        assert plan.kernel == attention.kernel_of(x)
        served = available("native") and dtype != torch.float64
        assert plan.kernel == ("paths" if served else "fused")
        assert plan.answers().kernel is None

    class OnCuda:
        device, shape = torch.device("cuda"), (1, 2, 3, 64)

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    monkeypatch.setattr(flex, "_importable", lambda: True)
    chosen = {dtype: attention.kernel_of(OnCuda(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)}  # type: ignore[arg-type]
    assert list(chosen.values()) == ["flex", "flex", "fused"]
    monkeypatch.setattr(OnCuda, "shape", (1, 2, 3, 8))
    assert attention.kernel_of(OnCuda(torch.bfloat16)) == "fused"  # type: ignore[arg-type]
    monkeypatch.setattr(OnCuda, "shape", (1, 2, 3, 64))
    monkeypatch.setattr(flex, "_importable", lambda: False)
    assert attention.kernel_of(OnCuda(torch.bfloat16)) == "fused"  # type: ignore[arg-type]


@requires("cuda", "triton")
@pytest.mark.parametrize("window", [None, 5])
def test_compiled_on_a_gpu_with_gradients(window: int | None) -> None:
    """bfloat16 against float64, at most twice as far off as one dense call of torch's attention in bfloat16."""
    tree, branch, position = random_layout(np.random.default_rng(3), trees=6)
    generator = torch.Generator().manual_seed(3)
    plan = TreePlan(tree.numpy(), branch.numpy(), per_branch=False)
    low = [torch.randn(1, h, len(tree), 64, generator=generator).bfloat16().cuda() for h in (9, 3, 3)]
    grad = torch.randn(1, 9, len(tree), 64, generator=generator).bfloat16().cuda()
    mask = dense_mask(tree, branch, position, window).cuda()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def trees(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, plan, scaling=None, window=window)

    found = []
    for function, dtype in ((dense, torch.float64), (dense, torch.bfloat16), (trees, torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in low]
        out = function(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    assert plan.kernel == "flex"
    for truth, theirs, ours in zip(*found, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()

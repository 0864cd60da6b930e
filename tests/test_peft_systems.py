"""FastLoraLinear inside torch's systems: activation checkpointing, torch.compile, DDP and FSDP2.

`rank_*` functions run on every rank of a gloo group (see ranks.py) and return what the tests compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import requires
from peft_models import IDS, adapters, layers, llm, small
from ranks import Ranks
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import collm_fast.peft
from collm_fast import ops


def gradients(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in adapters(model)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(reentrant: bool) -> None:
    model = llm(True, lora_dropout=0.5)
    torch.manual_seed(4)
    expected = gradients(model)
    after = torch.randint(2**62, (1,))
    keywords = {"use_reentrant": reentrant}
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    calls: list[None] = []
    next(layers(model))[1].register_forward_hook(lambda *_: calls.append(None))
    torch.manual_seed(4)
    got = gradients(model)
    assert len(calls) == 2, "the layer ran again in backward"
    assert torch.equal(torch.randint(2**62, (1,)), after), "and took nothing more from the generator"
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name
    # The test can fail: without the generator's state the masks differ.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={**keywords, "preserve_rng_state": False})
    torch.manual_seed(4)
    other = gradients(model)
    assert any((other[name] - grad).norm() > 1e-2 * grad.norm() for name, grad in expected.items())


def step(run: Any, model: Any, x: Tensor) -> list[Tensor]:
    """Output and gradients of one step in which every element of y counts differently."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for _, p in adapters(model))]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile_in_one_graph(checkpointing: bool) -> None:
    model = small(True, r=4, lora_dropout=0.5)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    x = torch.randn(6, 24)
    outputs = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        expected = step(run, model, x)
        torch.manual_seed(seed)
        got = step(compiled, model, x)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()
        outputs.append(got[0])
    assert counter.frame_count == 1, "each step draws new masks without being compiled again"
    assert not torch.equal(outputs[0], outputs[1])
    torch._dynamo.reset()


def test_inductor_repeats_the_mask_of_forward_in_backward() -> None:
    """Without biases y is linear in x, so <dy/dx, x> is y exactly where backward draws the forward's mask."""
    model = small(True, r=4, lora_dropout=0.5, bias=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(32, 24, requires_grad=True)
    sums = []
    for _ in range(3):
        x.grad = None
        y = compiled(x).sum()
        y.backward()
        assert abs((x.grad * x).sum() - y) <= 1e-5 * x.grad.norm() * x.norm()
        sums.append(y.item())
    assert len(set(sums)) == 3
    torch._dynamo.reset()


@requires("cuda")
def test_a_captured_forward_draws_new_masks() -> None:
    model, x = small(True, r=4, lora_dropout=0.5).cuda(), torch.ones(64, 24, device="cuda")
    with torch.no_grad():
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):
            model(x)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("ranks"), str(Path(__file__))) as started:
        yield started


# Two batches, one for each rank, of equal length: the mean of their losses is the loss of both together.
BATCHES = [IDS, (IDS * 5 + 3) % 90]


def rank_ddp(group: dist.ProcessGroup, dropout: float) -> dict[str, Tensor]:
    model = llm(True, lora_dropout=dropout)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    ids = BATCHES[dist.get_rank(group)]
    torch.manual_seed(dist.get_rank(group))
    wrapped(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in adapters(model)}


def rank_fsdp(group: dist.ProcessGroup, dropout: float) -> tuple[dict[str, Tensor], int, int]:
    """Gradients of a sharded model, how often the op ran, and how many parameters are sharded."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = llm(True, lora_dropout=dropout)
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return ops.lora_linear(*args, **kwargs)

    ids = BATCHES[dist.get_rank(group)]
    torch.manual_seed(dist.get_rank(group))
    with mock.patch.object(collm_fast.peft, "lora_linear", counted):
        model(ids, labels=ids).loss.backward()
    sharded = sum(isinstance(p, DTensor) for p in model.parameters())
    return {name: p.grad.full_tensor() for name, p in adapters(model)}, len(calls), sharded


def both(dropout: float) -> dict[str, Tensor]:
    """The mean of what each rank's batch gives on one process."""
    model, found = llm(True, lora_dropout=dropout), []
    for rank, ids in enumerate(BATCHES):
        torch.manual_seed(rank)
        found.append(gradients(model, ids))
    return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ddp_gives_the_gradients_of_one_process(ranks: Ranks, dropout: float) -> None:
    expected = both(dropout)
    for result in ranks(2, "rank_ddp", dropout):
        for name, grad in expected.items():
            assert (result[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fsdp2_gives_the_gradients_of_one_process(ranks: Ranks, dropout: float) -> None:
    expected = both(dropout)
    for result, calls, sharded in ranks(2, "rank_fsdp", dropout):
        assert calls == 6 and sharded > len(expected)
        for name, grad in expected.items():
            assert (result[name] - grad).norm() <= 1e-5 * grad.norm(), name

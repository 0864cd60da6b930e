"""Captured steps: everything but the capture itself runs here, and the passes that it would record wait for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from flex_on_cpu import flex_attention  # noqa: F401  (a fixture)
from small_llm import random_prompts
from small_loop import lora_model, mapper_model, options, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from collm_fast.config import TrainConfig
from collm_fast.data.packing import pack
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import lora_layers
from collm_fast.training import graphs
from collm_fast.training.graphs import Passed, StepGraphs
from collm_fast.training.loop import add_gradient
from collm_fast.training.stages import set_trainable


class Recorder:
    """Stands for the CUDA graph: calls again what was captured, and counts."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def first(self, run: Callable[[], Passed]) -> Passed:
        return run()

    def record(self, run: Callable[[], Passed]) -> Callable[[], Passed]:
        self.captured += 1

        def replay() -> Passed:
            self.replayed += 1
            return run()

        return replay


def stage_model(stage: str, **sizes: int) -> tuple[CoLLM, dict[str, torch.nn.Parameter]]:
    model = lora_model(0.2, **sizes) if stage == "lora" else mapper_model(**sizes)
    for place, (_, layer) in enumerate(lora_layers(model)):
        torch.nn.init.normal_(layer.lora_B, std=0.3, generator=torch.Generator().manual_seed(place))
    return model, set_trainable(model, stage)


def both_ways(
    model: CoLLM,
    parameters: dict[str, torch.nn.Parameter],
    captured: StepGraphs,
    prompts: Any,
    rows: Any,
    settings: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(captured, as usual): the loss, and each parameter's gradient, of one batch."""
    found = []
    for using in (captured, None):
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.zero_()
        loss = add_gradient(model, prompts, rows, settings, 5, using)
        found.append([loss.clone(), *(p.grad.clone() for p in parameters.values() if p.grad is not None)])
    return zip(*found, strict=True)


@pytest.mark.usefixtures("flex_attention")
@pytest.mark.parametrize("stage", ["lora", "cie"])
def test_gradients_are_those_of_the_uncaptured_step(tmp_path: Any, stage: str) -> None:
    prompts = random_prompts(0, groups=40, slots=stage == "cie")
    recorder = Recorder()
    model, parameters = stage_model(stage)
    captured = StepGraphs(model, parameters.values(), recorder)
    memory = [parameter.grad for parameter in parameters.values()]
    for step in range(12):
        rows = np.random.default_rng(step).permutation(len(prompts))[: 6 if step % 5 else 7]
        for budget in (10**6, 100):
            settings = options(tmp_path, share_prefix=bool(step % 2), tokens_per_batch=budget)
            for got, want in both_ways(model, parameters, captured, prompts, rows, settings):
                assert (got - want).norm() <= 2e-5 * want.norm()
    assert recorder.captured == captured.captured >= 3 and recorder.replayed > 2 * recorder.captured
    assert all(parameter.grad is kept for parameter, kept in zip(parameters.values(), memory, strict=True))


@pytest.mark.usefixtures("flex_attention")
def test_no_more_shapes_than_allowed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST", 1)
    prompts, recorder = random_prompts(0, groups=20, slots=False), Recorder()
    model, parameters = stage_model("lora")
    captured = StepGraphs(model, parameters.values(), recorder)
    for _ in range(3):
        for count in (2, 3):
            add_gradient(model, prompts, np.arange(count), options(tmp_path), 0, captured)
    assert captured.captured == recorder.captured == 1 and recorder.replayed == 2
    next(iter(parameters.values())).grad = None
    with pytest.raises(RuntimeError, match="cuda_graphs: expected gradients in the memory the graphs add to"):
        add_gradient(model, prompts, np.arange(2), options(tmp_path), 0, captured)
    captured.attach()
    add_gradient(model, prompts, np.arange(2), options(tmp_path), 0, captured)


@pytest.mark.usefixtures("flex_attention")
def test_a_stage_ends_as_without_graphs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: recorder)
    whole, expected = run(tmp_path / "plain", model=lora_model())
    found, parameters = run(tmp_path / "graphs", model=lora_model(), cuda_graphs=True)
    assert recorder.replayed > recorder.captured > 0
    np.testing.assert_allclose(found.history.loss, whole.history.loss, rtol=1e-4)
    for name, value in expected.items():
        assert (parameters[name] - value).norm() <= 1e-3 * value.norm()


def test_what_cannot_be_captured_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cuda_graphs: expected half precision on CUDA, and triton, got torch.float32"):
        run(tmp_path, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs: expected kv_cache_gb of 0, got a prefix cache"):
        StepGraphs(mapper_model(kv_cache_gb=0.1), [])
    model = mapper_model()
    assert model.decoder is not None
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "fixed_positions", False)
        with pytest.raises(ValueError, match="expected rotary frequencies that do not depend on a batch's length"):
            StepGraphs(model, [])

    class Other(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with monkeypatch.context() as patch:
        patch.setattr(model.llm.base_model.layers[1].mlp, "up_proj", Other(2, 2))
        with pytest.raises(ValueError, match="cuda_graphs: expected linear layers of plain weights, got Other"):
            StepGraphs(model, [])
    monkeypatch.setattr(model, "decoder", None)
    with pytest.raises(ValueError, match="cuda_graphs: expected a model with a decoder forward, got llama through"):
        StepGraphs(model, [])
    with pytest.raises(ValueError, match="cuda_graphs: expected true only without kv_cache_gb, got True"):
        TrainConfig(cuda_graphs=True, kv_cache_gb=1.0)
    assert dataclasses.replace(TrainConfig(), cuda_graphs=True).kv_cache_gb == 0


# What waits for a device: a graph cannot hold it, and a step is to do without.
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "unique_dim", "masked_select", "equal")


class OnlyWhatLiesThere(TorchDispatchMode):
    """Fails on an operator that would wait for a device, or reads a tensor that was not there before the pass.

    On a GPU the latter would be moved there: a capture records the move, and repeats it from memory long gone.
    """

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.there = {x.untyped_storage().data_ptr() for x in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in _WAITS, name
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.dim() and x.numel():
                assert x.untyped_storage().data_ptr() in self.there, (name, x)
        out = func(*args, **(kwargs or {}))
        self.there |= {x.untyped_storage().data_ptr() for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


@pytest.mark.usefixtures("flex_attention")
@pytest.mark.parametrize("stage", ["lora", "cie"])
def test_a_pass_reads_only_what_lies_on_the_device(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(0, groups=10, slots=stage == "cie")
    model, parameters = stage_model(stage)
    model.train()
    layout = model.layout(pack(prompts, np.arange(8)), padded=True)
    assert (layout.head is not None) is (stage == "cie") and all(p.grad is None for p in parameters.values())
    there = [*model.parameters(), *model.buffers(), *layout.tensors([None])]
    for name in ("numpy", "tolist", "cpu", "__bool__", "__array__"):
        monkeypatch.setattr(Tensor, name, lambda *a, name=name, **k: pytest.fail(f"a pass calls {name}"))
    with OnlyWhatLiesThere(there):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model.compute(layout), layout.batch.label)
        loss.backward()
    monkeypatch.undo()
    assert all(parameter.grad is not None for parameter in parameters.values())


@requires("cuda", "triton")
@pytest.mark.parametrize("stage", ["lora", "cie"])
def test_captured_on_a_gpu(tmp_path: Any, stage: str) -> None:
    """bfloat16: padding changes how products are cut, so that a captured step is right to bfloat16's rounding."""
    prompts = random_prompts(0, groups=60, slots=stage == "cie")
    model, parameters = stage_model(stage, head_dim=16)
    model.llm.to(torch.bfloat16)
    model.to("cuda")
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    captured = StepGraphs(model, parameters.values())
    settings = options(tmp_path, device=torch.device("cuda"))
    for step in range(6):
        rows = np.random.default_rng(step).permutation(len(prompts))[:16]
        for got, want in both_ways(model, parameters, captured, prompts, rows, settings):
            assert (got - want).norm() <= 2e-2 * want.norm()
    assert captured.captured >= 1

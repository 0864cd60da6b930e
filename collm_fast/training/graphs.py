"""Forward and backward passes on a GPU as CUDA graphs: one launch for all batches of one shape.

The kernels of a small model run shorter than their launches take. Batches are padded with tokens that nobody reads
(models/layout.py), so that few shapes occur. The first batch of a shape runs as usual, which also compiles and warms
up what it needs; the second is captured; later ones are copied into the captured one's tensors and replayed.
What has run is all but `CudaCapture`: on a GPU nothing of it has run yet. Floor F3.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_fast import _native
from collm_fast.data.packing import PackedBatch
from collm_fast.models import attention
from collm_fast.models.collm import CoLLM
from collm_fast.models.layout import Layout

# Shapes that are captured, at most; they share the memory of their passes, but each has its launches.
_MOST = 64


class Passed(NamedTuple):
    """What a forward and backward pass gave beside the gradients, on the device; the next pass overwrites it."""

    loss: Tensor  # [], the batch's mean loss times its weight
    logits: Tensor  # [B]


Run = Callable[[], Passed]


class Capture(Protocol):
    """How a pass is run before it is captured, and how it is captured."""

    def first(self, run: Run) -> Passed: ...

    def record(self, run: Run) -> Run:
        """Records the work of a call and returns what repeats it."""


class _Captured(NamedTuple):
    inputs: list[Tensor]
    weight: Tensor
    replay: Run


class StepGraphs:
    """Adds gradients of batches as `loss.backward()` does, from captured graphs where a batch's shape came before.

    Args:
        model: with a decoder forward of ours and without a prefix cache, whose keys lie somewhere else in every step.
        parameters: what trains. Their gradients get memory of their own here: fill it with zeros, never set it to None.
        capture: None: by CUDA graphs.
    Attributes: captured: the number of shapes that are.
    Raises: ValueError for a model that cannot be captured.
    """

    def __init__(self, model: CoLLM, parameters: Iterable[nn.Parameter], capture: Capture | None = None) -> None:
        reason = _obstacle(model)
        if reason is not None:
            raise ValueError(f"cuda_graphs: expected {reason}")
        assert model.decoder is not None
        self.model = model
        self.windows = sorted(set(model.decoder.windows), key=lambda window: window or 0)
        self.capture = CudaCapture(model.device) if capture is None else capture
        self._gradients = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]
        self.attach()
        self._met: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], _Captured] = {}

    @property
    def captured(self) -> int:
        return len(self._graphs)

    def attach(self) -> None:
        """Gives every parameter the memory that the graphs add its gradient to."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def add_gradient(self, batch: PackedBatch, weight: float) -> Passed:
        """Adds weight times the gradient of the batch's mean loss.

        Raises: RuntimeError where a parameter's gradient is no longer the memory that it got.
        """
        if any(parameter.grad is not gradient for parameter, gradient in self._gradients):
            raise RuntimeError("cuda_graphs: expected gradients in the memory the graphs add to, got others")
        layout = self.model.layout(batch, padded=True)
        shape = layout.shape
        found = self._graphs.get(shape)
        if found is None:
            fraction = torch.full((), weight, device=self.model.device)
            if shape not in self._met or len(self._graphs) == _MOST:
                self._met.add(shape)
                return self.capture.first(lambda: self._run(layout, fraction))
            inputs = layout.tensors(self.windows)
            replay = self.capture.record(lambda: self._run(layout, fraction))
            found = self._graphs[shape] = _Captured(inputs, fraction, replay)
        else:
            torch._foreach_copy_(found.inputs, layout.tensors(self.windows))
            found.weight.fill_(weight)
        return found.replay()

    def _run(self, layout: Layout, weight: Tensor) -> Passed:
        logits = self.model.compute(layout)
        loss = weight * binary_cross_entropy_with_logits(logits, layout.batch.label)
        loss.backward()
        return Passed(loss.detach(), logits.detach())


def _obstacle(model: CoLLM) -> str | None:
    """What keeps a model from being captured, as the rest of a sentence; None where nothing does."""
    if not model.packed or model.decoder is None:
        return f"a model with a decoder forward, got {model.llm.config.model_type} through its own"
    if model.prefixes is not None:
        return "kv_cache_gb of 0, got a prefix cache"
    if not model.decoder.fixed_positions:
        return "rotary frequencies that do not depend on a batch's length, got others"
    # Their forward may depend on all rows of a batch (int8's outliers), those that fill it up too, or read the device.
    others = {type(m).__name__ for m in model.llm.modules() if _multiplies_its_own_way(m)}
    if others:
        return f"linear layers of plain weights, got {', '.join(sorted(others))}"
    device = model.device.type
    plain = [op for op in ("embed_inject", "gather_rows") if _native.backends[op].get(device) == "reference"]
    if plain and device == "cuda":
        return f"compiled kernels or Triton for {' and '.join(plain)}, got plain torch"
    query = model.table.new_empty(0, model.decoder.base.layers[0].self_attn.head_dim)
    if attention.kernel_of(query) != "flex":
        return f"half precision on CUDA, and triton, got {query.dtype} on {query.device}"
    return None


def _multiplies_its_own_way(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


class CudaCapture:
    """CUDA graphs on one stream and out of one pool of memory: they never run at the same time.

    What runs before a capture runs on that stream, too: autograd's nodes remember the stream they were made on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def first(self, run: Run) -> Passed:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            passed = run()
        current.wait_stream(self.stream)
        return passed

    def record(self, run: Run) -> Run:
        # What is left of earlier passes must not end while a capture is under way.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            passed = run()

        def replay() -> Passed:
            with torch.cuda.device(self.device):
                graph.replay()
            return passed

        return replay

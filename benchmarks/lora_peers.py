"""LoRA as other projects formulate it, each in plain torch calls: what `bench_lora.py` compares beside PEFT.

Here: in which order the products run, and what is kept for backward, as their papers and documentation describe it;
no code of theirs. What their own fused kernels add on a GPU is not in it. Not here: PEFT's layer and the timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def _products(
    x: Tensor, of_lora: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(x W^T + scaling s B^T, s = of_lora A^T) in the dtype of x."""
    s = linear(of_lora, lora_A.to(x.dtype))
    return linear(x, weight).addmm_(s, lora_B.to(x.dtype).t(), alpha=scaling), s


class Unsloth(torch.autograd.Function):
    """y = x W^T + scaling (x A^T) B^T with its backward by hand: keeps x alone, and computes x A^T twice. No dropout.

    Source: github.com/unslothai/unsloth, the description of its LoRA kernels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return _products(x, x, weight, lora_A, lora_B, scaling)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        A, B, dA, dB = lora_A.to(x.dtype), lora_B.to(x.dtype), None, None
        ds = dy @ B
        if ctx.needs_input_grad[2]:
            dA = (ds.t() @ x).mul_(ctx.scaling).to(lora_A.dtype)
            dB = (dy.t() @ linear(x, A)).mul_(ctx.scaling).to(lora_B.dtype)
        return (dy @ weight).addmm_(ds, A, alpha=ctx.scaling), None, dA, dB, None


class Axolotl(torch.autograd.Function):
    """y = x W^T + scaling (d A^T) B^T with its backward by hand, d = dropout(x) made outside: keeps d.

    The projections of one x share d, and so one mask. Source: docs.axolotl.ai, LoRA optimizations.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(dropped, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return _products(x, dropped, weight, lora_A, lora_B, scaling)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, weight, lora_A, lora_B = ctx.saved_tensors
        A, B, dA, dB = lora_A.to(dy.dtype), lora_B.to(dy.dtype), None, None
        ds = (dy @ B).mul_(ctx.scaling)
        if ctx.needs_input_grad[3]:
            dA = (ds.t() @ dropped).to(lora_A.dtype)
            dB = (dy.t() @ linear(dropped, A)).mul_(ctx.scaling).to(lora_B.dtype)
        return dy @ weight, ds @ A, None, dA, dB, None


class LoRAFusion(torch.autograd.Function):
    """The split of LoRAFusion: dropout with x A^T, the rest with the frozen product. Keeps mask, masked x and x A^T.

    Source: Zhu et al., LoRAFusion: Efficient LoRA fine-tuning for LLMs (arXiv 2510.00206), section 4.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, p: float
    ) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        dropped = (x * mask).mul_(1 / (1 - p))
        y, s = _products(x, dropped, weight, lora_A, lora_B, scaling)
        ctx.save_for_backward(mask, dropped, s, weight, lora_A, lora_B)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mask, dropped, s, weight, lora_A, lora_B = ctx.saved_tensors
        A, B, dA, dB = lora_A.to(dy.dtype), lora_B.to(dy.dtype), None, None
        ds = (dy @ B).mul_(ctx.scaling)
        if ctx.needs_input_grad[2]:
            dA, dB = (ds.t() @ dropped).to(lora_A.dtype), (dy.t() @ s).mul_(ctx.scaling).to(lora_B.dtype)
        dx = (ds @ A).mul_(mask).mul_(1 / (1 - ctx.p)).add_(dy @ weight)
        return dx, None, dA, dB, None, None


def formulations(weight: Tensor, scaling: float, p: float) -> dict[str, Call]:
    """Each formulation that serves this dropout, as a function of x, lora_A and lora_B."""
    found: dict[str, Call] = {
        "axolotl-way": lambda x, A, B: Axolotl.apply(x, dropout(x, p), weight, A, B, scaling),
        "lorafusion-way": lambda x, A, B: LoRAFusion.apply(x, weight, A, B, scaling, p),
    }
    if p == 0.0:
        found["unsloth-way"] = lambda x, A, B: Unsloth.apply(x, weight, A, B, scaling)
    return found


def kept_bytes(run: Callable[[], object], rows: int) -> int:
    """Bytes that autograd keeps for the backward of a call: each storage once, of tensors with that many rows.

    No side of a weight or an adapter may have that length: these are there anyway.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if rows in tensor.shape:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())

"""Autograd formulas of ops: registered with torch.library, and called without its detour by the public functions.

What torch.library generates costs 4 us of Python a call without a gradient and 40 with one and its backward (Xeon, one
thread): more than a small gather. The formulas are the same either way. Floor F1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.autograd import supports_tensorlist

from collm_fast import _native

# Straight to the kernel of the device, as the generated code itself does it once it knows that there is no gradient.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_transforms_active = torch._C._are_functorch_transforms_active


def register_autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> Callable[..., Any]:
    """Registers the autograd formula of `collm_fast::name`.

    Args: backward, setup: as for torch.library.register_autograd.
    Returns: a function that does what the op does, in less time where nothing is traced or transformed.
    """
    torch.library.register_autograd(f"collm_fast::{name}", backward, setup_context=setup, lib=_native.LIBRARY)
    op = getattr(torch.ops.collm_fast, name).default

    def plain(*inputs: Any) -> Any:
        with _below_autograd():
            result = op(*inputs)
        return result

    def forward(ctx: Any, *inputs: Any) -> Any:
        # Not the `setup_context` of a Function: torch would bind the arguments by their signature, at each call.
        result = plain(*inputs)
        setup(ctx, inputs, result)
        return result

    formula: Any = type(
        f"{name}_formula",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    if "Tensor[]" in str(op._schema):
        # A Function sees the tensors among its arguments alone, not those in a list.
        formula = supports_tensorlist(formula)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or _transforms_active():
            result = op(*inputs)
        elif torch.is_grad_enabled() and _any_requires_grad(*inputs):
            result = formula.apply(*inputs)
        else:
            result = plain(*inputs)
        return result

    return call

"""Autograd formulas of ops: registered with torch.library, and called without its detour by the public functions.

What torch.library generates costs 4 us of Python a call without a gradient and 40 with one and its backward (Xeon, one
thread): more than a small gather. The formulas are the same either way. Floor F1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from collm_fast import _native

# Straight to the kernel of the device, as the generated code itself does it once it knows that there is no gradient.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_transforms_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


def register_autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> Callable[..., Any]:
    """Registers the autograd formula of `collm_fast::name`.

    Args: backward, setup: as for torch.library.register_autograd.
    Returns: a function that does what the op does, in less time where nothing is traced or transformed.
    """
    torch.library.register_autograd(f"collm_fast::{name}", backward, setup_context=setup, lib=_native.LIBRARY)
    op = getattr(torch.ops.collm_fast, name).default

    def plain(*inputs: Any) -> Any:
        with _below_autograd():
            return op(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        # Not the `setup_context` of a Function: torch would bind the arguments by their signature, at each call.
        result = plain(*inputs)
        setup(ctx, inputs, result)
        return result

    lists = "Tensor[]" in str(op._schema)
    methods = _with_lists(forward, backward) if lists else (forward, backward)
    names = ("forward", "backward")
    body = {name_: staticmethod(method) for name_, method in zip(names, methods, strict=True)}
    formula: Any = type(f"{name}_formula", (torch.autograd.Function,), body)
    # What Function.apply comes to where no transform is active.
    apply = super(torch.autograd.Function, formula).apply

    def call(*inputs: Any) -> Any:
        if _is_compiling() or _transforms_active():
            return op(*inputs)
        if not (_is_grad_enabled() and _any_requires_grad(*inputs)):
            return plain(*inputs)
        if lists:
            layout = [_lengths(inputs)]
            return _split(apply(layout, *_joined(inputs)), layout[1])
        return apply(*inputs)

    return call


# A Function sees the tensors among its arguments and results alone, not those in a list: lists are laid side by side.
# A layout says how they are cut again: the length of a list, or None for a value that is none.
_Lengths = tuple[int | None, ...]


def _with_lists(forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The two methods over [layout of the inputs] and what it cuts; forward appends the layout of the results."""

    def forward_flat(ctx: Any, layout: list[_Lengths], *flat: Any) -> tuple[Any, ...]:
        result = forward(ctx, *_split(flat, layout[0]))
        layout.append(_lengths(result))
        ctx.layout = layout
        return tuple(_joined(result))

    def backward_flat(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        inputs, outputs = ctx.layout
        needs = ctx.needs_input_grad
        try:
            ctx.needs_input_grad = _split(needs[1:], inputs)
            found = backward(ctx, *_split(grads, outputs))
        finally:
            ctx.needs_input_grad = needs
        whole = [
            [None] * length if part is None and length is not None else part
            for part, length in zip(found, inputs, strict=True)
        ]
        return None, *_joined(whole)

    return forward_flat, backward_flat


def _lengths(values: Sequence[Any]) -> _Lengths:
    return tuple(len(value) if isinstance(value, list) else None for value in values)


def _joined(values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list):
            flat += value
        else:
            flat.append(value)
    return flat


def _split(flat: Sequence[Any], lengths: _Lengths) -> list[Any]:
    values: list[Any] = []
    at = 0
    for length in lengths:
        values.append(flat[at] if length is None else list(flat[at : at + length]))
        at += 1 if length is None else length
    return values

"""What the ops share before and around their kernels: the sentence of an error, the seed, the way around autocast.

Not here: what each op asks of its arguments. Floor F1.
"""

from __future__ import annotations

import numbers
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require(ok: bool, op: str, rule: str, got: object) -> None:
    """The sentence of csrc/checks.h. `got` is formatted only when it is needed: this runs at every call."""
    if not ok:
        if isinstance(got, Tensor):
            got = list(got.shape)
        raise ValueError(f"{op}: expected {rule}, got {dtype_name(got) if isinstance(got, torch.dtype) else got}")


def seed_tensor(op: str, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """A seed as the registered ops take it: a tensor as it is, any integer (NumPy's too) as one int64 on the device."""
    if seed is None or isinstance(seed, Tensor):
        return seed
    if not isinstance(seed, int | torch.SymInt):
        require(isinstance(seed, numbers.Integral), op, "seed None, an int or an int64 tensor", repr(seed))
        seed = int(seed)
    require(-(2**63) <= seed < 2**63, op, "seed in [-2^63, 2^63)", seed)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def without_autocast() -> AbstractContextManager[Any]:
    """For code that has chosen its dtypes: a formula of autograd, and an implementation in plain torch.

    The tensor's own autocast call has run by then; a second one would round what the first one did not.
    """
    guard: AbstractContextManager[Any] = torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)
    return guard

"""What every Triton launcher needs of its device: the guard, and the report of a value that is out of range.

Imports torch and triton only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def report(record, value, limit):
    """Fills a record ([3] int64: raised, value, limit) in memory that host and device both see.

    The stores need no fence: the host that sees `raised` waits for the device before it reads the rest.
    """
    tl.store(record + 1, value)
    tl.store(record + 2, limit)
    tl.store(record, 1)


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """The guard around a launch: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()

"""What a kernel on a GPU found wrong with values that only the device knows, raised without making a step wait.

A kernel that meets an id out of range reports it in pinned memory and goes on. The report is raised as the op's usual
sentence by the next collm_fast op on CUDA tensors, or by `check_device_errors`, which belongs where a program
synchronises anyway (`loss.item()`). The compiled half is csrc/cuda/device_error.h; this module holds the Triton half.
Floor F1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collm_fast import _native

# One row for each rule: raised, value, limit. The compiled kernels keep such a table of their own.
_RULES: list[str] = []
_MAX_RULES = 32
_records: dict[str, Tensor] = {}

_native.LIBRARY.define("check_device_errors() -> ()")


def error_records(rules: Sequence[str], device: torch.device) -> Tensor:
    """[len(rules), 3] int64: the records of rules that a Triton kernel may fill; a rule ends where the limit follows.

    A CUDA kernel writes pinned memory, so that reading a record waits for nothing.
    """
    table = _records.get(device.type)
    if table is None:
        table = torch.zeros(_MAX_RULES, 3, dtype=torch.int64, pin_memory=device.type == "cuda")
        _records[device.type] = table
    if rules[0] not in _RULES:
        if len(_RULES) + len(rules) > _MAX_RULES:
            raise RuntimeError("error_records: more rules than records")
        _RULES.extend(rules)
    first = _RULES.index(rules[0])
    return table[first : first + len(rules)]


def error_record(rule: str, device: torch.device) -> Tensor:
    """[3] int64: the record of a single rule."""
    return error_records((rule,), device)[0]


def raise_device_errors() -> None:
    """Raises the first report of a Triton kernel that has arrived, and clears it. Waits for nothing."""
    for table in _records.values():
        for rule, record in zip(_RULES, table, strict=False):
            raised, value, limit = record.tolist()
            if raised:
                record.zero_()
                raise ValueError(f"{rule}{limit}), got {value}")


def check_device_errors(synchronize: bool = False) -> None:
    """Raises what kernels on a GPU have reported so far, as the sentence the CPU would have raised at once.

    Args: synchronize: wait for the device first, so that nothing is still under way.
    Raises: ValueError `<op>: expected <rule>, got <value>`.
    """
    if synchronize and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    raise_device_errors()
    # Only the CUDA library registers this op; it raises for the compiled kernels.
    if torch._C._dispatch_has_kernel_for_dispatch_key("collm_fast::check_device_errors", "CompositeExplicitAutograd"):
        torch.ops.collm_fast.check_device_errors()

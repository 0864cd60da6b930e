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
# The GPUs whose kernels were given a record.
_devices: set[int] = set()

_native.LIBRARY.define("check_device_errors(bool synchronize=False) -> ()")


def error_records(rules: Sequence[str], device: torch.device) -> Tensor:
    """[len(rules), 3] int64: the records of rules that a Triton kernel may fill; a rule ends where the limit follows.

    A CUDA kernel writes pinned memory, so that reading a record waits for nothing.
    """
    if device.type == "cuda":
        _devices.add(torch.cuda.current_device() if device.index is None else device.index)
    table = _records.get(device.type)
    if table is None:
        # A table made in inference mode could not be cleared outside of it.
        with torch.inference_mode(False):
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


def _wait_for_reports() -> None:
    for device in _devices:
        torch.cuda.synchronize(device)


def raise_device_errors() -> None:
    """Raises the first report of a Triton kernel that has arrived, and clears all. Waits only where there is one.

    One fault raises once and with its own number: kernels that read the same bad value may still be under way, so
    their devices are waited for before the record is read.
    """
    for device, table in _records.items():
        if not bool(table[:, 0].any()):
            continue
        if device == "cuda":
            _wait_for_reports()
        rule, (_, value, limit) = next(pair for pair in zip(_RULES, table.tolist(), strict=False) if pair[1][0])
        for other in _records.values():
            other.zero_()
        raise ValueError(f"{rule}{limit}), got {value}")


def check_device_errors(synchronize: bool = False) -> None:
    """Raises what kernels on a GPU have reported so far, as the sentence the CPU would have raised at once.

    Without a kernel that could have reported it costs next to nothing, and it never initialises CUDA.

    Args: synchronize: wait first for every GPU that ran a kernel of this package, so that nothing is under way.
    Raises: ValueError `<op>: expected <rule>, got <value>`.
    """
    if synchronize:
        _wait_for_reports()
    raise_device_errors()
    # Only the CUDA library registers this op; it waits and raises for the compiled kernels.
    if torch._C._dispatch_has_kernel_for_dispatch_key("collm_fast::check_device_errors", "CompositeExplicitAutograd"):
        torch.ops.collm_fast.check_device_errors(synchronize)

"""The resident memory of a long training: whether it grows with the steps. Timing is `bench_train.py`'s matter."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import machine
import numpy as np
import torch

SETTLED = 50  # steps after which the allocator has met batches of about every size
EVERY = 10


def watch(step: Callable[[int], object], count: int, device: torch.device) -> dict[str, Any]:
    """Runs `step(0)` to `step(count - 1)` and reads the process's memory every 10 steps.

    Returns: {"steps", "every", "bytes": [after each 10 steps], "peak_bytes": [the highest of each 10 steps],
        "growth_bytes", "growth_bytes_per_step", "halves_peak_bytes"}: the growth of `bytes` from step 50 to the end
        (null for fewer steps than 60), the slope of a line fitted to that part, and the highest peak of its halves.
    """
    seen: list[int] = []
    peaks: list[int] = []
    for number in range(count):
        if number % EVERY == 0:
            _reset_peak(device)
        step(number)
        if (number + 1) % EVERY == 0:
            gc.collect()
            now, peak = _memory(device)
            seen.append(now)
            peaks.append(peak)
    late = np.array(seen[SETTLED // EVERY - 1 :], np.float64)
    enough = len(late) > 1
    slope = np.polyfit(np.arange(len(late)) * EVERY, late, 1)[0] if enough else None
    settled = peaks[SETTLED // EVERY - 1 :]
    half = len(settled) // 2
    return {
        "steps": count,
        "every": EVERY,
        "bytes": seen,
        "peak_bytes": peaks,
        "growth_bytes": int(late[-1] - late[0]) if enough else None,
        "growth_bytes_per_step": float(slope) if slope is not None else None,
        "halves_peak_bytes": [max(settled[:half]), max(settled[half:])] if enough else None,
    }


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        machine.reset_mark()


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes now, and at the highest point since the mark was reset."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return machine.resident("VmRSS"), machine.resident("VmHWM")

"""The resident memory of a long training: whether it grows with the steps. Timing is `bench_train.py`'s matter."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SETTLED = 50  # steps after which the allocator has met batches of about every size
EVERY = 10


def watch(step: Callable[[int], object], count: int, device: torch.device) -> dict[str, Any]:
    """Runs `step(0)` to `step(count - 1)` and reads the process's memory every 10 steps.

    Returns: {"steps", "every", "bytes": [after each 10 steps], "growth_bytes", "growth_bytes_per_step"}: the growth
        from step 50 to the end (null for fewer steps than 60), and the slope of a line fitted to that part.
    """
    seen: list[int] = []
    for number in range(count):
        step(number)
        if (number + 1) % EVERY == 0:
            gc.collect()
            seen.append(_memory(device))
    late = np.array(seen[SETTLED // EVERY - 1 :], np.float64)
    enough = len(late) > 1
    slope = np.polyfit(np.arange(len(late)) * EVERY, late, 1)[0] if enough else None
    return {
        "steps": count,
        "every": EVERY,
        "bytes": seen,
        "growth_bytes": int(late[-1] - late[0]) if enough else None,
        "growth_bytes_per_step": float(slope) if slope is not None else None,
    }


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

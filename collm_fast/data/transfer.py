"""From the CPU to a device without waiting for it. Floor F2."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device; a GPU copies it when it gets there, from pinned memory.

    From pageable memory the driver may wait for everything that is under way before it copies.
    """
    if torch.device(device).type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)

"""A network that is only a clock: what an exchange of sharded_propagate costs where a card does the sending.

Used by `distributed.py`. Between processes of one machine the cores themselves do the sending, and nothing can hide.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Link:
    """A network that carries no data and takes its time.

    A rank's exchanges follow each other at `speed` bytes a second each way; an infinite speed leaves the sums alone.
    """

    def __init__(self, speed: float) -> None:
        self.speed, self.free = speed, 0.0

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Inside, halos travel over this link: layers read whatever lies there. Small messages are sent as ever."""
        send = dist.all_to_all_single

        def exchange_over(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **options: Any) -> Any:
            if not async_op:
                return send(output, input, *args, **options)
            self.free = max(self.free, time.perf_counter()) + max(output.nbytes, input.nbytes) / self.speed
            return _Arrival(self.free)

        dist.all_to_all_single = exchange_over
        # What lies there may be subnormal numbers, which are slow to add.
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            dist.all_to_all_single = send
            torch.set_flush_denormal(False)


@dataclass
class _Arrival:
    """An exchange that is over at a moment."""

    moment: float

    def wait(self) -> None:
        time.sleep(max(0.0, self.moment - time.perf_counter()))

"""Optimizer steps, and their losses: read at once on a CPU, a step later on a GPU, where no step waits for the device.

Nothing is ever updated by what is not finite. Floor F3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from collm_fast.ops import check_device_errors
from collm_fast.training.state import StageState


class _Taken(NamedTuple):
    step: int
    rows: np.ndarray
    values: Tensor  # [2] float64 on the CPU: loss and gradient norm
    written: torch.cuda.Event | None


class Updates:
    """Takes the optimizer steps of a stage and tells their losses in order.

    Args:
        stage: its name, for messages. clip_norm: the gradient's largest norm; None: any.
        late: whether a loss may be read once the next step is under way. The device then keeps a mark of what was not
            finite, which stops every later update until the loss is read; the optimizer is fused.
    """

    def __init__(self, stage: str, loop: StageState, clip_norm: float | None, *, late: bool) -> None:
        self.stage, self.loop, self.late = stage, loop, late
        self.limit = math.inf if clip_norm is None else clip_norm
        self.parameters = list(loop.parameters.values())
        self._waiting: list[_Taken] = []
        if late:
            # What GradScaler sets, too: the fused optimizer leaves parameters, moments and its count as they are.
            self._bad = torch.zeros((), device=self.parameters[0].device)
            loop.optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def take(self, loss: Tensor, rows: np.ndarray) -> None:
        """One step along the gradients there are, whose loss ([] float64, on the device) was of these rows."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        values, written = torch.stack((loss, norm.double())), None
        if self.late:
            torch.maximum(self._bad, 1 - values.isfinite().all().float(), out=self._bad)
            self.loop.optimizer.step()
            if values.device.type == "cuda":
                values = torch.empty(2, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
                written = torch.cuda.Event()
                written.record(torch.cuda.current_stream(norm.device))
        self._waiting.append(_Taken(self.loop.step, rows, values, written))
        if not self.late:
            self._check(self._waiting[0])
            self.loop.optimizer.step()

    def read(self, *, all_of_them: bool) -> Iterator[tuple[int, float]]:
        """(step, loss) of the steps not yet told; the latest may stay for the next call.

        Raises: FloatingPointError for a loss or gradient that is not finite, naming the step and the rows; ValueError
            for what a kernel found on the device.
        """
        while len(self._waiting) > (0 if all_of_them or not self.late else 1):
            taken = self._waiting.pop(0)
            if taken.written is not None:
                taken.written.synchronize()
            if self.late:
                self._check(taken)
            yield taken.step, float(taken.values[0])

    def _check(self, taken: _Taken) -> None:
        check_device_errors()
        for what, number in zip(("loss", "gradient"), taken.values.tolist(), strict=True):
            if not math.isfinite(number):
                raise _not_finite(self.stage, what, number, taken.step, taken.rows)


def _not_finite(stage: str, what: str, value: float, step: int, rows: np.ndarray) -> FloatingPointError:
    shown = f"{', '.join(map(str, rows[:16].tolist()))}{', ...' if rows.size > 16 else ''}"
    return FloatingPointError(
        f"{stage}: expected a finite {what}, got {value} at step {step}, rows {shown} of the training sample; "
        "a lower learning rate, --dtype float32 or a clip_norm may help"
    )

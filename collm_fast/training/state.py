"""Everything of a stage that changes with its steps, in memory and as a checkpoint; `loop.py` takes the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collm_fast.config import StageConfig
from collm_fast.io.checkpoints import Checkpoint
from collm_fast.metrics import Interval


@dataclass
class History:
    """Curves of a stage: the loss of every step, and the validation AUC of every evaluation.

    Where evaluations score a sample of the validation rows, also the 95 % interval of each AUC.
    """

    loss: list[float] = field(default_factory=list)
    eval_step: list[int] = field(default_factory=list)
    valid_auc: list[float] = field(default_factory=list)
    valid_low: list[float | None] = field(default_factory=list)
    valid_high: list[float | None] = field(default_factory=list)


@dataclass
class Candidate:
    """A state that may be the best one: its parameters, and what it scored."""

    step: int
    auc: float  # on the rows that every evaluation scores
    parameters: dict[str, Tensor]
    logits: Tensor  # of these rows
    half_width: float = 0.0  # of the interval of `auc`; 0 where these are all rows
    all_logits: Tensor | None = None  # of all validation rows, where these are more and were scored


class StageState:
    """Parameters, optimizer, place in the sample, the best states so far and curves; `restore` undoes `snapshot`.

    `kept` holds at most `candidates` states, best first. `fused` is AdamW's own: all parameters in one kernel.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        config: StageConfig,
        candidates: int = 1,
        *,
        fused: bool = False,
    ) -> None:
        self.parameters = parameters
        matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        trained = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, fused=fused or None)
        self.fused = fused
        self.step = self.epoch = self.position = self.waited = 0
        self.evaluated = -1
        self.limit = candidates
        self.kept: list[Candidate] = []
        self.history = History()

    def advance(self, batches_in_epoch: int) -> None:
        self.step += 1
        self.position += 1
        if self.position == batches_in_epoch:
            self.epoch, self.position = self.epoch + 1, 0

    def evaluation(self, auc: float, logits: np.ndarray, interval: Interval | None = None) -> None:
        """Record an evaluation of the current state, and keep the state where it is among the best."""
        self.evaluated = self.step
        self.history.eval_step.append(self.step)
        self.history.valid_auc.append(auc)
        half_width = 0.0
        if interval is not None:
            half_width = 0.5 * (interval.high - interval.low)
            self.history.valid_low.append(None if math.isnan(interval.low) else interval.low)
            self.history.valid_high.append(None if math.isnan(interval.high) else interval.high)
        # An untrained state is measured, never kept: a row of the table would show what no step was taken for.
        kept = [state for state in self.kept if state.step > 0]
        self.waited = 0 if not kept or auc > kept[0].auc else self.waited + 1
        if len(kept) < self.limit or auc > kept[-1].auc:
            best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            kept.append(Candidate(self.step, auc, best, torch.from_numpy(logits.copy()), half_width))
        self.kept = sorted(kept, key=lambda state: (-state.auc, state.step))[: self.limit]

    def candidates(self) -> list[Candidate]:
        """The kept states whose AUC is within the half width of the best one's interval of the best AUC."""
        best = self.kept[0]
        # "Not below": an interval that does not exist (nan) excludes nothing.
        return [state for state in self.kept if not state.auc < best.auc - best.half_width]

    def load(self, values: dict[str, Tensor]) -> None:
        """Give the parameters these values."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def snapshot(self) -> Checkpoint:
        tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        for place, kept in enumerate(self.kept):
            tensors |= {f"{_prefix(place)}.{name}": value for name, value in kept.parameters.items()}
            tensors[f"{_prefix(place)}_logits"] = kept.logits
            if kept.all_logits is not None:
                tensors[f"{_prefix(place)}_all_logits"] = kept.all_logits
        state = {
            "epoch": self.epoch,
            "position": self.position,
            "evaluated": self.evaluated,
            "waited": self.waited,
            "kept": [{"step": kept.step, "auc": kept.auc, "half_width": kept.half_width} for kept in self.kept],
            "history": vars(self.history),
        }
        return Checkpoint(self.step, tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        wanted = {f"parameter.{name}": tuple(value.shape) for name, value in self.parameters.items()}
        held = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith("parameter.")}
        if wanted != held:
            differing = sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))[0]
            raise ValueError(f"checkpoint: expected {differing} {wanted.get(differing)}, got {held.get(differing)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                state_of = {
                    key.split(".")[1]: value.clone()
                    for key, value in tensors.items()
                    if key.startswith("optimizer.") and key.split(".", 2)[2] == name
                }
                if state_of:
                    # AdamW keeps its moments beside the parameter, and its step count on the CPU where it is not fused.
                    stays = () if self.fused else ("step",)
                    moved = {k: v if k in stays else v.to(parameter.device) for k, v in state_of.items()}
                    self.optimizer.state[parameter] = moved
        self.step, self.epoch, self.position = checkpoint.step, state["epoch"], state["position"]
        self.evaluated, self.waited = state["evaluated"], state["waited"]
        self.kept = [self._kept(place, values, tensors) for place, values in enumerate(_kept_values(state))]
        self.history = History(**state["history"])
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])

    def _kept(self, place: int, values: dict[str, Any], tensors: dict[str, Tensor]) -> Candidate:
        prefix = _prefix(place)
        parameters = {
            name: tensors[f"{prefix}.{name}"].to(parameter.device) for name, parameter in self.parameters.items()
        }
        return Candidate(
            **values,
            parameters=parameters,
            logits=tensors[f"{prefix}_logits"],
            all_logits=tensors.get(f"{prefix}_all_logits"),
        )


def _prefix(place: int) -> str:
    return "best" if place == 0 else f"candidate{place}"


def _kept_values(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint says of the states in it; one of an earlier version holds the best state alone."""
    if "kept" in state:
        return list(state["kept"])
    return [] if state["best_auc"] is None else [{"step": state["best_step"], "auc": state["best_auc"]}]

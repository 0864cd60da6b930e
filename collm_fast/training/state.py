"""Everything of a stage that changes with its steps, in memory and as a checkpoint; `loop.py` takes the steps.."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from collm_fast.config import StageConfig
from collm_fast.io.checkpoints import Checkpoint


@dataclass
class History:
    """Curves of a stage: the loss of every step, and the validation AUC of every evaluation."""

    loss: list[float] = field(default_factory=list)
    eval_step: list[int] = field(default_factory=list)
    valid_auc: list[float] = field(default_factory=list)


class StageState:
    """Parameters, optimizer, place in the sample, best state so far and curves; `restore` undoes `snapshot`."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], config: StageConfig) -> None:
        self.parameters = parameters
        matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)
        self.step = self.epoch = self.position = self.waited = 0
        self.evaluated = -1
        self.best_step, self.best_auc = -1, -math.inf
        self.best: dict[str, Tensor] = {}
        self.best_logits = torch.empty(0)
        self.history = History()

    def advance(self, loss: float, batches_in_epoch: int) -> None:
        self.history.loss.append(loss)
        self.step += 1
        self.position += 1
        if self.position == batches_in_epoch:
            self.epoch, self.position = self.epoch + 1, 0

    def evaluation(self, auc: float, logits: np.ndarray) -> None:
        self.evaluated = self.step
        self.history.eval_step.append(self.step)
        self.history.valid_auc.append(auc)
        self.waited += 1
        # An untrained state is measured, never kept: a row of the table would show what no step was taken for.
        if auc > self.best_auc or self.best_step == 0:
            self.best_auc, self.best_step, self.waited = auc, self.step, 0
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            self.best_logits = torch.from_numpy(logits.copy())

    def load_best(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])

    def snapshot(self) -> Checkpoint:
        tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        if self.best:
            tensors |= {f"best.{name}": value for name, value in self.best.items()}
            tensors["best_logits"] = self.best_logits
        state = {
            "epoch": self.epoch,
            "position": self.position,
            "evaluated": self.evaluated,
            "waited": self.waited,
            "best_step": self.best_step,
            "best_auc": self.best_auc if self.best else None,
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
                    # AdamW keeps its step count on the CPU and its moments beside the parameter.
                    moved = {k: v if k == "step" else v.to(parameter.device) for k, v in state_of.items()}
                    self.optimizer.state[parameter] = moved
        self.step, self.epoch, self.position = checkpoint.step, state["epoch"], state["position"]
        self.evaluated, self.waited = state["evaluated"], state["waited"]
        self.best_step = state["best_step"]
        self.best_auc = -math.inf if state["best_auc"] is None else state["best_auc"]
        self.best = {
            name: tensors[f"best.{name}"].to(parameter.device)
            for name, parameter in self.parameters.items()
            if f"best.{name}" in tensors
        }
        self.best_logits = tensors.get("best_logits", torch.empty(0))
        self.history = History(**state["history"])
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])

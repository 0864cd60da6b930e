"""The validation rows during a stage: all of them each time, or a sample each time and all for the states near the top.

Which states are kept is `state.py`'s matter, when to evaluate `loop.py`'s. Floor F3.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collm_fast import evaluate, metrics
from collm_fast.data.prompts import Prompts
from collm_fast.metrics import Interval
from collm_fast.models.collm import CoLLM
from collm_fast.training.state import Candidate, StageState

logger = logging.getLogger(__name__)

# How many states are scored on all rows at most, where evaluations score a sample.
CANDIDATES = 3


@dataclass(frozen=True)
class Validation:
    """Scores the validation rows of one stage.

    Args:
        stage: its name. rows: all of them.
        sample: positions in `rows` that an evaluation scores; None: all. seed: of the sample's bootstrap.
        score: the prompts' logits; it may raise to give up.
    Raises: ValueError for rows, or a sample, of one class.
    """

    stage: str
    rows: Prompts
    sample: NDArray[np.int64] | None
    seed: int
    score: Callable[[CoLLM, Prompts], NDArray[np.float32]]

    def __post_init__(self) -> None:
        for name, label in (("validation rows", self.rows.label), ("a validation sample", self.seen.label)):
            if len(set(label.tolist())) < 2:
                raise ValueError(f"{self.stage}: expected {name} of both labels, got {label.size} of one")

    @property
    def seen(self) -> Prompts:
        """The rows that an evaluation scores."""
        return self.rows if self.sample is None else self.rows.take(self.sample)

    @property
    def candidates(self) -> int:
        """How many states a stage keeps until its end."""
        return 1 if self.sample is None else CANDIDATES

    def evaluate(self, model: CoLLM, loop: StageState) -> tuple[float, Interval | None]:
        """Score the current state, let `loop` keep it where it is among the best; its AUC and, of a sample, interval.

        Raises: FloatingPointError for a score that is not finite.
        """
        rows = self.seen
        logits = self.score(model, rows)
        check_finite(self.stage, "validation", logits, loop.step)
        auc, interval = metrics.auc(logits, rows.label).value, None
        if self.sample is not None:
            drawn = metrics.bootstrap(rows.uid, logits, rows.label, samples=evaluate.BOOTSTRAP_SAMPLES, seed=self.seed)
            interval = drawn.auc
        loop.evaluation(auc, logits, interval)
        return auc, interval

    def choose(self, model: CoLLM, loop: StageState, save: Callable[[], None]) -> Candidate:
        """The best state; the model ends with its parameters.

        With a sample: every state that `StageState.candidates` names is scored on all rows, and `save` is called after
        each; the highest AUC wins, of equal ones the one with the higher AUC on the sample.
        """
        if self.sample is None:
            best = loop.kept[0]
        else:
            last = {name: value.detach().clone() for name, value in loop.parameters.items()}
            for state in loop.candidates():
                if state.all_logits is None:
                    loop.load(state.parameters)
                    try:
                        logits = self.score(model, self.rows)
                    finally:
                        # What is saved, now or by whom this is left to, is the state that the steps ended with.
                        loop.load(last)
                    check_finite(self.stage, "validation", logits, state.step)
                    state.all_logits = torch.from_numpy(logits)
                    save()
            best = max(loop.candidates(), key=lambda state: self.auc(state))
        loop.load(best.parameters)
        return best

    def auc(self, state: Candidate) -> float:
        """A candidate's AUC on all rows."""
        logits = state.logits if self.sample is None else state.all_logits
        assert logits is not None
        return metrics.auc(logits.numpy(), self.rows.label).value

    def record(self, loop: StageState, best: Candidate) -> dict[str, Any] | None:
        """What run.json says of the sample: its rows, the kept state's AUC on it, the states scored on all rows."""
        if self.sample is None:
            return None
        at = loop.history.eval_step.index(best.step)
        scored = [{"step": state.step, "sample_auc": state.auc, "auc": self.auc(state)} for state in loop.candidates()]
        width = loop.kept[0].half_width
        logger.info(
            "%s: %d of %d evaluated states scored on all %d validation rows; that of step %d is the best, AUC %.4f",
            *(self.stage, len(scored), len(loop.history.eval_step), len(self.rows), best.step, self.auc(best)),
        )
        return {
            "rows": int(self.sample.size),
            "auc": best.auc,
            "auc_low": loop.history.valid_low[at],
            "auc_high": loop.history.valid_high[at],
            "margin": None if math.isnan(width) else width,
            "evaluations": len(loop.history.eval_step),
            "scored_on_all_rows": scored,
        }


def check_finite(stage: str, sample: str, logits: NDArray[np.float32], step: int) -> None:
    """Raises: FloatingPointError that names the first row whose score is not finite."""
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise FloatingPointError(
            f"{stage}: expected finite {sample} scores, got {logits[bad]} at step {step}, "
            f"row {bad} of the {sample} sample"
        )

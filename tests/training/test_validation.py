"""Evaluations on a sample of the validation rows: what is kept, what is scored on all rows, and no bit lost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from small_llm import random_prompts
from small_loop import CONFIG, StopAfter, run

from collm_fast import metrics
from collm_fast.config import StageConfig
from collm_fast.io import checkpoints
from collm_fast.metrics import Interval
from collm_fast.training import loop
from collm_fast.training.interrupt import Interrupted, Stop
from collm_fast.training.state import StageState

VALID = random_prompts(1, groups=12, slots=False)
SAMPLE = np.flatnonzero(VALID.group < 6)
QUICK = dataclasses.replace(CONFIG, eval_every=2)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collm_fast.evaluate.BOOTSTRAP_SAMPLES", 20)


def state_after(values: list[float], candidates: int, half_width: float) -> StageState:
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    state = StageState({"x": parameter}, StageConfig(), candidates)
    for place, auc in enumerate(values):
        state.step = 10 * place
        parameter.data.fill_(place)
        state.evaluation(auc, np.full(3, auc, np.float32), Interval(auc - half_width, auc + half_width))
    return state


def test_the_best_states_are_kept_with_what_they_scored_and_ties_go_to_the_earlier() -> None:
    state = state_after([0.9, 0.60, 0.58, 0.62, 0.60, 0.62, 0.50], 3, 0.015)
    assert [(kept.step, kept.auc) for kept in state.kept] == [(30, 0.62), (50, 0.62), (10, 0.60)]
    assert [float(kept.parameters["x"][0, 0]) for kept in state.kept] == [3, 5, 1]
    assert [float(kept.logits[0]) for kept in state.kept] == pytest.approx([0.62, 0.62, 0.60])
    assert state.waited == 3 and state.history.valid_low[3] == pytest.approx(0.605)
    # .60 is .02 below the best one, farther than half the width of its interval.
    assert [kept.step for kept in state.candidates()] == [30, 50]
    assert [kept.step for kept in state_after([0.9, 0.60, 0.62], 3, 0.021).candidates()] == [20, 10]
    assert [kept.step for kept in state_after([0.9, 0.60, 0.62], 3, math.nan).candidates()] == [20, 10]
    assert state_after([0.5], 3, math.nan).history.valid_low == [None]
    assert [kept.step for kept in state_after([0.9, 0.60, 0.62, 0.62], 1, 0.0).kept] == [20]


def test_evaluations_score_the_sample_and_the_candidates_are_scored_on_all_rows(tmp_path, monkeypatch) -> None:
    real, sizes = loop.score_prompts, []

    def counting(model, prompts, **options):
        sizes.append(len(prompts))
        return real(model, prompts, **options)

    monkeypatch.setattr(loop, "score_prompts", counting)
    everything, _ = run(tmp_path / "all", config=QUICK, valid=VALID)
    sizes.clear()
    result, parameters = run(tmp_path / "sample", config=QUICK, valid=VALID, sample=SAMPLE)
    scored = result.interim["scored_on_all_rows"]
    assert sizes == [SAMPLE.size] * len(result.history.eval_step) + [len(VALID)] * len(scored)
    assert 1 < len(scored) <= 3 and result.interim["rows"] == SAMPLE.size < len(VALID)
    # The steps are the same, so the other run says what each state scores on all rows.
    assert result.history.loss == everything.history.loss
    truth = dict(zip(everything.history.eval_step, everything.history.valid_auc, strict=True))
    on_sample = dict(zip(result.history.eval_step, result.history.valid_auc, strict=True))
    for state in scored:
        assert state["auc"] == truth[state["step"]] and state["sample_auc"] == on_sample[state["step"]]
    assert result.best_auc == max(state["auc"] for state in scored) == truth[result.best_step]
    top = sorted((auc for step, auc in on_sample.items() if step), reverse=True)[0]
    assert all(state["sample_auc"] >= top - result.interim["margin"] for state in scored)
    assert result.valid_logits.shape == (len(VALID),)
    assert metrics.auc(result.valid_logits, VALID.label).value == result.best_auc
    curves = result.history
    for low, value, high in zip(curves.valid_low, curves.valid_auc, curves.valid_high, strict=True):
        assert low <= value <= high and low < high
    kept = {state["step"] for state in checkpoints.latest(tmp_path / "sample").state["kept"]}
    assert kept >= {state["step"] for state in scored} and len(kept) == 3
    assert {int(path.stem) for path in (tmp_path / "sample").iterdir()} == {result.steps} | kept
    best = checkpoints.load(tmp_path / "sample" / f"{result.best_step:08d}.safetensors")
    for name, value in parameters.items():
        assert torch.equal(value, best.tensors[f"parameter.{name}"])
    assert everything.interim is None and everything.history.valid_low == []


class Counting(Stop):
    """Counts how often the loop looks."""

    looks = 0

    @property
    def requested(self) -> bool:
        Counting.looks += 1
        return False

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def test_stopped_anywhere_and_continued_ends_with_the_same_bits(tmp_path) -> None:
    Counting.looks = 0
    arguments = {"config": QUICK, "valid": VALID, "sample": SAMPLE, "tokens_per_batch": 100}
    whole, expected = run(tmp_path / "whole", stop=Counting(), **arguments)
    looks = Counting.looks
    # From the first evaluation to the last batch of the last candidate.
    for place in (1, looks // 2, looks - 8, looks - 1):
        folder = tmp_path / str(place)
        with pytest.raises(Interrupted):
            run(folder, stop=StopAfter(place), **arguments)
        torch.manual_seed(12345)
        result, parameters = run(folder, resume=True, **arguments)
        assert (result.history, result.interim) == (whole.history, whole.interim)
        assert (result.best_step, result.best_auc, result.steps) == (whole.best_step, whole.best_auc, whole.steps)
        assert result.valid_logits.tobytes() == whole.valid_logits.tobytes()
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_a_finished_stage_scores_no_row_again(tmp_path, monkeypatch) -> None:
    first, expected = run(tmp_path, config=QUICK, valid=VALID, sample=SAMPLE)
    monkeypatch.setattr(loop, "score_prompts", None)
    again, parameters = run(tmp_path, config=QUICK, valid=VALID, sample=SAMPLE, resume=True)
    assert (again.best_step, again.interim, again.prompts) == (first.best_step, first.interim, 0)
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_a_sample_of_one_class_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="stage1: expected a validation sample of both labels, got .* of one"):
        run(tmp_path, valid=VALID, sample=np.flatnonzero(VALID.label == 1))

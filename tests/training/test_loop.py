"""The loop: learning rate, what is kept, and that stopping and continuing changes no bit on a CPU."""

from __future__ import annotations

import dataclasses
import signal

import numpy as np
import pytest
import torch
from small_llm import H, random_prompts, small_model
from small_loop import CONFIG, StopAfter, lora_model, run

from collm_fast.config import LoraConfig, StageConfig
from collm_fast.io import checkpoints
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import add_lora
from collm_fast.training.interrupt import Interrupted, Stop
from collm_fast.training.loop import derived_seed, learning_rate, total_steps
from collm_fast.training.stages import set_trainable


def test_learning_rate_warms_up_once_and_ends_at_the_minimum():
    config = StageConfig(lr=1.0, min_lr=0.1, warmup_steps=200)
    rates = [learning_rate(config, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 100) and rates[99] == 1.0  # a tenth of the steps, not 200
    assert rates[100] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert np.all(np.diff(rates[:100]) > 0) and np.all(np.diff(rates[101:]) < 0)
    assert learning_rate(config, 0, 1) == 1.0


def test_total_steps_is_the_least_of_epochs_and_caps():
    config = StageConfig(epochs=1.5, batch_size=16, max_steps=None)
    assert total_steps(config, 100) == 10
    assert total_steps(config, 100, 4) == 4
    assert total_steps(dataclasses.replace(config, max_steps=3), 100, 4) == 3
    assert total_steps(config, 1) == 1


def test_derived_seeds_differ_by_purpose_and_repeat():
    seeds = {derived_seed(1), derived_seed(2), derived_seed(1, "a"), derived_seed(1, "b"), derived_seed(1, "a", 0)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, "a", 0) == derived_seed(1, "a", 0)


def test_training_learns_and_keeps_the_best_state(tmp_path):
    train = random_prompts(0, groups=8, slots=False)
    config = dataclasses.replace(CONFIG, epochs=40)
    result, parameters = run(tmp_path, config=config, model=lora_model(0.0), valid=train, total=60)
    assert np.mean(result.history.loss[-8:]) < 0.7 * np.mean(result.history.loss[:8])
    assert result.history.eval_step == list(range(0, 61, 4))
    assert result.best_auc == max(result.history.valid_auc[1:]) > result.history.valid_auc[0]
    best = checkpoints.load(tmp_path / f"{result.best_step:08d}.safetensors")
    for name, value in parameters.items():
        assert torch.equal(value, best.tensors[f"best.{name}"])
    assert {int(path.stem) for path in tmp_path.iterdir()} == {result.steps, result.best_step}


def test_patience_ends_a_stage_that_does_not_improve(tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e-12, min_lr=0.0, eval_every=1, patience=3)
    result, _ = run(tmp_path, config=config, total=50)
    assert result.steps == 4 and result.best_step == 1  # the untrained state of step 0 is never kept


@pytest.mark.parametrize("order", ["group", "random"])
@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_stopped_and_continued_equals_uninterrupted(tmp_path, steps, order):
    whole, expected = run(tmp_path / "whole", order=order)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", order=order, stop=StopAfter(steps))
    torch.manual_seed(12345)  # whatever happened in between
    result, parameters = run(tmp_path / "parts", order=order, resume=True)
    assert result.resumed_from is not None and result.resumed_from > 0 or steps == 1
    assert result.history == whole.history
    assert (result.best_step, result.best_auc, result.steps) == (whole.best_step, whole.best_auc, whole.steps)
    assert result.valid_logits.tobytes() == whole.valid_logits.tobytes()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_a_finished_stage_is_read_back_without_a_step(tmp_path):
    first, expected = run(tmp_path)
    again, parameters = run(tmp_path, resume=True)
    assert again.resumed_from == again.steps == first.steps and again.prompts == 0
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_a_signal_during_a_step_finishes_it_and_saves(tmp_path):
    sent = []

    class Events:
        def add_scalar(self, tag, value, step):
            if tag.endswith("train/loss") and step == 3 and not sent:
                sent.append(step)
                signal.raise_signal(signal.SIGTERM)

    with Stop() as stop, pytest.raises(Interrupted):
        run(tmp_path, stop=stop, events=Events())
    assert checkpoints.latest(tmp_path).step == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_outside_the_loop_interrupts_at_once():
    with Stop(), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)
    stop = Stop()
    with stop, stop.held():
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


class KilledAt:
    """Events that end the process, as far as the loop can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def add_scalar(self, tag, value, step):
        if tag.endswith("train/loss") and step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, 6), (5.0, 4)])
def test_a_killed_stage_continues_from_its_last_checkpoint_to_the_same_bits(tmp_path, minutes, saved):
    whole, expected = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "parts", checkpoint_minutes=minutes, events=KilledAt(7))
    assert checkpoints.latest(tmp_path / "parts").step == saved
    result, parameters = run(tmp_path / "parts", resume=True)
    assert result.resumed_from == saved and result.history == whole.history
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_a_loss_that_is_not_finite_names_the_step_and_the_rows(tmp_path):
    model = lora_model()
    model.llm.get_output_embeddings().weight.data[5] = float("nan")
    valid = random_prompts(1, groups=6, slots=False)
    with pytest.raises(FloatingPointError, match="expected finite validation scores, got nan at step 0, row 0"):
        run(tmp_path, model=model)

    class Poisoned(CoLLM):
        steps = 0

        def forward(self, batch):
            logit = super().forward(batch)
            if torch.is_grad_enabled():
                self.steps += 1
            return logit * float("nan") if self.steps == 3 and torch.is_grad_enabled() else logit

    poisoned = Poisoned(lora_model().llm, yes_id=5, no_id=6)
    with pytest.raises(FloatingPointError, match=r"stage1: expected a finite loss, got nan at step 2, rows \d+, "):
        run(tmp_path / "new", model=poisoned, valid=valid)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_parameters(tmp_path):
    model = lora_model()
    before = {name: value.detach().clone() for name, value in set_trainable(model, "lora").items()}
    next(iter(set_trainable(model, "lora").values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"stage1: expected a finite gradient, got (nan|inf) at step 0, rows"):
        run(tmp_path, model=model)
    assert all(torch.equal(value, before[name]) for name, value in set_trainable(model, "lora").items())


def test_one_class_in_validation_is_an_error(tmp_path):
    valid = random_prompts(1, slots=False)
    with pytest.raises(ValueError, match="expected validation rows of both labels"):
        run(tmp_path, valid=dataclasses.replace(valid, label=np.ones_like(valid.label)))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    run(tmp_path)
    llm = small_model("llama")
    add_lora(llm, LoraConfig(r=2))
    with pytest.raises(ValueError, match="checkpoint: expected parameter.llm"):
        run(tmp_path, model=CoLLM(llm, yes_id=5, no_id=6), resume=True)
    assert H == llm.config.hidden_size

"""Both stages over ten optimizer steps against each prompt alone, as tests/one_by_one.py computes it.

Losses and gradients are held to 1e-4 and 1e-3 of it in float64; in bfloat16 ours may err twice as much as it does.
test_two_stage.py has dropout, and peft on the other side.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from hybrids import NO, YES, D, make_mapper, statistics, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from one_by_one import ALPHA, BATCH, FIRST, KINDS, RANK, Case, Naive, Row, gradients, group, mixed, prompts_of
from small_llm import small_model
from torch import Tensor

from collm_fast.config import LoraConfig, MapperConfig
from collm_fast.data.packing import PackedBatch, batches, pack
from collm_fast.data.prompts import HISTORY, TARGET, TEXT, USER, Prompts
from collm_fast.models import attention
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import add_lora, lora_layers
from collm_fast.models.mapper import Mapper

STEPS = 10
WINDOW = {"mistral": {"sliding_window": 6}, "qwen2": {"use_sliding_window": True, "sliding_window": 7}}


def rough_model(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """A small model whose hidden states differ in size by three orders of magnitude between tokens."""
    llm = small_model(case.family, **(WINDOW[case.family] if case.windowed else {}))
    generator = torch.Generator().manual_seed(9)
    rows = llm.get_input_embeddings().weight.data
    rows *= 10 ** (torch.rand(len(rows), 1, generator=generator) * 1.5 - 1)
    rows[FIRST] *= 300 / rows[FIRST].norm()
    for layer in llm.model.layers:
        layer.input_layernorm.weight.data *= 10 ** (torch.rand(rows.shape[1], generator=generator) - 0.5)
    return llm.to(dtype)


class Ours:
    """One language model and one mapper, read by the model's own packed forward, the decoder, and kept prefixes."""

    def __init__(self, case: Case, llm: Any, mapper: Mapper) -> None:
        self.case, self.mapper = case, mapper
        self.plain = copy.deepcopy(llm, {id(weight): weight for weight in llm.parameters()})
        generator = torch.Generator().manual_seed(1)
        for layer in add_lora(llm, LoraConfig(r=RANK, alpha=ALPHA, dropout=0.0), generator):
            layer.lora_B.data.normal_(generator=generator).mul_(0.2)
        given = {"yes_id": YES, "no_id": NO, "loss": case.loss, "cf": tables(), "mapper": mapper, "stats": statistics()}
        self.ways = {
            "own": CoLLM(llm, decoder=False, **given),
            "decoder": CoLLM(llm, **given),
            "kept": CoLLM(llm, kv_cache_gb=1e-4, **given),
        }
        assert self.ways["decoder"].decoder is not None and self.ways["own"].decoder is None
        self.all = {f"mapper.{name}": parameter for name, parameter in mapper.named_parameters()}
        for name, layer in lora_layers(llm):
            self.all |= {f"llm.{name}.lora_A": layer.lora_A, f"llm.{name}.lora_B": layer.lora_B}
        self.trained = {n: p for n, p in self.all.items() if ("lora_" in n) == (case.stage == "lora")}
        for parameter in (*llm.parameters(), *mapper.parameters()):
            parameter.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        for model in self.ways.values():
            model.train()

    def step(self, way: str, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return gradients(self.ways[way](batch), batch.label, self.trained)

    def naive(self, dtype: torch.dtype) -> Naive:
        naive = Naive(self.plain, self.mapper, self.case, dtype)
        naive.take(self.all, trained=set(self.trained))
        return naive


def batches_of(case: Case, prompts: Prompts, steps: int) -> list[np.ndarray]:
    order: list[np.ndarray] = []
    generator = np.random.default_rng(0)
    while len(order) < steps:
        order += batches(prompts, order=case.order, batch_size=BATCH, generator=generator)
    return order[:steps]


def compare(ours: Ours, naive: Naive, prompts: Prompts, order: list[np.ndarray]) -> None:
    """Each step from the same parameters; the optimizer takes the gradients of the decoder."""
    case = ours.case
    optimizer = torch.optim.AdamW(ours.trained.values(), lr=1e-3)
    for step, rows in enumerate(order):
        naive.take(ours.all, trained=set(ours.trained))
        loss, truth = naive.step(prompts, rows)
        batch = pack(prompts, rows, share_prefix=case.order != "flat", pairs=case.pairs)
        scale = max(float(grad.norm()) for grad in truth.values())
        for way in ours.ways:
            got, found = ours.step(way, batch)
            assert abs(got.mean() - loss.mean()) <= 1e-4 * loss.mean(), (way, step)
            for name, want in truth.items():
                # The gradient of a softmax over one key is zero, whatever rounding leaves of it.
                assert (found[name] - want).norm() <= 1e-3 * want.norm() + 1e-6 * scale, (way, step, name)
            if way == "decoder":
                for name, parameter in ours.trained.items():
                    parameter.grad = found[name].clone()
        optimizer.step()


CASES = (
    Case("llama", "lora", "random"),
    Case("llama", "cie", "group", "embedding+pair", "yes-no"),
    Case("qwen2", "lora", "flat", loss="yes-no", windowed=True),
    Case("qwen2", "cie", "random", "embedding+stats"),
    Case("qwen3", "lora", "group", loss="yes-no"),
    Case("qwen3", "cie", "flat", "embedding", "yes-no"),
    Case("mistral", "lora", "group"),
    Case("mistral", "cie", "random", "embedding+stats+pair", "yes-no", windowed=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.stage}-{case.order}")
def test_ten_steps(case: Case) -> None:
    ours, prompts = Ours(case, rough_model(case), make_mapper(case.inputs)), mixed(1, slots=case.stage == "cie")
    compare(ours, ours.naive(torch.float64), prompts, batches_of(case, prompts, STEPS))
    kept = ours.ways["kept"].prefixes
    assert kept is not None and (kept.tokens_saved > 0) == (case.stage == "cie")


prompt_sets = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 6)), min_size=1, max_size=4)
giants = st.tuples(st.sampled_from(KINDS), st.integers(17, 20)).map(lambda one: [one])


@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(st.one_of(prompt_sets, giants), st.sampled_from(CASES), st.integers(0, 10**6))
def test_random_prompt_sets(kinds: list[tuple[str, int]], case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [group(kind, rows, rng) for kind, rows in kinds]
    prompts = prompts_of(groups, slots=case.stage == "cie", seed=seed)
    ours = Ours(case, rough_model(case), make_mapper(case.inputs))
    compare(ours, ours.naive(torch.float64), prompts, batches_of(case, prompts, 3))


@pytest.mark.parametrize("stage", ["lora", "cie"])
def test_two_optimizers_that_never_meet_stay_together(stage: str) -> None:
    case, prompts = Case("llama", stage, "group", loss="yes-no"), mixed(2, slots=stage == "cie")
    ours = Ours(case, rough_model(case), make_mapper(case.inputs))
    naive = ours.naive(torch.float32)
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-3) for p in (ours.trained, naive.parameters)]
    for rows in batches_of(case, prompts, STEPS):
        losses = []
        for parameters, run in (
            (ours.trained, lambda rows=rows: ours.step("decoder", pack(prompts, rows))),
            (naive.parameters, lambda rows=rows: naive.step(prompts, rows)),
        ):
            loss, found = run()
            losses.append(loss.mean())
            for name, parameter in parameters.items():
                parameter.grad = found[name]
        assert abs(losses[0] - losses[1]) <= 1e-4 * losses[1]
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in ours.trained.items():
        assert (parameter - naive.parameters[name]).norm() <= 1e-3 * parameter.norm(), name


@pytest.mark.parametrize(
    "case",
    [Case("llama", "cie", "group", loss="yes-no"), Case("qwen2", "cie", "random"), Case("qwen3", "lora", "group")],
    ids=lambda case: f"{case.family}-{case.stage}",
)
@pytest.mark.parametrize("kernel", ["fused", pytest.param("paths", marks=requires("native"))])
def test_bfloat16_errs_at_most_twice_as_much_and_no_more_to_one_side(
    case: Case, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ten batches: the errors of each row's loss and of the gradient, and what of these all batches share."""
    monkeypatch.setattr(attention, "kernel_of", lambda query: kernel)
    ours = Ours(case, rough_model(case, torch.bfloat16), make_mapper(case.inputs))
    exact, rounded = (ours.naive(dtype) for dtype in (torch.float64, torch.bfloat16))
    errors: dict[str, list[Tensor]] = {name: [] for name in ("naive", *ours.ways)}
    losses: dict[str, list[Tensor]] = {name: [] for name in errors}
    for seed in range(STEPS):
        prompts = mixed(seed, slots=case.stage == "cie")
        rows = np.random.default_rng(seed).permutation(len(prompts))[: BATCH // 2]
        each, truth = exact.step(prompts, rows)
        for name in errors:
            batch = pack(prompts, rows, pairs=case.pairs)
            got, found = rounded.step(prompts, rows) if name == "naive" else ours.step(name, batch)
            # In units of each parameter's gradient, so that none hides behind the largest.
            parts = [(found[n].double() - g).flatten() / (g.norm() + 1e-12) for n, g in truth.items()]
            errors[name].append(torch.cat(parts))
            losses[name].append(got - each)
    loss, whole, shared = (
        {name: measure(found) for name, found in of.items()}
        for of, measure in (
            (losses, lambda found: torch.stack(found).norm()),
            (errors, lambda found: torch.stack(found).norm()),
            (errors, lambda found: torch.stack(found).mean(0).norm()),
        )
    )
    for way in ours.ways:
        for error in (loss, whole, shared):
            assert error[way] <= 2 * error["naive"], way


@requires("smollm2")
def test_smollm2() -> None:
    """A real model's activations: both ways of ours, prompts of words, three steps of stage 2."""
    from collm_fast.models.llm import load_llm

    llm, tokenizer = load_llm("smollm2", dtype="float32", device="cpu")

    def text(words: str) -> Row:
        return [(TEXT, token) for token in tokenizer(words)["input_ids"]]

    titles = ("Toy Story (1995)", "Heat (1995)", "Brazil (1985)", "The Postman (1997)")
    liked = [(HISTORY, 2), (HISTORY, 4)]
    rows = [
        text("#Question: A user") + [(USER, user)] + text(" liked") + liked + text(f". Will they like {title}")
        + [(TARGET, number + 1)] + text("?\n#Answer:")
        for user, number, title in ((user, number, title) for user in (1, 2) for number, title in enumerate(titles))
    ]  # fmt: skip
    prompts = prompts_of([rows[:4], rows[4:]], slots=True, seed=0)
    torch.manual_seed(3)
    ours = Ours(Case("llama", "cie", "group", loss="yes-no"), llm, Mapper(D, 576, MapperConfig()))
    compare(ours, ours.naive(torch.float32), prompts, [np.arange(8), np.array([5, 0, 6]), np.array([1])])

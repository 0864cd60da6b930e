"""Branches behind kept prefixes: the same logits as the packed forward, each prefix once, bounded forwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from hybrids import all_alone, hybrid, make_mapper, statistics
from small_llm import random_prompts, small_model

from collm_fast.data.prompts import Prompts
from collm_fast.evaluate import score_prompts
from collm_fast.models import attention, branch_scorer
from collm_fast.models.branch_scorer import BranchDecoder, _products, _with_lse, branch_decoder, branch_logits
from collm_fast.models.collm import CoLLM


def scorer(model: CoLLM) -> BranchDecoder:
    decoder = branch_decoder(model)
    assert decoder is not None
    return decoder


def with_mapper(inputs: Any, llm: Any, tokens_per_id: int = 1) -> CoLLM:
    stats = statistics() if inputs and "stats" in inputs else None
    return hybrid(llm, make_mapper(inputs, tokens_per_id) if inputs else None, stats=stats)


@pytest.fixture(params=["fused", pytest.param("paths", marks=requires("native"))])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes attention: "fused" leaves it to the two parts, prefix and branch."""
    for module in (attention, branch_scorer):
        monkeypatch.setattr(module, "kernel_of", lambda query: request.param)
    return str(request.param)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("room", [1, 40, 10**6])
@pytest.mark.parametrize("inputs", ["embedding", "+stats+pair", None])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 6}),  # shorter than the prompts
        ("mistral", {"sliding_window": 200}),
        ("llama", {"num_key_value_heads": 4}),
    ],
)
def test_logits_are_those_of_the_packed_forward(family: str, options: Any, inputs: Any, room: int) -> None:
    model = with_mapper(inputs, small_model(family, **options))
    prompts = random_prompts(1, slots=inputs is not None)
    pairs = bool(inputs and "pair" in inputs)
    found = branch_logits(model, scorer(model), prompts, tokens_per_batch=room, pairs=pairs)
    assert found.dtype == np.float32
    assert distance(found, score_prompts(model, prompts, tokens_per_batch=64, pairs=pairs)) < 1e-5


@pytest.mark.usefixtures("kernel")
def test_logits_are_those_of_every_prompt_alone() -> None:
    llm, mapper = small_model("qwen3"), make_mapper(tokens_per_id=2)
    model, prompts = hybrid(llm, mapper), random_prompts(4, tokens_per_id=2)
    alone = all_alone(llm, prompts, np.arange(len(prompts)), mapper).detach().numpy()
    assert distance(branch_logits(model, scorer(model), prompts, tokens_per_batch=50), alone) < 1e-5


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("seed", range(6))
def test_rows_come_in_any_order_and_groups_of_any_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, prompts = hybrid(small_model("llama"), make_mapper()), random_prompts(seed, groups=7)
    mixed = prompts.take(rng.permutation(len(prompts)))
    room = int(rng.integers(1, 120))
    found = branch_logits(model, scorer(model), mixed, tokens_per_batch=room)
    assert distance(found, score_prompts(model, mixed, tokens_per_batch=10**6)) < 1e-5


def one_user(rows: int) -> tuple[Prompts, int]:
    """Many candidates of one user, and how many tokens they share."""
    prompts = random_prompts(2, groups=60, slots=True)
    lengths = np.diff(prompts.offsets)
    # One prompt's beginning before the last tokens of others: the same tokens up to place 9.
    offsets, token_ids, role, ident, part = [0], [], [], [], []
    for row in range(rows):
        end = int(prompts.offsets[row + 1])
        tail = np.arange(end - min(2 + row % 3, int(lengths[row])), end)
        places = np.concatenate([np.arange(prompts.offsets[3], prompts.offsets[3] + 9), tail])
        first = [20 + row % 2]  # what follows the shared tokens is not the same for all
        for name, column in (("token_ids", token_ids), ("slot_role", role), ("slot_id", ident), ("slot_part", part)):
            values = getattr(prompts, name)[places].tolist()
            column += values[:9] + (first if name == "token_ids" else [0]) + values[9:]
        offsets.append(len(token_ids))
    columns = [np.array(x, dtype) for x, dtype in zip((token_ids, role, ident, part), "ibib", strict=True)]
    rest = np.zeros(rows, np.int64)
    uid = np.full(rows, prompts.uid[3])
    made = Prompts(np.array(offsets), columns[0], columns[1].astype(np.uint8), columns[2], columns[3].astype(np.uint8),
                   rest, uid, prompts.iid[:rows], rest)  # fmt: skip
    return made, 9


class Counted(BranchDecoder):
    """Remembers how many tokens each call of it was given."""

    def __init__(self, llm: Any) -> None:
        super().__init__(llm)
        self.branches: list[int] = []
        self.prefixes: list[int] = []

    def answers(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.branches.append(len(x))
        return super().answers(x, *args, **kwargs)

    def past(self, x: Any, *args: Any) -> Any:
        self.prefixes.append(len(x))
        return super().past(x, *args)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("room", [1, 7, 50, 10**6])
def test_a_prefix_is_computed_once_and_a_forward_is_bounded(room: int) -> None:
    model = hybrid(small_model("llama"), make_mapper())
    prompts, shared = one_user(50)
    own = np.diff(prompts.offsets) - shared
    counted, rows = Counted(model.llm), []
    found = branch_logits(model, counted, prompts, tokens_per_batch=room, done=rows.append)
    assert distance(found, score_prompts(model, prompts, tokens_per_batch=10**6)) < 1e-5
    assert counted.prefixes == [shared]
    assert sum(counted.branches) == own.sum() and max(counted.branches) <= max(room, own.max())
    assert sum(rows) == 50 and len(rows) == len(counted.branches)
    # However the rows are cut, a score is the same.
    assert distance(found, branch_logits(model, counted, prompts, tokens_per_batch=23)) < 1e-6


def test_prefixes_of_many_users_are_bounded_too() -> None:
    model, prompts = hybrid(small_model("llama"), make_mapper()), random_prompts(0, groups=30)
    counted = Counted(model.llm)
    branch_logits(model, counted, prompts, tokens_per_batch=40)
    assert len(counted.branches) > 3 and max(counted.branches) <= 40 and max(counted.prefixes) <= 40
    once = Counted(model.llm)
    branch_logits(model, once, prompts, tokens_per_batch=10**6)
    assert len(once.prefixes) == len(once.branches) == 1
    assert sum(counted.prefixes) == sum(once.prefixes)


@pytest.mark.usefixtures("kernel")
def test_bfloat16_is_as_close_as_the_packed_forward() -> None:
    prompts, _ = one_user(60)
    exact = score_prompts(hybrid(small_model("qwen3"), make_mapper()), prompts, tokens_per_batch=10**6)
    model = hybrid(small_model("qwen3").to(torch.bfloat16), make_mapper())
    packed = distance(score_prompts(model, prompts, tokens_per_batch=10**6), exact)
    decoder = BranchDecoder(model.llm)
    assert distance(branch_logits(model, decoder, prompts, tokens_per_batch=100), exact) < 2 * packed


def test_both_ways_of_attention_agree() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for seen, options in ((None, {}), (causal, {"is_causal": True})):
        for fast, plain in zip(_with_lse(q, k, v, 0.3, **options), _products(q, k, v, 0.3, seen), strict=True):
            assert fast.shape == plain.shape and torch.allclose(fast, plain, atol=1e-6)


def test_what_it_cannot_serve() -> None:
    assert branch_decoder(hybrid(small_model("gpt_neox"))) is None
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    assert branch_decoder(hybrid(small_model("llama", **dynamic))) is None
    model, prompts = hybrid(small_model("llama")), random_prompts(0)
    with pytest.raises(ValueError, match="branch_logits: expected tokens_per_batch of at least 1, got 0"):
        branch_logits(model, scorer(model), prompts, tokens_per_batch=0)
    with pytest.raises(ValueError, match="expected a mapper for the prompts'"):
        branch_logits(model, scorer(model), prompts, tokens_per_batch=10)
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        branch_logits(model.train(), scorer(model), prompts, tokens_per_batch=10)
    empty = branch_logits(model.eval(), scorer(model), prompts.take([]), tokens_per_batch=10)
    assert empty.shape == (0,)

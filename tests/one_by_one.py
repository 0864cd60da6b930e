"""CoLLM as one prompt after another computes it, and the prompts for it: no packing, no padding, no cache, all logits.

It shares nothing with ours but the weights: a plain transformers model with eager attention, LoRA as two products,
injected rows put in by index. parity/test_prompt_by_prompt.py compares the two.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from hybrids import NO, YES, statistics, tables
from small_llm import ITEMS, USERS, VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from collm_fast.data.prompts import HISTORY, TARGET, TEXT, USER, Prompts
from collm_fast.models.mapper import Mapper

BATCH, RANK, ALPHA = 16, 4, 8.0
FIRST = 1  # the token that begins a prompt, whose row is huge: real models have massive activations there
Row = list[tuple[int, int]]  # (role, token or id)


class Case(NamedTuple):
    family: str
    stage: str  # "lora" or "cie"
    order: Any
    inputs: str = "embedding"
    loss: Any = "yes"
    windowed: bool = False

    @property
    def pairs(self) -> bool:
        return "+pair" in self.inputs


KINDS = (
    *("empty history", "full history", "one token", "all the same", "all different"),
    *("injected first", "injected last", "injected in the prefix", "injected in branches", "injected nowhere"),
)


def group(kind: str, rows: int, rng: np.random.Generator) -> list[Row]:
    """Rows of one (user, history)."""

    def text(low: int, high: int) -> Row:
        return [(TEXT, int(token)) for token in rng.integers(3, VOCABULARY, rng.integers(low, high))]

    def item() -> Row:
        return [(TARGET, int(rng.integers(1, ITEMS)))]

    user, shared = [(USER, int(rng.integers(1, USERS)))], [(TEXT, FIRST), *text(1, 9)]
    history = [(HISTORY, int(rng.integers(1, ITEMS))) for _ in range(3)]
    one, end = shared + user + text(1, 4) + item() + text(1, 4), [(TEXT, 5)]
    return {
        "empty history": lambda: [shared + user + end + item() + text(1, 4) + end for _ in range(rows)],
        "full history": lambda: [shared + history + user + text(1, 3) + item() + end for _ in range(rows)],
        "one token": lambda: [user if n % 2 else text(1, 2) for n in range(rows)],
        "all the same": lambda: [one] * rows,
        "all different": lambda: [text(3, 9) + item() + text(1, 3) for _ in range(rows)],
        "injected first": lambda: [user + text(1, 4) + item() + text(1, 4) for _ in range(rows)],
        "injected last": lambda: [shared + text(0, 4) + item() for _ in range(rows)],
        "injected in the prefix": lambda: [shared + user + end + text(1, 4) for _ in range(rows)],
        "injected in branches": lambda: [shared + text(1, 4) + item() + text(0, 4) for _ in range(rows)],
        "injected nowhere": lambda: [shared + text(1, 6) for _ in range(rows)],
    }[kind]()


def prompts_of(groups: list[list[Row]], *, slots: bool, seed: int) -> Prompts:
    """Prompts written down token by token; without slots each injected row is a token of text."""
    numbered = [(number, row) for number, rows in enumerate(groups) for row in rows]
    tokens = np.array([token for _, row in numbered for token in row])
    role = tokens[:, 0] if slots else np.zeros(len(tokens), int)
    number = np.array([number for number, _ in numbered])
    targets = [next((index for part, index in row if part == TARGET), 1) for _, row in numbered]
    return Prompts(
        offsets=np.concatenate(([0], np.cumsum([len(row) for _, row in numbered]))),
        token_ids=np.where(role == TEXT, tokens[:, 1], 0).astype(np.int32),
        slot_role=role.astype(np.uint8),
        slot_id=np.where(role == TEXT, 0, tokens[:, 1]).astype(np.int32),
        slot_part=np.zeros(len(tokens), np.uint8),
        group=number,
        uid=number % (USERS - 1) + 1,
        iid=np.array(targets),
        label=np.random.default_rng(seed).integers(0, 2, len(number)),
        tokens_per_id=1,
    )


def mixed(seed: int, *, slots: bool) -> Prompts:
    """A group of each kind, one of them larger than a batch."""
    rng = np.random.default_rng(seed)
    sizes = [BATCH + 3 if kind == "full history" else int(rng.integers(1, 5)) for kind in KINDS]
    return prompts_of([group(kind, size, rng) for kind, size in zip(KINDS, sizes, strict=True)], slots=slots, seed=seed)


class PlainLora(nn.Module):
    def __init__(self, base: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = (nn.Parameter(torch.zeros(n, dtype=dtype)) for n in ((RANK, base.in_features), (0, RANK)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return (out + ALPHA / RANK * (x.to(self.A.dtype) @ self.A.T @ self.B.T)).to(out.dtype)


class Naive:
    """Each prompt alone through the model's own forward, with eager attention; parameters of ours by name."""

    def __init__(self, llm: Any, mapper: Mapper, case: Case, dtype: torch.dtype) -> None:
        # The weights are the given ones to the bit, shared or widened.
        shared = {id(weight): weight for weight in llm.parameters() if weight.dtype == dtype}
        self.llm, self.case, wide = (
            copy.deepcopy(llm, shared).to(dtype),
            case,
            torch.promote_types(dtype, torch.float32),
        )
        self.llm.set_attn_implementation("eager")
        self.table = self.llm.get_input_embeddings().weight
        self.lora: dict[str, PlainLora] = {}
        for number, layer in enumerate(self.llm.model.layers):
            for name in ("q_proj", "v_proj"):
                plain = PlainLora(getattr(layer.self_attn, name), wide)
                setattr(layer.self_attn, name, plain)
                self.lora[f"llm.model.layers.{number}.self_attn.{name}"] = plain
        self.mapper = copy.deepcopy(mapper).to(wide)
        self.parameters: dict[str, Tensor] = {}

    def take(self, parameters: dict[str, Tensor], *, trained: set[str]) -> None:
        """Copies of ours: LoRA and mapper."""
        for name, values in parameters.items():
            mine = values.detach().to(next(self.mapper.parameters()).dtype).requires_grad_(name in trained)
            owner, _, last = name.rpartition(".")
            if last in ("lora_A", "lora_B"):
                setattr(self.lora[owner], last[-1], nn.Parameter(mine, requires_grad=name in trained))
                mine = getattr(self.lora[owner], last[-1])
            else:
                parameter = self.mapper.get_parameter(name.removeprefix("mapper."))
                parameter.data = mine.detach()
                mine = parameter.requires_grad_(name in trained)
            if name in trained:
                self.parameters[name] = mine

    def logit(self, prompts: Prompts, row: int) -> Tensor:
        """The reading of the answer at one prompt's last token, from the logits of all tokens and all words."""
        part = slice(prompts.offsets[row], prompts.offsets[row + 1])
        embeds = self.table[torch.from_numpy(prompts.token_ids[part]).long()]
        places = np.flatnonzero(prompts.slot_role[part])
        if len(places):
            kinds = zip(prompts.slot_role[part][places], prompts.slot_id[part][places], strict=True)
            features = torch.stack([self.features(prompts, row, role, index) for role, index in kinds])
            hidden = torch.relu(nn.functional.linear(features, self.mapper.first.weight, self.mapper.first.bias))
            rows = nn.functional.linear(hidden, self.mapper.second.weight, self.mapper.second.bias)
            embeds = embeds.index_put((torch.from_numpy(places),), rows.to(embeds.dtype))
        logits: Tensor = self.llm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
        return logits[YES] if self.case.loss == "yes" else logits[YES] - logits[NO]

    def features(self, prompts: Prompts, row: int, role: int, index: int) -> Tensor:
        cf, stats, side = tables(), statistics(), "user" if role == USER else "item"
        parts = [getattr(cf, side)[index]]
        if "+stats" in self.case.inputs:
            parts.append(getattr(stats, side)[index])
        if self.case.pairs:
            parts.append(cf.user[prompts.uid[row]] * cf.item[prompts.iid[row]] * float(role == TARGET))
        return torch.cat(parts).to(self.mapper.first.weight.dtype)

    def step(self, prompts: Prompts, rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """(each row's loss, the trained parameters' gradients of their mean)."""
        out = torch.stack([self.logit(prompts, int(row)) for row in rows]).to(next(self.mapper.parameters()).dtype)
        return gradients(out, torch.from_numpy(prompts.label[rows]), self.parameters)


def gradients(logits: Tensor, label: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros where a batch without injected rows reaches no mapper."""
    loss = bce(logits, label.to(logits), reduction="none")
    found: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if loss.requires_grad:
        found = torch.autograd.grad(loss.mean(), list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return loss.detach(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

"""The prompts of the training benchmark, the rows of its cases, and the least arithmetic that these rows need.

Here: a prepared dataset's prompts, synthetic ones of the same shape, `flops`. Not here: the ways to compute
(`train_peers.py`) and the cases (`bench_train.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from train_llm import LORA, SHAPES, D

from collm_fast.config import MapperConfig, PromptConfig
from collm_fast.data import Dataset, Split, load_dataset
from collm_fast.data.packing import PackedBatch
from collm_fast.data.prompts import TARGET, TEXT, USER, Prompts, PromptTemplate, cached_tokenize
from collm_fast.models.llm import SMOLLM2, answer_ids, cache_folder, find_smollm2, gguf_folder, load_tokenizer

PROMPT = PromptConfig()


@dataclass(frozen=True)
class Rows:
    """Prompts by (part, stage), the sizes of the id tables, and the vocabulary ids of yes and no.

    Parts: "train", "test" (what is evaluated) and "rank": 1,000 candidates of one user and history.
    """

    prompts: dict[tuple[str, int], Prompts]
    num_users: int
    num_items: int
    answers: tuple[int, int]


def of_dataset(folder: Path, llm: str, candidates: int) -> Rows:
    """Prompts of a prepared dataset with the built-in templates and the language model's own tokenizer.

    A shape with random weights has none; SmolLM2's serves for it.
    """
    dataset = load_dataset(folder)
    source = str(gguf_folder(find_smollm2())) if llm in SHAPES or llm == SMOLLM2 else llm
    tokenizer = load_tokenizer(source)
    found, answers = {}, set()
    for stage in (1, 2):
        template = PromptTemplate.load(None, dataset.domain, stage=stage)
        answers |= {answer_ids(tokenizer, end, PROMPT.yes, PROMPT.no) for end in template.ends}
        parts = {"train": dataset.splits["train"], "test": dataset.splits["test"]}
        if stage == 2:
            parts["rank"] = _candidates(dataset, candidates)
        for part, split in parts.items():
            found[part, stage] = cached_tokenize(
                cache_folder() / "prompts",
                split,
                template,
                tokenizer,
                dataset.titles,
                history_length=PROMPT.history_length,
            )
    if len(answers) != 1:
        raise ValueError(f"bench_train: expected the same answer tokens in both stages, got {sorted(answers)}")
    return Rows(found, dataset.num_users, dataset.num_items, answers.pop())


def _candidates(dataset: Dataset, count: int) -> Split:
    """One user of the test split with a full history, beside `count` seeded items."""
    test = dataset.splits["test"]
    full = np.flatnonzero(np.diff(test.his_offsets) >= PROMPT.history_length)
    if not full.size or dataset.num_items <= count:
        raise ValueError(f"bench_train: expected a full history and over {count} items in {dataset.path}, got fewer")
    items = np.random.default_rng(5).permutation(np.arange(1, dataset.num_items))[:count]
    return replace(test.take(np.repeat(full[:1], count)), iid=items)


def synthetic(vocabulary: int, groups: int, candidates: int, *, short: bool) -> Rows:
    """Random tokens in prompts shaped like MovieLens-1M's (`short`: about an eighth as long)."""
    rng = np.random.default_rng(3)
    sizes = rng.geometric(1 / 1.83, groups)
    found = {
        (part, stage): _prompts(rng, vocabulary, counts, stage, 8 if short else 1)
        for part, counts in (("train", sizes), ("test", sizes))
        for stage in (1, 2)
    }
    found["rank", 2] = _prompts(rng, vocabulary, np.array([candidates]), 2, 8 if short else 1)
    return Rows(found, groups + 1, candidates + 1, (vocabulary - 1, vocabulary - 2))


def _prompts(rng: np.random.Generator, vocabulary: int, sizes: np.ndarray, stage: int, shrink: int) -> Prompts:
    """Text, in stage 2 the user's slot and more text, the target's title, in stage 2 its slot, and text to the end."""
    rows: list[np.ndarray] = []  # [tokens, 3]: token, role, id

    def text(length: int) -> np.ndarray:
        tokens = rng.integers(1, vocabulary - 2, max(1, length // shrink))
        return np.stack((tokens, np.full_like(tokens, TEXT), np.zeros_like(tokens)), axis=1)

    end = text(15)
    for number, size in enumerate(sizes.tolist()):
        slot = [np.array([[0, USER, number + 1]])] if stage == 2 else []
        shared = [text(int(np.clip(rng.normal(127, 32), 30, 220))), *slot, text(18)]
        for _ in range(size):
            item = int(rng.integers(1, sizes.max() + 1))
            target = [np.array([[0, TARGET, item]])] if stage == 2 else []
            rows.append(np.concatenate([*shared, text(int(rng.integers(5, 20))), *target, end]))
    group = np.repeat(np.arange(len(sizes)), sizes)
    flat = np.concatenate(rows)
    return Prompts(
        offsets=np.concatenate(([0], np.cumsum([len(row) for row in rows]))),
        token_ids=flat[:, 0].astype(np.int32),
        slot_role=flat[:, 1].astype(np.uint8),
        slot_id=flat[:, 2].astype(np.int32),
        slot_part=np.zeros(len(flat), np.uint8),
        group=group,
        uid=group + 1,
        iid=np.ones_like(group),
        label=rng.integers(0, 2, len(rows)),
    )


def behind_injected(batch: PackedBatch) -> np.ndarray:
    """[T] bool: whether a token is, or comes after, an injected row of its prompt."""
    tree, branch, injected = (x.numpy() for x in (batch.tree, batch.branch, batch.row_index >= 0))
    seen: dict[tuple[int, int], bool] = {}
    out = np.zeros(len(tree), np.bool_)
    for place, (t, b, here) in enumerate(zip(tree.tolist(), branch.tolist(), injected.tolist(), strict=True)):
        before = seen.get((t, b), seen.get((t, -1), False))
        out[place] = seen[t, b] = before or here
    return out


def repeated_opening(batch: PackedBatch) -> np.ndarray:
    """[T] bool: whether a token is of the text that all trees begin with, and its tree not the first."""
    tree, ids, position = (x.numpy() for x in (batch.tree, batch.token_ids, batch.position_ids))
    shared = (batch.branch.numpy() < 0) & (batch.row_index.numpy() < 0)
    count, size = int(tree.max()) + 1, 0
    while True:
        here = shared & (position == size)
        if here.sum() < count or len(np.unique(ids[here])) > 1:
            return shared & (position < size) & (tree > 0)
        size += 1


@dataclass(frozen=True)
class Layer:
    """FLOPs of one token in one decoder layer (a multiplication and an addition count two)."""

    q: float
    kv: float
    rest: float  # o_proj and the MLP
    attend: float  # for each visible key
    lora_q: float
    lora_v: float

    @classmethod
    def of(cls, config: Any) -> Layer:
        H, head_dim = config.hidden_size, getattr(config, "head_dim", None)
        head_dim = head_dim or H // config.num_attention_heads
        wide, narrow = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        rest = 2.0 * H * wide + 6.0 * H * config.intermediate_size
        lora = [2.0 * LORA.r * (H + out) for out in (wide, narrow)]
        return cls(2.0 * H * wide, 4.0 * H * narrow, rest, 4.0 * wide, *lora)


def flops(config: Any, batch: PackedBatch, pass_: str, *, stage: int, warm: bool) -> float:
    """The least that losses and, in a `step`, gradients of a batch need when nothing is computed twice.

        forward   every token of the trees once, and what all of them begin with once in all; in the last layer K and V
                  of all tokens, the rest where an answer is read.
                  `warm`: only tokens behind the first injected row of their prompt, the others' K and V are given.
        backward  stage 1: dX of every linear but those of layer 0 that read the embeddings, dA and dB of the adapters.
                  stage 2: dX behind the first injected row alone (layer 0: where a row is injected), and the mapper's.
        attention 4 d a visible key and head forward, 4 d for dP and dQ, and 4 d for dK and dV of keys with a gradient.

    The answers' two rows of the head count, the optimizer does not. What all trees begin with counts in each batch,
    though ours keeps it while the language model is frozen.
    """
    layer, depth = Layer.of(config), config.num_hidden_layers
    behind = behind_injected(batch)
    keys = batch.position_ids.numpy() + 1.0
    answer = batch.answer.numpy()
    once = ~repeated_opening(batch)
    run = behind if warm else once
    lora = layer.lora_q + layer.lora_v
    linear = layer.q + layer.kv + layer.rest + lora
    total = (depth - 1) * (run.sum() * linear + keys[run].sum() * layer.attend)
    total += run.sum() * (layer.kv + layer.lora_v)
    last = len(answer) * (layer.q + layer.lora_q + layer.rest) + keys[answer].sum() * layer.attend
    total += last + len(answer) * 4.0 * config.hidden_size
    slots = len(batch.slot_id)
    width = MapperConfig().hidden_factor * D
    mapper = 2.0 * slots * width * (D + config.hidden_size)
    total += mapper
    if pass_ != "step":
        return float(total)
    graph = behind if stage == 2 else once
    # Keys with a gradient that a token sees: in stage 2 those before the first injected row of its prompt have none.
    before = _tokens_before(batch, behind) if stage == 2 else np.zeros_like(keys)
    own = keys - before
    total += (depth - 1) * (graph.sum() * linear + (keys + own)[graph].sum() * layer.attend)
    total += graph.sum() * (layer.kv + layer.lora_v) + last + own[answer].sum() * layer.attend
    if stage == 1:
        # dA and dB cost what the adapters' forward does; layer 0 lacks dX.
        total += graph.sum() * (depth * layer.lora_v + (depth - 1) * layer.lora_q) + len(answer) * layer.lora_q
        total -= graph.sum() * (layer.q + layer.kv + 4.0 * LORA.r * config.hidden_size)
    else:
        text = graph & (batch.row_index.numpy() < 0)
        total -= text.sum() * (layer.q + layer.kv + lora)
    return float(total + 2 * mapper)


def _tokens_before(batch: PackedBatch, behind: np.ndarray) -> np.ndarray:
    """[T]: how many tokens of its prompt stand before the first injected row, of each token behind it."""
    first: dict[tuple[int, int], float] = {}
    tree, branch, position = (x.tolist() for x in (batch.tree, batch.branch, batch.position_ids))
    out = np.zeros(len(behind))
    for place in np.flatnonzero(behind):
        t, b = tree[place], branch[place]
        start = first.get((t, -1), first.get((t, b)))
        if start is None:
            start = first[t, b] = float(position[place])
        out[place] = start
    return out

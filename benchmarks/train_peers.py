"""The ways to compute the logits of a batch of prompts: the official code's, two generic ones, and ours.

`naive` is what the official CoLLM code computes: rows padded on the right, the answer appended, PEFT's layers, logits
of every position and the language model's own loss beside the one that trains. `generic` is what a good trainer makes
of it without knowing the task: batches of rows of like length, padded on the left, and logits at the last position
alone. `prefix-grouper` is the package of that name (PyPI, arXiv 2506.05433): rows of one (user, history) in one line,
their prefix once. Not here: models and adapters (`train_llm.py`), which rows (`train_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from train_llm import Adapted

from collm_fast.data.packing import pack, plan_tree
from collm_fast.data.prompts import USER, Prompts
from collm_fast.models.branch_scorer import branch_decoder, branch_logits
from collm_fast.models.collm import CoLLM

# Logits [n] float32 of rows [n] of the prompts.
Logits = Callable[[np.ndarray], Tensor]
# A line of PrefixGrouper's batch is padded to the longest: groups of other lengths than this go into another batch.
_PADDING = 1.15
_NAME = "bench_train_prefix_grouper"


def ours(model: Adapted, *, kv_cache_gb: float = 0.0) -> CoLLM:
    """The package's own model over these weights."""
    tables = model.tables if model.mapper is not None else None
    hybrid = CoLLM(
        model.llm, yes_id=model.yes_id, no_id=model.no_id, cf=tables, mapper=model.mapper, kv_cache_gb=kv_cache_gb
    ).to(model.llm.device)
    if hybrid.decoder is None:
        raise RuntimeError("bench_train: expected a model whose decoder layers ours can run, got another")
    return hybrid


def ours_logits(hybrid: CoLLM, prompts: Prompts) -> Logits:
    return lambda rows: hybrid(pack(prompts, rows))


def ours_ranking(hybrid: CoLLM) -> Callable[..., np.ndarray]:
    """What `Run.rank` scores candidates with: a function of prompts and `tokens_per_batch`."""
    decoder = branch_decoder(hybrid)
    if decoder is None:
        raise RuntimeError(
            "bench_train: expected a model whose candidates ours can score behind one prefix, got another"
        )
    return partial(branch_logits, hybrid, decoder)


def _features(model: Adapted, role: np.ndarray, ident: np.ndarray) -> Tensor:
    """[S, D]: the collaborative embedding of every slot, equal ones as often as they occur."""
    is_user = torch.from_numpy(role == USER).to(model.user.device)
    index = torch.from_numpy(ident.astype(np.int64)).to(model.user.device)
    user, item = model.user[index.masked_fill(~is_user, 0)], model.item[index.masked_fill(is_user, 0)]
    return torch.where(is_user[:, None], user, item)


def _embedded(model: Adapted, prompts: Prompts, source: np.ndarray) -> Tensor:
    """[B, L, H] embeddings of the places `source` [B, L] of the flat prompts (-1: padding), slots by assignment."""
    device, real = model.llm.device, source >= 0
    ids = np.where(real, prompts.token_ids[source], 0).astype(np.int64)
    embeds: Tensor = model.llm.get_input_embeddings()(torch.from_numpy(ids).to(device))
    place = np.nonzero(real & (prompts.slot_role[source] > 0))
    if model.mapper is not None and place[0].size:
        slots = source[place]
        mapped = model.mapper(_features(model, prompts.slot_role[slots], prompts.slot_id[slots]))
        row, column = (torch.from_numpy(axis).to(device) for axis in place)
        embeds[row, column] = mapped.to(embeds.dtype)
    return embeds


def _padded(spans: Sequence[np.ndarray], side: str) -> np.ndarray:
    """[B, L] int64: each span on its side of a row, -1 elsewhere."""
    out = np.full((len(spans), max(map(len, spans))), -1, np.int64)
    for line, span in zip(out, spans, strict=True):
        part = slice(len(span)) if side == "right" else slice(len(line) - len(span), None)
        line[part] = span
    return out


def _spans(prompts: Prompts, rows: np.ndarray) -> list[np.ndarray]:
    return [np.arange(prompts.offsets[row], prompts.offsets[row + 1]) for row in rows]


def naive_logits(model: Adapted, prompts: Prompts) -> Logits:
    """As the official code: [prompts, padded on the right | answer], the loss over the vocabulary, the Yes logit."""

    def logits(rows: np.ndarray) -> Tensor:
        source, device = _padded(_spans(prompts, rows), "right"), model.llm.device
        embeds = _embedded(model, prompts, source)
        answer = np.where(prompts.label[rows] > 0, model.yes_id, model.no_id)[:, None]
        answer_ids = torch.from_numpy(answer).to(device)
        inputs = torch.cat((embeds, model.llm.get_input_embeddings()(answer_ids)), dim=1)
        real = torch.from_numpy(source >= 0).to(device)
        mask = torch.cat((real, torch.ones_like(real[:, :1])), dim=1).long()
        labels = torch.cat((torch.full_like(real, -100, dtype=torch.int64), answer_ids), dim=1)
        out = model.llm(inputs_embeds=inputs, attention_mask=mask, labels=labels, use_cache=False)
        last = real.sum(1) - 1
        found: Tensor = out.logits[torch.arange(len(rows), device=device), last, model.yes_id]
        return found.float()

    return logits


def generic_logits(model: Adapted, prompts: Prompts) -> Logits:
    """Padded on the left, so that every answer is read at the last position, of which alone logits are asked."""

    def logits(rows: np.ndarray) -> Tensor:
        source = _padded(_spans(prompts, rows), "left")
        mask = torch.from_numpy(source >= 0).long().to(model.llm.device)
        out = model.llm(
            inputs_embeds=_embedded(model, prompts, source),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            logits_to_keep=1,
            use_cache=False,
        )
        found: Tensor = out.logits[:, 0, model.yes_id]
        return found.float()

    return logits


def by_length(prompts: Prompts, rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of `size` rows of like length."""
    ordered = rows[np.argsort(np.diff(prompts.offsets)[rows], kind="stable")]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _prefix_grouper_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What a transformers layer calls: PrefixGrouper's split into prefixes and suffixes around torch's attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    grouper, scaling = kwargs["prefix_grouper"], kwargs.get("scaling")

    def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        mask = _masks(grouper, real, q.shape[2])
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=False)[0]
        return out

    return grouper.forward(attend, query, key, value), None


def _masks(grouper: Any, real: Tensor, queries: int) -> Tensor:
    """[b, 1, queries, keys] bool, made once a batch: the last `queries` keys ask, each sees real ones up to itself."""
    masks = grouper.__dict__.setdefault("bench_train_masks", {})
    key = queries, real.shape[1]
    if key not in masks:
        place = torch.arange(real.shape[1], device=real.device)
        asks = place[-queries:, None]
        # Padding sees itself: a row of the softmax without any key would be NaN.
        masks[key] = ((place <= asks) & real[:, None, :] | (place == asks))[:, None]
    found: Tensor = masks[key]
    return found


def prefix_grouper_logits(model: Adapted, prompts: Prompts) -> Logits:
    """PrefixGrouper under transformers and PEFT; lines of like length run together, answers alone reach the head.

    Raises: ImportError where the package is not installed.
    """
    from prefix_grouper import PrefixGrouper
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _prefix_grouper_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    causal = model.llm.get_base_model()
    causal.set_attn_implementation(_NAME)
    device = model.llm.device

    def run(lines: list[_Line]) -> Tensor:
        grouper = PrefixGrouper([line.sizes for line in lines], device=device)
        embeds = _embedded(model, prompts, _padded([line.source for line in lines], "right"))
        position = torch.from_numpy(_padded([line.position for line in lines], "right")).clamp_min(0).to(device)
        hidden = causal.base_model(
            inputs_embeds=embeds,
            position_ids=position,
            attention_mask=embeds.new_zeros(1, 1, 1, 1),  # one of four dimensions is taken as it is, and not read here
            use_cache=False,
            prefix_grouper=grouper,
        ).last_hidden_state
        number = np.repeat(np.arange(len(lines)), [len(line.answer) for line in lines])
        place = np.concatenate([line.answer for line in lines])
        read = hidden[torch.from_numpy(number).to(device), torch.from_numpy(place).to(device)]
        found: Tensor = causal.lm_head(read)[:, model.yes_id]
        return found.float()

    def logits(rows: np.ndarray) -> Tensor:
        lines = sorted(_lines(prompts, rows), key=lambda line: len(line.source))
        out = torch.cat([run(part) for part in _alike(lines)])
        order = np.concatenate([line.rows for line in lines])
        return out[torch.from_numpy(np.argsort(order)).to(device)]

    return logits


@dataclass(frozen=True)
class _Line:
    """One (user, history): the places of its tokens in the flat prompts, [prefix, suffix, suffix, ...]."""

    source: np.ndarray
    position: np.ndarray
    sizes: list[int]  # of the prefix and of each suffix
    answer: np.ndarray  # the place of each suffix's last token in the line
    rows: np.ndarray  # the place of each suffix's row in the batch


def _lines(prompts: Prompts, rows: np.ndarray) -> list[_Line]:
    source, position, tree, branch, _ = plan_tree(
        prompts.offsets, prompts.token_ids, prompts.slot_role, prompts.slot_id, prompts.group, rows
    )
    out = []
    for number in range(int(tree.max()) + 1):
        mine = tree == number
        names, first, counts = np.unique(branch[mine], return_index=True, return_counts=True)
        order = np.argsort(first)
        sizes = counts[order].tolist()
        out.append(_Line(source[mine], position[mine], sizes, np.cumsum(sizes)[1:] - 1, names[order][1:]))
    return out


def _alike(lines: list[_Line]) -> list[list[_Line]]:
    """Cuts lines of rising length where more than `_PADDING` of what a batch computes would be padding."""
    out: list[list[_Line]] = []
    real = 0
    for line in lines:
        size = len(line.source)
        if out and size * (len(out[-1]) + 1) <= _PADDING * (real + size):
            out[-1].append(line)
            real += size
        else:
            out.append([line])
            real = size
    return out

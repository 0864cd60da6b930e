"""Scoring many branches behind few prefixes, as ranking does: each prefix's keys and values are computed once.

Everything before the candidate is shareable here, injected rows included, because nothing needs a gradient. Layers are
models/decoder.py's, the model around them models/collm.py's; `CoLLM.forward` serves training and evaluation. Floor F2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.data.packing import PackedBatch, common_prefix, pack
from collm_fast.data.prompts import Prompts
from collm_fast.data.ragged import I64, offsets_of, spans
from collm_fast.models.attention import kernel_of
from collm_fast.models.collm import CoLLM
from collm_fast.models.decoder import Decoder, Past
from collm_fast.models.tree_plan import Piece, TreePlan
from collm_fast.ops import check_device_errors
from collm_fast.ops.inject import embed_inject

# Branches of a bucket are padded to its longest, which is at most this many times its shortest.
_BUCKET = 1.25


class Bucket(NamedTuple):
    """Branches of similar lengths, padded: `place` [n, L] of each token, `seen` [n, L] False at padding."""

    rows: Tensor
    place: Tensor
    seen: Tensor


class BranchPlan(TreePlan):
    """A packed axis of branches alone, several trees' one after another, whose prefixes are all past.

    Args: past: [trees] tokens of each prefix, 0 for none. count: [trees] branches of each. lengths: of all branches.
    Attributes: buckets, and `unpad` [T], the place of each token among the buckets' padded ones.
    """

    def __init__(self, past: list[int], count: list[int], lengths: I64, device: torch.device) -> None:
        tree = np.repeat(np.repeat(np.arange(len(count)), count), lengths)
        super().__init__(tree, np.repeat(np.arange(len(lengths)), lengths), per_branch=device.type == "cpu")
        self.trees = [[Piece(size, 0, 0), *branches] for size, (_, *branches) in zip(past, self.trees, strict=True)]
        self.past, self.count, self.own = past, count, np.add.reduceat(lengths, offsets_of(np.array(count))[:-1])
        self.last = False
        self.longest = int(lengths.max())
        starts, order = offsets_of(lengths)[:-1], np.argsort(lengths, kind="stable")
        self.buckets, padded, begin = [], [], 0
        while begin < len(order):
            end = int(np.searchsorted(lengths[order], _BUCKET * lengths[order[begin]], side="right"))
            rows = order[begin:end]
            column = np.arange(lengths[rows[-1]])
            seen = column < lengths[rows, None]
            place = starts[rows, None] + np.minimum(column, lengths[rows, None] - 1)
            self.buckets.append(Bucket(*(torch.from_numpy(x).to(device) for x in (rows, place, seen))))
            padded.append(np.where(seen, place, -1).ravel())
            begin = end
        flat = np.concatenate(padded)
        unpad = np.empty(int(lengths.sum()), np.int64)
        unpad[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        self.unpad = torch.from_numpy(unpad).to(device)

    def answers(self) -> BranchPlan:
        """The same keys, but only the last token of every branch has a query."""
        other = super().answers()
        assert isinstance(other, BranchPlan)
        other.last = True
        return other


class BranchDecoder(Decoder):
    """A decoder whose attention takes all queries of a `BranchPlan` at once: to their prefix, and to their branch.

        out = w out_prefix + (1 - w) out_branch,   w = sigmoid(lse_prefix - lse_branch)

    with lse the logarithm of a part's softmax sum: the softmax over both, without a call for every branch. Where
    `path_attention` serves, it takes this plan as any other: on a Xeon with AMX, ranking takes 1.27 (bfloat16, 200
    candidates) and 1.16 times as long (float32, 1,000) with the two parts, which take half of what calls by branch do.
    """

    def _attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, past: Past | None
    ) -> Tensor:
        window = self.windows[index]
        narrow = isinstance(plan, BranchPlan) and window is not None and max(plan.past) + plan.longest > window
        if not isinstance(plan, BranchPlan) or narrow or kernel_of(query) == "paths":
            return super()._attend(index, query, key, value, plan, past)
        scale = float(self.base.layers[index].self_attn.scaling)
        out, lse = _own(query, key, value, plan, scale)
        if past is not None:
            sizes = plan.count if plan.last else plan.own.tolist()
            parts = zip(query.split(sizes, 2), *(x.split(plan.past, 2) for x in past[index]), strict=True)
            before = [_to_prefix(q, k, v, scale) for q, k, v in parts]
            first, first_lse = (torch.cat(x, dim=2) for x in zip(*before, strict=True))
            out = torch.lerp(out, first, torch.sigmoid(first_lse - lse)[..., None].to(out.dtype))
        return out[0].transpose(0, 1).flatten(1)


def _to_prefix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention [1, h, Q, d], lse [1, h, Q]) of the queries to all of the keys; lse -inf where there are none."""
    if key.shape[2] == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    # The query heads of one key head stand under one another, so no key is repeated.
    grouped = query.reshape(1, key.shape[1], -1, query.shape[3])
    out, lse = _with_lse(grouped, key, value, scale)
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def _own(query: Tensor, key: Tensor, value: Tensor, plan: BranchPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(attention [1, h, Q, d], lse [1, h, Q]) of the queries to the tokens of their own branch."""
    heads, repeat = query.shape[1], query.shape[1] // key.shape[1]
    outs, lses = [], []
    for rows, place, seen in plan.buckets:
        # [n, heads, L, d] each: a branch is a row of the batch.
        k, v = (x[0][:, place].transpose(0, 1) for x in (key, value))
        if plan.last:
            q = query[0][:, rows].transpose(0, 1).unflatten(1, (-1, repeat))
            o, lse = _products(q, k, v, scale, seen[:, None, None])
        else:
            q, k, v = query[0][:, place].transpose(0, 1), *(x.repeat_interleave(repeat, dim=1) for x in (k, v))
            o, lse = _with_lse(q, k, v, scale, is_causal=True)
        outs.append(o.reshape(len(rows), heads, -1, o.shape[3]).transpose(0, 1).flatten(1, 2))
        lses.append(lse.reshape(len(rows), heads, -1).transpose(0, 1).flatten(1))
    out, lse = torch.cat(outs, dim=1), torch.cat(lses, dim=1)
    back = torch.argsort(torch.cat([b.rows for b in plan.buckets])) if plan.last else plan.unpad
    return out[:, back][None], lse[:, back][None]


def _with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v and the logarithm of the softmax's sum, [B, h, Q] float32, by torch's flash attention."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
        return out, lse
    if q.device.type == "cuda" and q.dtype != torch.float32:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
        return found[0], found[1]
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if is_causal else None
    return _products(q, k, v, scale, seen)


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_with_lse` in the open: by two products, with a mask of what is seen."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul((scores - lse[..., None]).exp().to(v.dtype), v), lse


def branch_decoder(model: CoLLM) -> BranchDecoder | None:
    """The decoder that `branch_logits` needs; None for a model it cannot serve, which `score_prompts` then scores.

    That is a family without a decoder forward, or rotary frequencies that depend on how long a batch is.
    """
    if not model.packed:
        return None
    decoder = BranchDecoder.of(model.llm) if model.decoder is None else BranchDecoder(model.llm)
    return decoder if isinstance(decoder, BranchDecoder) and decoder.fixed_positions else None


@torch.no_grad()
def branch_logits(
    model: CoLLM,
    decoder: BranchDecoder,
    prompts: Prompts,
    *,
    tokens_per_batch: int,
    pairs: bool = False,
    done: Callable[[int], Any] | None = None,
) -> NDArray[np.float32]:
    """The answer's logit of every prompt, [n] float32: what `score_prompts` gives, in far fewer products.

    The rows of one (user, history) share all tokens they have in common, and these are computed once however many
    forwards the rows take. A forward holds at most `tokens_per_batch` tokens of branches (at least one branch), and
    the keys and values of at most as many tokens of prefixes (at least one prefix). Nothing is drawn at random.

    Args:
        model: in eval mode. decoder: `branch_decoder(model)`.
        pairs: for a +pair mapper, as in `pack`. done: called with the number of rows after each forward.
    Raises: ValueError as `CoLLM.forward`, or for tokens_per_batch below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"branch_logits: expected tokens_per_batch of at least 1, got {tokens_per_batch}")
    if model.training:
        raise ValueError("branch_logits: expected a model in eval mode, got one in training mode")
    logits = np.empty(len(prompts), np.float32)
    _, first, group = np.unique(prompts.group, return_index=True, return_inverse=True)
    lengths = np.diff(prompts.offsets)
    shared = lengths[first]
    np.minimum.at(shared, group, common_prefix(prompts, np.arange(len(prompts)), first[group]))
    kept: dict[int, Past] = {}
    for rows in _forwards(np.argsort(first[group], kind="stable"), group, shared, lengths, tokens_per_batch):
        groups, count = _runs(group[rows])
        fresh = [g for g in groups if g not in kept and shared[g]]
        found = _pasts(model, decoder, prompts, first[fresh], shared[fresh], pairs) if fresh else []
        kept = {g: kept[g] for g in groups if g in kept} | dict(zip(fresh, found, strict=True))
        start = shared[group[rows]]
        batch, positions = _part(prompts, rows, start, lengths[rows] - start, pairs)
        plan = BranchPlan(shared[groups].tolist(), count, lengths[rows] - start, model.device)
        past = _joined([kept[g] for g in groups if g in kept])
        hidden = decoder.answers(
            _embeds(model, batch), decoder.rotary(positions.to(model.device), model.table), plan, past
        )
        logits[rows] = model._read(model._answer_logits(hidden)).float().cpu().numpy()
        if done is not None:
            done(len(rows))
    check_device_errors(synchronize=True)
    return logits


def _forwards(order: I64, group: I64, shared: I64, lengths: I64, room: int) -> Iterator[I64]:
    """The rows of each forward, in the order given: as many as fit."""
    begin, own, past = 0, 0, 0
    for place, row in enumerate(order.tolist()):
        new = place == begin or group[order[place - 1]] != group[row]
        length, prefix = int(lengths[row] - shared[group[row]]), int(shared[group[row]]) if new else 0
        if place > begin and (own + length > room or past + prefix > room):
            yield order[begin:place]
            begin, own, past, prefix = place, 0, 0, int(shared[group[row]])
        own, past = own + length, past + prefix
    if len(order):
        yield order[begin:]


def _runs(values: I64) -> tuple[list[int], list[int]]:
    """Consecutive equal values: (the values, how many of each)."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return values[starts].tolist(), np.diff(starts, append=len(values)).tolist()


def _part(prompts: Prompts, rows: I64, start: I64, length: I64, pairs: bool) -> tuple[PackedBatch, Tensor]:
    """The tokens start[i] .. start[i] + length[i] of each row, packed, and their positions in the row."""
    places = spans(prompts.offsets[rows] + start, length)
    flat = {name: getattr(prompts, name)[places] for name in ("token_ids", "slot_role", "slot_id", "slot_part")}
    rowwise = {name: getattr(prompts, name)[rows] for name in ("group", "uid", "iid", "label")}
    part = replace(prompts, offsets=offsets_of(length), **flat, **rowwise)
    batch = pack(part, np.arange(len(rows)), share_prefix=False, pairs=pairs)
    return batch, batch.position_ids + torch.from_numpy(np.repeat(start, length))


def _embeds(model: CoLLM, batch: PackedBatch) -> Tensor:
    model._check(batch)
    batch = batch.to(model.device)
    return embed_inject(batch.token_ids, model.table, model.mapped_rows(batch), batch.row_index)


def _pasts(model: CoLLM, decoder: Decoder, prompts: Prompts, rows: I64, lengths: I64, pairs: bool) -> list[Past]:
    """Keys and values of the first lengths[i] tokens of each row, by one forward."""
    batch, positions = _part(prompts, rows, np.zeros_like(lengths), lengths, pairs)
    tree = batch.tree.numpy()
    plan = TreePlan(tree, np.full_like(tree, -1), per_branch=model.device.type == "cpu")
    layers = decoder.past(_embeds(model, batch), decoder.rotary(positions.to(model.device), model.table), plan)
    split = [[x.split(lengths.tolist(), dim=2) for x in layer] for layer in layers]
    return [[(keys[n], values[n]) for keys, values in split] for n in range(len(rows))]


def _joined(pasts: list[Past]) -> Past | None:
    """The prefixes' keys and values one after another; None where there are none."""
    if len(pasts) < 2:
        return pasts[0] if pasts else None
    return [
        (torch.cat([k for k, _ in layer], 2), torch.cat([v for _, v in layer], 2)) for layer in zip(*pasts, strict=True)
    ]

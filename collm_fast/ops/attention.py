"""Attention along the paths of packed prompt trees in one call: schema, fake, autograd, registration, public function.

On a CPU csrc/cpu/attention.cpp serves float32 and bfloat16; the specification is reference.py. Which attention a model
uses where is models/attention.py. Floor F1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.ops._arguments import require, without_autocast
from collm_fast.ops._autograd import register_autograd

_ops = torch.ops.collm_fast
_OP = "path_attention"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? past_key, Tensor? past_value"
_PLAN = "Tensor pieces, Tensor counts, float scale, int window"

_native.LIBRARY.define(f"path_attention({_INPUTS}, {_PLAN}) -> (Tensor, Tensor)")
_native.LIBRARY.define(
    f"path_attention_backward(Tensor grad, {_INPUTS}, Tensor sums, {_PLAN}) -> (Tensor, Tensor, Tensor)"
)


# --- checks: the sentences of csrc/cpu/attention.cpp -------------------------------------------------------------
def _check_heads(name: str, tensor: Tensor, heads: int, tokens: int, like: Tensor) -> None:
    require(tensor.shape == (heads, tokens, like.shape[2]), _OP, f"{name} of shape [{heads}, {tokens}, d]", tensor)
    require(tensor.dtype == like.dtype, _OP, f"{name} of the dtype of query", tensor.dtype)


def _check(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor | None, past_value: Tensor | None, window: int
) -> None:
    require(query.dim() == 3 and query.shape[2] >= 2, _OP, "query of shape [h, Q, d] with d >= 2", query)
    good = key.dim() == 3 and key.shape[0] > 0 and query.shape[0] % key.shape[0] == 0
    require(good, _OP, f"key of shape [heads that divide {query.shape[0]}, T, d]", key)
    for name, tensor in (("key", key), ("value", value)):
        _check_heads(name, tensor, key.shape[0], key.shape[1], query)
    require((past_key is None) == (past_value is None), _OP, "past keys and past values", "one")
    if past_key is not None and past_value is not None:
        require(past_key.dim() == 3, _OP, "past_key of shape [h, P, d]", past_key)
        for name, tensor in (("past_key", past_key), ("past_value", past_value)):
            _check_heads(name, tensor, key.shape[0], past_key.shape[1], query)
    require(window >= 0, _OP, "a window of at least 0", window)


def _check_lengths(pieces: Tensor, counts: Tensor, sizes: tuple[int, int, int]) -> None:
    dense = pieces.dim() == 2 and pieces.shape[1] == 3 and counts.dim() == 1
    dense = dense and pieces.dtype == counts.dtype == torch.int64
    got = f"{list(pieces.shape)} and {list(counts.shape)}"
    require(dense, _OP, "dense int64 pieces [N, 3] and counts [trees]", got)
    rows = pieces.tolist()
    for past, own, asked in rows:
        rule = "0 <= past and 0 <= asked <= own of every piece"
        require(past >= 0 and 0 <= asked <= own, _OP, rule, f"{past}, {asked}, {own}")
    for count in counts.tolist():
        require(count >= 1, _OP, "at least a prefix in every tree", f"{count} pieces")
    require(sum(counts.tolist()) == len(rows), _OP, f"counts of {len(rows)} pieces", sum(counts.tolist()))
    for name, size, place in zip(("past", "own", "asked"), sizes, range(3), strict=True):
        found = sum(row[place] for row in rows)
        require(found == size, _OP, f"pieces of {size} {name} tokens", found)


# --- plain torch -------------------------------------------------------------------------------------------------
def _weights(
    query: Tensor, key: Tensor, past_key: Tensor | None, pieces: Tensor, counts: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax [h, Q, P + T], log2 of its sum [h, Q], all keys [h, P + T, d]) in float32, or float64 in float64."""
    past = 0 if past_key is None else past_key.shape[1]
    _check_lengths(pieces, counts, (past, key.shape[1], query.shape[1]))
    keys = _all(key, past_key, query)
    scores = _wide(query) @ keys.transpose(1, 2) * scale
    visible = reference.path_visible(pieces, counts, window or None).to(query.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1), torch.logsumexp(scores, dim=-1) / torch.log(scores.new_tensor(2.0)), keys


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all(own: Tensor, past: Tensor | None, query: Tensor) -> Tensor:
    """[h, P + T, d]: past and own, each as often as query heads read it."""
    every = own if past is None else torch.cat((past, own), dim=1)
    return _wide(every).repeat_interleave(query.shape[0] // own.shape[0], dim=0)


def _path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    pieces: Tensor,
    counts: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, past_key, past_value, window)
    weights, sums, _ = _weights(query, key, past_key, pieces, counts, scale, window)
    out = weights @ _all(value, past_value, query)
    return out.transpose(0, 1).to(query.dtype).contiguous(), sums.to(torch.float32)


def _path_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    sums: Tensor,
    pieces: Tensor,
    counts: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, value, past_key, past_value, window)
    weights, _, keys = _weights(query, key, past_key, pieces, counts, scale, window)
    wide = _wide(grad).transpose(0, 1)
    d_weights = wide @ _all(value, past_value, query).transpose(1, 2)
    scores = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    past = keys.shape[1] - key.shape[1]

    def own(grads: Tensor) -> Tensor:
        """[h, P + T, d] -> [key heads, T, d]"""
        return grads[:, past:].reshape(key.shape[0], -1, *key.shape[1:]).sum(1).to(key.dtype)

    d_key, d_value = own(scores.transpose(1, 2) @ _wide(query)), own(weights.transpose(1, 2) @ wide)
    return (scores @ keys).to(query.dtype), d_key, d_value.transpose(0, 1).contiguous()


_native.register("path_attention", reference=_path_attention)
_native.register("path_attention_backward", reference=_path_attention_backward)


# --- fakes and autograd ------------------------------------------------------------------------------------------
@torch.library.register_fake("collm_fast::path_attention", lib=_native.LIBRARY)
def _path_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    pieces: Tensor,
    counts: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, past_key, past_value, window)
    heads, tokens, width = query.shape
    return query.new_empty(tokens, heads, width), query.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.register_fake("collm_fast::path_attention_backward", lib=_native.LIBRARY)
def _path_attention_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    heads, tokens, width = key.shape
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(tokens, heads, width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, pieces, counts, scale, window = inputs
    ctx.mark_non_differentiable(output[1])
    past = (x for x in tensors[3:] if x is not None)
    require(not any(x.requires_grad for x in past), _OP, "past keys and values without a gradient", "ones with")
    ctx.save_for_backward(*tensors, output[1], pieces, counts)
    ctx.scale, ctx.window = scale, window


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast():
        d_query, d_key, d_value = _ops.path_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window)
    return d_query, d_key, d_value.transpose(0, 1), None, None, None, None, None, None


_attend = register_autograd("path_attention", _backward, _setup)


# --- public functions --------------------------------------------------------------------------------------------
def serves(query: Tensor) -> bool:
    """Whether `path_attention` has a compiled kernel for this tensor: float32 or bfloat16, on a CPU."""
    compiled = _native.backends["path_attention"]["cpu"] == "native"
    return compiled and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)


def path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Tensor,
    counts: Tensor,
    *,
    scale: float,
    window: int | None = None,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention along the paths of packed trees: each piece sees its tree's first piece, and itself.

        out[q, h] = sum_k softmax_k(scale query[h, q] . key[k]) value[k],  k on q's path, not behind it

    A tree is a prefix and branches behind it, `counts` of them; the keys of a piece are its past ones, then its own,
    of which the last `asked` have queries. Positions run from the prefix's first key on.

    Args:
        query: [h, Q, d], the asked tokens of all pieces in order; key, value: [h or a divisor, T, d], their own tokens;
            one dtype, d of at least 2. Compiled, it takes float32 and bfloat16, the latter on AMX tiles where it may.
        pieces: [N, 3] int64 on the CPU, (past, own, asked) of each. counts: [trees] int64, the prefix included.
        window: a token sees at most so many positions back, itself included; None: all.
        past: key and value of the past tokens, [h or a divisor, P, d], which get no gradient.
    Returns: [Q, h, d]. Weights and the scores' gradient are rounded to the dtype at most once; all sums are float32.
    Raises: ValueError for other shapes, dtypes and lengths, or past keys that require a gradient.
    Source: the softmax in blocks and its gradient from the sums alone: Dao, FlashAttention-2 (arXiv 2307.08691).
    """
    require(window is None or window >= 1, _OP, "window None or at least 1", window)
    before = (None, None) if past is None else past
    out: Tensor = _attend(query, key, value, *before, pieces, counts, scale, window or 0)[0]
    return out

"""Every op in plain torch: the specification, and the oracle of the tests.

Nothing here is fast and nothing here may become clever. The ops that users call live in `collm_fast.ops`; they
have the same names and signatures. Floor F0: imports torch and `collm_fast.graph` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collm_fast.graph import BipartiteGraph

# The last counter word names the use, so that no two uses of one seed ever share random words.
EDGE_STREAM = 0x45444745
_WORD = 0xFFFFFFFF


def philox(seed: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Philox4x32-10 words of the 128-bit counters (c0, c1, c2, c3) under a 64-bit key.

    Args: seed: int64, one element (its low and high words are the key); c0..c3: int64 in [0, 2^32), broadcastable.
    Returns: [..., 4] int64 in [0, 2^32).
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3.
    """
    key = torch.as_tensor(seed, dtype=torch.int64, device=c0.device).reshape(())
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    for _ in range(10):
        # int64 wraps, and the wrapped product has the right 64 bits.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def edge_mask(seed: Tensor | int, user: Tensor, item: Tensor, p: float) -> Tensor:
    """[E] float64: 0 for a dropped undirected edge, 1/(1-p) for a kept one.

    Edge (user, item node) is kept where word 0 of philox(seed; user, item, 0, EDGE_STREAM) >= floor(p 2^32).
    """
    word = philox(
        seed, user.long(), item.long(), torch.zeros_like(user.long()), torch.full_like(user.long(), EDGE_STREAM)
    )
    return (word[..., 0] >= int(p * 2**32)).double() / (1.0 - p)


def dropout_mask(seed: Tensor | int, num_rows: int, num_cols: int, p: float, stream: int = 0) -> Tensor:
    """[M, K] float64: 0 where an element is dropped, 1/(1-q) where it is kept, q = round(p 2^16) / 2^16.

    Element (m, k) reads 16-bit half k % 8 (low half of word 0 first) of philox(seed; k // 8, m low, m high, stream)
    and is kept where that half >= round(p 2^16). The scale uses q, so the mask has mean exactly 1.
    """
    threshold = round(p * 65536)
    m, k = torch.arange(num_rows)[:, None], torch.arange((num_cols + 7) // 8)[None, :]
    words = philox(seed if isinstance(seed, int) else seed.cpu(), k, m & _WORD, m >> 32, torch.tensor(stream))
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(num_rows, 8 * words.shape[1])[:, :num_cols]
    return (halves >= threshold).double() * (65536 / (65536 - threshold))


def lightgcn_propagate(
    x: Tensor,
    graph: BipartiteGraph,
    num_layers: int,
    *,
    storage_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """1/(K+1) sum_{k=0..K} (D^-1/2 A D^-1/2)^k x, `[N, D]`, or its `rows`. See `collm_fast.ops.lightgcn_propagate`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    node = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), graph.crow.diff())
    col = graph.col.long()
    val = graph.inv_sqrt_degree[node].to(wide) * graph.inv_sqrt_degree[col].to(wide)
    if dropout_p > 0.0 and seed is not None:
        val = val * edge_mask(seed, torch.minimum(node, col), torch.maximum(node, col), dropout_p).to(wide)
    layer = total = x.to(wide)
    for _ in range(num_layers):
        layer = torch.zeros_like(layer).index_add(0, node, val[:, None] * layer[col])
        layer = layer if storage_dtype is None else layer.to(storage_dtype).to(wide)
        total = total + layer
    out = (total / (num_layers + 1)).to(x.dtype)
    return out if rows is None else out[rows]


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index], zero where index is -1. See `collm_fast.ops.gather_rows`."""
    if table.shape[0] == 0:
        return table.new_zeros(*index.shape, table.shape[1])
    out = table[index.clamp_min(0).long()]
    return out.masked_fill((index < 0)[..., None], 0)


def scatter_rows(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """out[s] = sum of grad over the places where index == s; -1 is skipped. See `collm_fast.ops.scatter_rows`."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    flat, keep = index.reshape(-1).long(), index.reshape(-1) >= 0
    out = torch.zeros(num_rows, grad.shape[-1], dtype=wide, device=grad.device)
    places = grad.reshape(len(flat), grad.shape[-1])[keep]
    return out.index_add(0, flat[keep], places.to(wide)).to(grad.dtype)


def embed_inject(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
    """rows[row_index] where row_index >= 0, else table[token_ids]. See `collm_fast.ops.embed_inject`."""
    if rows.shape[0] == 0 or table.shape[0] == 0:
        return table[token_ids] if rows.shape[0] == 0 else rows[row_index.long()]
    text = table[token_ids.masked_fill(row_index >= 0, 0)]
    return torch.where((row_index >= 0)[..., None], rows[row_index.clamp_min(0).long()], text)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    training: bool = False,
    stream: int = 0,
) -> Tensor:
    """x W^T + b + scaling * dropout(x) A^T B^T. See `collm_fast.ops.lora_linear`."""
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_A is None or lora_B is None:
        return y
    if training and dropout_p > 0.0 and seed is not None:
        mask = dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p, stream)
        x = x * mask.reshape(x.shape).to(x)
    return y + scaling * ((x.to(lora_A.dtype) @ lora_A.T) @ lora_B.T).to(y.dtype)


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    training: bool = False,
) -> list[Tensor]:
    """`lora_linear` for several projections of one x; projection j draws its mask from stream j."""
    return [
        lora_linear(x, w, b, lora_a, lora_b, scaling, dropout_p=dropout_p, seed=seed, training=training, stream=j)
        for j, (w, b, lora_a, lora_b) in enumerate(zip(weights, biases, lora_As, lora_Bs, strict=True))
    ]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x (mean x^2 + eps)^-1/2 over the last axis, in the dtype of w.

    x times its factor is rounded to the dtype of x before the weight, as in Llama.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    return torch.nn.functional.silu(gate) * up


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, h d] -> [h, T, d] at rotary positions: x cos + (-x2, x1) sin, cos and sin [T, d]."""
    heads = x.view(len(x), -1, cos.shape[1]).transpose(0, 1)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def path_visible(pieces: Tensor, counts: Tensor, window: int | None = None) -> Tensor:
    """[asked, past + own] bool: which keys the queries of packed trees see; pieces [N, 3] of (past, own, asked)."""
    past, own, asked = pieces.unbind(1)
    piece = torch.arange(len(pieces))
    prefix = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    start = torch.where(piece == prefix, 0, (past + own)[prefix])
    end = start + past + own

    def spread(first: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        within = torch.arange(int(size.sum())) - torch.repeat_interleave(size.cumsum(0) - size, size)
        return torch.repeat_interleave(piece, size), torch.repeat_interleave(first, size) + within

    (old, old_at), (new, new_at), (q, q_at) = spread(start, past), spread(end - own, own), spread(end - asked, asked)
    k, k_at, q, q_at = torch.cat((old, new)), torch.cat((old_at, new_at)), q[:, None], q_at[:, None]
    visible = ((k == q) | (k == prefix[q])) & (k_at <= q_at)
    return visible if window is None else visible & (k_at > q_at - window)


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
    """Attention along the paths of packed trees, [h, Q, d] queries of [key heads, T, d] keys and values: [Q, h, d]."""
    if past is not None:
        key, value = (torch.cat(pair, dim=1) for pair in zip(past, (key, value), strict=True))
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], dim=0) for x in (key, value))
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~path_visible(pieces, counts, window), -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(0, 1)

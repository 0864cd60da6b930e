"""Keys and values of prompt prefixes, kept across steps and evaluations within a budget of bytes.

Only prefixes whose values no gradient and no dropout reaches belong here; `CoLLM` sees to that, and `decoder.py`
computes them. Floor F2.
"""

from __future__ import annotations

import hashlib
import heapq
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.config import CacheOn
from collm_fast.models.decoder import Decoder, Past, Rotary
from collm_fast.models.layout import Head
from collm_fast.models.tree_plan import TreePlan

# A kept prefix gives way only to one that is met more than this many times as often: an epoch that meets all prefixes
# equally often then displaces none, where keeping the latest would never find one again.
_OFTENER = 2


class PrefixCache:
    """A pinned set of prefixes: the first that fit, later those met most often, which save most tokens for their bytes.

    Args:
        max_bytes: of all kept keys and values together, in the dtype they are computed in.
        on: device: where they are computed. host: in pinned host memory, copied both ways without waiting; for a model
            on a CPU the two are one memory. The copies have not run on a GPU yet.
    An entry is keyed by the prefix's token ids; all are dropped once a parameter of the language model is another
    tensor or was written to, as torch counts it: not through `.data`, and not by every fused optimizer. So nothing may
    be kept of a language model that trains; `CoLLM` sees to that, too.
    Raises: ValueError for a negative budget, or another place.
    """

    def __init__(self, max_bytes: int, on: CacheOn = "device") -> None:
        if max_bytes < 0:
            raise ValueError(f"prefix_cache: expected a budget of at least 0 bytes, got {max_bytes}")
        if on not in get_args(CacheOn):
            raise ValueError(f"prefix_cache: expected on to be device or host, got {on!r}")
        self.max_bytes, self.bytes, self.on = max_bytes, 0, on
        self.tokens_met = self.tokens_saved = 0
        self._kept: dict[bytes, Tensor] = {}
        self._met: dict[bytes, int] = {}
        self._seldom: list[tuple[int, bytes]] = []  # a heap of (times met, at least, key) of what is kept
        self._stamp: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def check(self, llm: Any) -> None:
        """Drop everything unless every parameter is where it was and nothing was written to it since."""
        stamp = [(parameter.data_ptr(), parameter._version) for parameter in llm.parameters()]
        if stamp != self._stamp:
            self.clear()
            self._stamp = stamp

    def clear(self) -> None:
        """Forget all prefixes, and whose they were."""
        self._kept.clear()
        self._met.clear()
        self._seldom.clear()
        self.bytes = 0
        self._stamp = []

    def get(self, token_ids: NDArray[np.int64]) -> Tensor | None:
        """The keys and values of a prefix, if they are kept, where they are kept; counts the meeting."""
        key = _key(token_ids)
        self._met[key] = self._met.get(key, 0) + 1
        found = self._kept.get(key)
        self.tokens_met += len(token_ids)
        self.tokens_saved += 0 if found is None else len(token_ids)
        return found

    def put(self, token_ids: NDArray[np.int64], values: Tensor) -> None:
        """Keep a prefix that `get` did not find, if there is room or it is met often enough to displace others."""
        key, size = _key(token_ids), values.numel() * values.element_size()
        if key in self._kept or size > self.max_bytes:
            return
        displaced: list[bytes] = []
        room = self.max_bytes - self.bytes
        while room < size and self._seldom:
            _, candidate = heapq.heappop(self._seldom)
            displaced.append(candidate)
            if self._met[key] <= _OFTENER * self._met[candidate]:
                break
            room += _bytes(self._kept[candidate])
        if room < size:
            for candidate in displaced:
                heapq.heappush(self._seldom, (self._met[candidate], candidate))
            return
        for candidate in displaced:
            self.bytes -= _bytes(self._kept.pop(candidate))
        self._kept[key] = values if self.on == "device" or values.device.type == "cpu" else _pinned(values)
        self.bytes += size
        heapq.heappush(self._seldom, (self._met[key], key))


def _key(token_ids: NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(token_ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _pinned(values: Tensor) -> Tensor:
    """A copy in pinned host memory. It is read on the stream that writes it, so nothing has to wait."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _bytes(values: Tensor) -> int:
    return values.numel() * values.element_size()


def cached_past(
    cache: PrefixCache,
    decoder: Decoder,
    token_ids: NDArray[np.int64],
    embeds: Tensor,
    rotary: Rotary,
    plan: TreePlan,
) -> Past:
    """`decoder.past`, with the trees that are one prefix without branches taken from the cache or left there.

    Every tree is run by itself, so that its bits do not depend on which others were found: a run that is resumed with
    an empty cache ends like one that was not.
    """
    parts: list[Tensor] = []
    start = 0
    for index, tree in enumerate(plan.trees):
        length = sum(piece.own for piece in tree)
        part = slice(start, start + length)
        start += length
        if length == 0:
            continue
        plain = tree[0].own == length
        values = cache.get(token_ids[part]) if plain else None
        if values is None:
            places = rotary[0][part], rotary[1][part]
            layers = decoder.past(embeds[part], places, plan.only(index))
            values = torch.stack([torch.cat(layer) for layer in layers])
            if plain:
                cache.put(token_ids[part], values)
        parts.append(values.to(embeds.device, non_blocking=True))
    whole = torch.cat(parts, dim=3)  # [layers, 2, h, T, d]
    return [(layer[:1], layer[1:]) for layer in whole]


def opened_past(cache: PrefixCache, decoder: Decoder, head: Head, embeds: Tensor, rotary: Rotary) -> Past:
    """`decoder.past` of a head with an opening, which runs once for all trees, and is kept."""
    opening = head.opening
    assert opening is not None
    first = slice(opening.tokens)
    places = rotary[0][first], rotary[1][first]
    kept = cached_past(cache, decoder, head.token_ids[first], embeds[first], places, opening.plan)
    trees = len(head.plan.trees)
    before = [(key.repeat(1, 1, trees, 1), value.repeat(1, 1, trees, 1)) for key, value in kept]
    if len(opening.place) == 0:
        return before
    embeds, places = embeds[opening.place], (rotary[0][opening.place], rotary[1][opening.place])
    others = decoder.past(embeds, places, opening.rest, before)

    def in_order(of_opening: Tensor, of_others: Tensor) -> Tensor:
        return torch.cat((of_opening, of_others), dim=2).index_select(2, opening.order)

    layers = zip(kept, others, strict=True)
    return [(in_order(key, more_keys), in_order(value, more)) for (key, value), (more_keys, more) in layers]

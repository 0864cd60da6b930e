"""One FlexAttention call a layer for all trees of a plan: for GPUs, where a call for each tree waits for its launch.

Which kernel serves where is `attention.kernel_of`; pieces and the cache of masks are `tree_plan.TreePlan`'s. What has
run: the mask and the forward on a CPU, uncompiled and compiled (once for each pair of lengths). On a GPU, and backward,
it has not run yet, and nothing of its speed is known. Floor F2.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.data.transfer import on_device

# What torch's kernels can do with a head.
_LEAST_WIDTH = 16
_BLOCK = 128
# A run has few pairs of lengths, each with and without a graph and with what a model has of windows. Beyond the limit
# torch would go on uncompiled, with a warning, and hold all scores at once.
_COMPILATIONS = 256


class Axes(NamedTuple):
    """[Q] or [K] int32: the piece of each query, its tree's prefix and its position; piece and position of each key."""

    query: NDArray[np.int32]
    prefix: NDArray[np.int32]
    query_position: NDArray[np.int32]
    key: NDArray[np.int32]
    key_position: NDArray[np.int32]


class Mask(NamedTuple):
    """A plan's mask as FlexAttention takes it, and all it is read from: another plan's values fit these tensors."""

    block: Any
    tensors: tuple[Tensor, ...]


def serves(query: Tensor) -> bool:
    """Whether FlexAttention's kernels take this tensor: on CUDA, in half precision, where triton is importable.

    In float32 they would multiply in TensorFloat-32, which torch's other attention does not do unasked.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and half and query.shape[-1] >= _LEAST_WIDTH and _importable()


@functools.cache
def _importable() -> bool:
    # A limit of its own for recompilations came to torch.compile later than FlexAttention did.
    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    return known and importlib.util.find_spec("triton") is not None


def axes(trees: Sequence[Sequence[tuple[int, int, int]]]) -> Axes:
    """Where the asked queries of trees of (past, own, asked) stand, and the keys: all past ones, then all own ones."""
    pieces = np.array([piece for tree in trees for piece in tree], np.int32)
    past, own, asked = pieces.T
    number = np.arange(len(pieces), dtype=np.int32)
    counts = np.array([len(tree) for tree in trees])
    prefix = np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
    start = np.where(number == prefix, 0, (past + own)[prefix])

    def positions(first: NDArray[Any], size: NDArray[Any]) -> NDArray[np.int32]:
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        return np.asarray(np.repeat(first, size) + within, np.int32)

    query = np.repeat(number, asked)
    key = np.concatenate((np.repeat(number, past), np.repeat(number, own)))
    key_position = np.concatenate((positions(start, past), positions(start + past, own)))
    return Axes(query, prefix[query], positions(start + past + own - asked, asked), key, key_position)


def padded_length(count: int) -> int:
    """The least of 128, 256, 384, 512, 768, 1024, ... (a power of two, or one and a half of it) that holds `count`."""
    power = max(_BLOCK, 1 << max(count - 1, 0).bit_length())
    less = power // 4 * 3
    return less if count <= less and less % _BLOCK == 0 else power


def visible(places: Axes, window: int | None, device: torch.device) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """FlexAttention's mask_mod over padded queries and keys, and the tensors that it reads.

    A query sees the keys of its own piece and of its tree's prefix, up to its position and `window` back. One past the
    last query sees the first key alone: a row without any key would have no softmax. No query sees a key past the last.
    """
    lengths = padded_length(len(places.query)), padded_length(len(places.key))

    def spread(values: NDArray[np.int32], length: int, rest: int) -> Tensor:
        out = np.full(length, rest, np.int32)
        out[: len(values)] = values
        return on_device(torch.from_numpy(out), device)

    first, start = int(places.key[0]), int(places.key_position[0])
    query, prefix = (spread(values, lengths[0], first) for values in (places.query, places.prefix))
    place = spread(places.query_position, lengths[0], start)
    key, behind = spread(places.key, lengths[1], -1), spread(places.key_position, lengths[1], 0)
    reach = sum(lengths) if window is None else window

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine = (key[k] == query[q]) | (key[k] == prefix[q])
        return mine & (behind[k] <= place[q]) & (behind[k] > place[q] - reach)

    return mask_mod, (query, prefix, place, key, behind)


def block_mask(places: Axes, window: int | None, device: torch.device) -> Mask:
    """FlexAttention's mask of a plan. To build it takes a few passes over [queries, keys] flags on the device."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask_mod, read = visible(places, window, device)
    lengths = len(read[0]), len(read[3])
    block = create_block_mask(mask_mod, None, None, *lengths, device=device, BLOCK_SIZE=_BLOCK)
    return Mask(block, (*read, *(part for part in block.as_tuple() if isinstance(part, Tensor))))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention, compiled once a process for each pair of lengths.

    Not with dynamic lengths: through torch 2.14 its own checks make them constants again (pytorch issue 189952).
    """
    from torch.nn.attention.flex_attention import flex_attention

    options: dict[str, Any] = {"recompile_limit": _COMPILATIONS}
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, **options)
    return compiled


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float,
    past: tuple[Tensor, Tensor] | None = None,
    call: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`attention.tree_attention` in one call of FlexAttention.

    Args: mask: the plan's `block_mask`. call: what computes it; None: torch's, compiled.
    """
    if past is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))

    def padded(x: Tensor) -> Tensor:
        rest = padded_length(x.shape[2]) - x.shape[2]
        return F.pad(x, (0, 0, 0, rest)) if rest else x

    q, k, v = map(padded, (query, key, value))
    out = (call or _compiled())(q, k, v, block_mask=mask.block, scale=scale, enable_gqa=True)
    return out[:, :, : query.shape[2]]

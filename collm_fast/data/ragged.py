"""Ragged arrays as (offsets, values): row r is values[offsets[r]:offsets[r + 1]]. Floor F2, imports numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
I64 = NDArray[np.int64]


def offsets_of(lengths: NDArray[np.integer]) -> I64:
    """[n + 1] int64 offsets of rows with the given lengths [n]."""
    out = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def spans(starts: I64, lengths: I64) -> I64:
    """The positions starts[i], starts[i] + 1, .. (lengths[i] of them), one span after the other, [sum(lengths)]."""
    total = int(lengths.sum())
    out = np.arange(total, dtype=np.int64)
    return out + np.repeat(starts - offsets_of(lengths)[:-1], lengths)


def take_ragged(offsets: I64, values: Array, rows: I64) -> tuple[I64, Array]:
    """The rows `rows` of a ragged array, as a ragged array."""
    return gather_spans(values, offsets[rows], offsets[rows + 1] - offsets[rows])


def gather_spans(values: Array, starts: I64, lengths: I64) -> tuple[I64, Array]:
    """The ragged array whose row r is values[starts[r]:starts[r] + lengths[r]]."""
    offsets = offsets_of(lengths)
    out = np.empty(int(offsets[-1]), dtype=values.dtype)
    # In parts: the positions of all histories of a large data set at once would be larger than the histories.
    for begin in range(0, len(starts), 16384):
        part = slice(begin, begin + 16384)
        out[offsets[begin] : offsets[min(begin + 16384, len(starts))]] = values[spans(starts[part], lengths[part])]
    return offsets, out

"""Data: readers, splits, histories, prompts, packing and the negative sampler. Floor F2: imports config, io, reference.

`prepare` turns a source into a folder, `load_dataset` reads it; prompts.py writes and tokenises the prompts of a split
and packing.py lays them out for the model. Their NumPy forms are the oracles of `_C` and what runs without a compiler.
"""

from __future__ import annotations

from collm_fast.data.dataset import Dataset, Split, load_dataset
from collm_fast.data.history import history_before
from collm_fast.data.prepare import prepare
from collm_fast.data.splits import warm_mask

__all__ = ["Dataset", "Split", "history_before", "load_dataset", "prepare", "warm_mask"]

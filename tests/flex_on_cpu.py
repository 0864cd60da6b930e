"""FlexAttention by its definition, for tests of what is built for a GPU: dense, forward and backward, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from collm_fast.models import attention, flex


def dense(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool) -> Tensor:
    """softmax(q k^T scale + mask) v, the mask read from `block_mask`: its blocks of keys, and its mask_mod in them."""
    assert enable_gqa
    queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    none = torch.zeros((), dtype=torch.int64, device=query.device)
    mask = block_mask.mask_mod(none, none, queries[:, None], keys[None, :])
    blocks = torch.zeros(len(queries) // 128, len(keys) // 128, dtype=torch.bool, device=query.device)
    place = torch.arange(blocks.shape[1], device=query.device)
    counted = (block_mask.kv_num_blocks, block_mask.kv_indices)
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    for number, index in (counted, full):
        # The first `number` of a row's indices count.
        blocks |= ((index[0, 0].long()[:, :, None] == place) & (place < number[0, 0, :, None])[:, :, None]).any(1)
    mask = mask & blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


@pytest.fixture
def flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attention is FlexAttention's, computed by `dense`."""
    monkeypatch.setattr(attention, "kernel_of", lambda query: "flex")
    monkeypatch.setattr(flex, "_compiled", lambda: dense)

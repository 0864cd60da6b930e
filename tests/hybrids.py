"""Hybrid models over small random language models, and the naive way that they are compared with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from small_llm import ITEMS, USERS, H
from torch import Tensor

from collm_fast.config import MapperConfig
from collm_fast.data.prompts import TARGET, USER, Prompts
from collm_fast.models.collm import CoLLM
from collm_fast.models.mapper import IdStatistics, Mapper

YES, NO, D = 7, 11, 6


def tables(seed: int = 0) -> Any:
    """What CoLLM reads of a collaborative model; row 0 is padding."""
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        user=torch.randn(USERS, D, generator=generator), item=torch.randn(ITEMS, D, generator=generator)
    )


def statistics() -> IdStatistics:
    generator = torch.Generator().manual_seed(5)
    return IdStatistics(torch.randn(USERS, 3, generator=generator), torch.randn(ITEMS, 3, generator=generator))


def make_mapper(inputs: Any = "embedding", tokens_per_id: int = 1) -> Mapper:
    torch.manual_seed(3)
    return Mapper(D, H, MapperConfig(inputs=inputs, tokens_per_id=tokens_per_id), stats_dim=3)


def hybrid(model: Any, mapper: Mapper | None = None, **options: Any) -> CoLLM:
    return CoLLM(model, yes_id=YES, no_id=NO, cf=tables() if mapper else None, mapper=mapper, **options)


def alone(model: Any, prompts: Prompts, row: int, mapper: Mapper | None) -> Tensor:
    """Logits [V] of one prompt, embedded slot by slot and run through the model's own forward."""
    cf, stats = tables(), statistics()
    span = slice(prompts.offsets[row], prompts.offsets[row + 1])
    table = model.get_input_embeddings()
    embeds = []
    for token, role, index, part in zip(
        prompts.token_ids[span], prompts.slot_role[span], prompts.slot_id[span], prompts.slot_part[span], strict=True
    ):
        if role == 0:
            embeds.append(table(torch.tensor(int(token))))
            continue
        assert mapper is not None
        side = "user" if role == USER else "item"
        parts = [getattr(cf, side)[index]]
        if mapper.stats_dim:
            parts.append(getattr(stats, side)[index])
        if mapper.pair_dim:
            product = cf.user[prompts.uid[row]] * cf.item[prompts.iid[row]]
            parts.append(product if role == TARGET else torch.zeros(D))
        embeds.append(mapper(torch.cat(parts)[None])[int(part)].to(table.weight.dtype))
    return model(inputs_embeds=torch.stack(embeds)[None]).logits[0, -1].float()


def all_alone(model: Any, prompts: Prompts, rows: np.ndarray, mapper: Mapper | None = None) -> Tensor:
    return torch.stack([alone(model, prompts, row, mapper)[YES] for row in rows])

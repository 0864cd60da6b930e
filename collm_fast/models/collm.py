"""CoLLM: a frozen language model that reads mapped collaborative embeddings inside a packed batch of prompts.

Loading the language model is models/llm.py, the attention over prompt trees models/attention.py, packing
data/packing.py, losses and optimisation training/. Floor F2.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from collm_fast.config import CacheOn, Loss
from collm_fast.data.prompts import TARGET, USER
from collm_fast.models.attention import register
from collm_fast.models.decoder import FAMILIES, Decoder, Past, Rotary, own_forward
from collm_fast.models.layout import Head, Layout
from collm_fast.models.lora import lora_layers
from collm_fast.models.mapper import IdStatistics, Mapper
from collm_fast.models.prefix_cache import PrefixCache, cached_past, opened_past
from collm_fast.ops.inject import embed_inject, gather_rows

if TYPE_CHECKING:
    from collm_fast.data.packing import PackedBatch
    from collm_fast.models.cf.frozen import CFModel

_log = logging.getLogger(__name__)

# For the keys and values of batches' openings: fifteen tokens take .35 MB of SmolLM2 in bfloat16, 8 of a 7B model.
_OPENINGS = 64 << 20


class CoLLM(nn.Module):
    """logit of a prompt = the language model's score of the answer at the prompt's last token.

        yes:     logit = h W[yes] (+ b[yes]),  the paper's form
        yes-no:  logit = h W[yes] - h W[no] (+ b[yes] - b[no])

    h is the last hidden row of the prompt, W the output head. The prompt's slots hold rows that the mapper makes from
    the frozen collaborative tables, once for every distinct slot of a batch.

    Args:
        llm: a causal language model as `load_llm` gives it; LoRA layers may already stand in it.
        yes_id, no_id: the answers' vocabulary ids (`answer_ids`). loss: which logit is read.
        cf, mapper: None for text-only prompts; a mapper needs a cf.
        stats: the tables that a `+stats` mapper reads beside the embedding.
        decoder: False: the model's own packed forward, without the check that `Decoder.of` makes.
        kv_cache_gb: keeps keys and values of prefixes of fixed text (before the first injected row) in so many GiB,
            while nothing in the language model trains; 0: of what all prompts of a batch begin with alone, at most 64
            MiB. A prefix is then run by itself where it is not found.
        kv_cache_on: where they are kept, `PrefixCache`.
    The language model stays in eval mode whatever `train()` says; only mapper and LoRA layers follow it.
    Families outside `FAMILIES` run row by row, padded, through their own forward: same logits, no speed-up.
    Raises: ValueError for ids outside the vocabulary or parts that do not fit together.
    Source: CoLLM (arXiv 2310.19488), sections 4.2 and 4.3.
    """

    llm: Any
    mapper: Mapper | None

    def __init__(
        self,
        llm: Any,
        *,
        yes_id: int,
        no_id: int,
        loss: Loss = "yes",
        cf: CFModel | None = None,
        mapper: Mapper | None = None,
        stats: IdStatistics | None = None,
        kv_cache_gb: float = 0.0,
        kv_cache_on: CacheOn = "device",
        decoder: bool = True,
    ) -> None:
        super().__init__()
        vocabulary, self.H = llm.get_input_embeddings().weight.shape
        for name, token in (("yes_id", yes_id), ("no_id", no_id)):
            if not 0 <= token < vocabulary:
                raise ValueError(f"collm: expected {name} in [0, {vocabulary}), got {token}")
        if loss not in ("yes", "yes-no"):
            raise ValueError(f"collm: expected loss yes or yes-no, got {loss!r}")
        if not 0 <= kv_cache_gb < float("inf"):
            raise ValueError(f"collm: expected kv_cache_gb of at least 0, got {kv_cache_gb}")
        self.prefixes = PrefixCache(int(kv_cache_gb * 2**30), kv_cache_on) if kv_cache_gb else None
        self.openings = PrefixCache(_OPENINGS)
        self.llm, self.mapper, self.loss = llm, mapper, loss
        self.yes_id, self.no_id = yes_id, no_id
        # On the device from the start: a list of Python integers would be moved there in every step.
        self.register_buffer("answer_ids", torch.tensor([yes_id, no_id], device=llm.device), persistent=False)
        self.answer_ids: Tensor
        self._set_tables(cf, mapper, stats)
        family = llm.config.model_type
        self.packed = family in FAMILIES
        if self.packed:
            llm.set_attn_implementation(register())
            self.decoder = Decoder.of(llm) if decoder else None
        else:
            known = ", ".join(FAMILIES)
            _log.warning("%s runs padded through its own forward; packed prompts are for %s", family, known)
        self.train(False)

    def _set_tables(self, cf: CFModel | None, mapper: Mapper | None, stats: IdStatistics | None) -> None:
        """Registers what a slot's features are gathered from: [embedding, statistics], one row an id."""
        if mapper is None:
            user = item = torch.zeros(0, 0)
        elif cf is None:
            raise ValueError("collm: expected a collaborative model beside the mapper, got None")
        else:
            user, item = cf.user, cf.item
            if user.shape[1] != mapper.d or item.shape[1] != mapper.d or mapper.H != self.H:
                got = f"{list(user.shape)}, {list(item.shape)} and rows of {mapper.H}"
                raise ValueError(f"collm: expected tables [.., {mapper.d}] and mapped rows of {self.H}, got {got}")
            if mapper.stats_dim:
                if stats is None or stats.dim != mapper.stats_dim:
                    columns = None if stats is None else stats.dim
                    raise ValueError(f"collm: expected statistics of {mapper.stats_dim} columns, got {columns}")
                if len(stats.user) != len(user) or len(stats.item) != len(item):
                    got = f"{len(stats.user)} and {len(stats.item)}"
                    raise ValueError(f"collm: expected statistics of {len(user)} users, {len(item)} items, got {got}")
                user, item = torch.cat((user, stats.user), 1), torch.cat((item, stats.item), 1)
        # Not persistent: they are the collaborative model's state, which has a file of its own.
        self.register_buffer("user_table", user.detach().float(), persistent=False)
        self.register_buffer("item_table", item.detach().float(), persistent=False)
        self.user_table: Tensor
        self.item_table: Tensor

    def train(self, mode: bool = True) -> CoLLM:
        """Mapper and LoRA layers follow `mode`; the language model stays in eval mode."""
        super().train(mode)
        self.llm.eval()
        for _, layer in lora_layers(self.llm):
            layer.training = mode
        return self

    @property
    def table(self) -> Tensor:
        """The language model's token embeddings [V, H]."""
        weight: Tensor = self.llm.get_input_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits of a batch's rows.

        Args: batch: on the CPU, where its layout is read without waiting for a device; what the device needs is moved.
        Returns: [B] float32.
        Raises: ValueError for slots without a mapper, ids outside the tables, or a broken layout.
        """
        if self.packed:
            return self.compute(self.layout(batch))
        self._check(batch)
        return self._padded(batch)

    def layout(self, batch: PackedBatch, *, padded: bool = False) -> Layout:
        """What `compute` reads of a batch that lies on the CPU; `padded` as in `Layout.of`.

        Without gradients it may leave out the graph of tokens that train: `compute` must run in the same mode.
        Raises: ValueError as `forward`.
        """
        self._check(batch)
        free: bool | None = None
        opening: Literal["kept", "once"] | None = None
        if self.decoder is not None:
            graph, fixed = torch.is_grad_enabled(), self._llm_is_fixed()
            trains = graph and self._mapper_trains() and batch.slot_id.numel() > 0
            cache = self._cache(self.decoder)
            if (trains or cache is not None) and fixed:
                free = trains
            # A cache holds whole prefixes.
            if cache is None and self.decoder.fixed_positions and not self.table.is_inference():
                if fixed:
                    opening = "kept"
                elif not (graph or self._draws()):
                    opening = "once"
        return Layout.of(batch, self.device, free_branches=free, opening=opening, padded=padded)

    def compute(self, layout: Layout) -> Tensor:
        """The logits of a batch that is laid out, [B] float32. Nothing waits for the device.

        And nothing is moved to it once `Layout.tensors` was called, but for a prefix cache in host memory.
        """
        moved, plan, head = layout.batch, layout.plan, layout.head
        mapped = self.mapped_rows(moved)
        if self.decoder is None:
            embeds = embed_inject(moved.token_ids, self.table, mapped, moved.row_index)
            hidden = own_forward(self.llm.base_model, embeds, moved.position_ids, plan)[moved.answer]
            return self._read(self._answer_logits(hidden))
        cos, sin = self.decoder.rotary(moved.position_ids, self.table)
        ids, row_index, past = moved.token_ids, moved.row_index, None
        if head is not None:
            past = self._past(self.decoder, head, ids, (cos[head.place], sin[head.place]))
            ids, row_index, cos, sin = (x[head.rest] for x in (ids, row_index, cos, sin))
        embeds = embed_inject(ids, self.table, mapped, row_index)
        hidden = self.decoder.answers(embeds, (cos, sin), plan, past)
        return self._read(self._answer_logits(hidden[layout.order]))

    def _past(self, decoder: Decoder, head: Head, token_ids: Tensor, rotary: Rotary) -> Past:
        """Keys and values of the head's tokens, without a graph or out of a cache."""
        embeds, cache = gather_rows(self.table, token_ids[head.place]), self._cache(decoder)
        if cache is not None:
            cache.check(self.llm)
            return cached_past(cache, decoder, head.token_ids, embeds, rotary, head.plan)
        if head.opening is not None:
            if head.opening.kept:
                self.openings.check(self.llm)
            else:
                self.openings.clear()
            return opened_past(self.openings, decoder, head, embeds, rotary)
        return decoder.past(embeds, rotary, head.plan)

    def _cache(self, decoder: Decoder) -> PrefixCache | None:
        return self.prefixes if decoder.fixed_positions else None

    def _mapper_trains(self) -> bool:
        return self.mapper is not None and any(parameter.requires_grad for parameter in self.mapper.parameters())

    def _llm_is_fixed(self) -> bool:
        """Whether nothing in the language model trains or is drawn at random: a prefix then has one value, no gradient.

        With LoRA dropout on in stage 2, as the official code has it, every token keeps the graph and its own mask.
        """
        trains = any(parameter.requires_grad for parameter in self.llm.parameters())
        return not trains and not self._draws()

    def _draws(self) -> bool:
        return any(layer.draws for _, layer in lora_layers(self.llm))

    def _answer_logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> [B, 2] float32: the two answers' logits, from their two rows of the head alone."""
        head, ids = self.llm.get_output_embeddings(), self.answer_ids
        if type(head).forward is not nn.Linear.forward:  # an adapted or quantised head: its weight is not all of it
            logits: Tensor = head(hidden.to(self.table.dtype))
            return logits[:, ids].float()
        bias = None if head.bias is None else head.bias[ids].float()
        return nn.functional.linear(hidden.float(), head.weight[ids].float(), bias)

    def _read(self, answers: Tensor) -> Tensor:
        return answers[:, 0] if self.loss == "yes" else answers[:, 0] - answers[:, 1]

    def mapped_rows(self, batch: PackedBatch) -> Tensor:
        """The batch's injected rows [S tokens_per_id, H] in the model's dtype; [0, H] where it has no slots."""
        if self.mapper is None or batch.slot_id.numel() == 0:
            return self.table.new_empty(0, self.H)
        rows: Tensor = self.mapper(self.slot_features(batch))
        return rows.to(self.table.dtype)

    def slot_features(self, batch: PackedBatch) -> Tensor:
        """[S, d_in] float32: embedding, statistics and, in a target item's slot, the product u * i."""
        assert self.mapper is not None
        role, index = batch.slot_role.to(self.device), batch.slot_id.to(self.device).long()
        is_user = role == USER
        # Index 0 is padding in both tables: each gather stays inside its table whatever the other's size.
        user = self.user_table[index.masked_fill(~is_user, 0)]
        item = self.item_table[index.masked_fill(is_user, 0)]
        features = torch.where(is_user[:, None], user, item)
        if self.mapper.pair_dim:
            d, pair = self.mapper.d, batch.slot_pair.to(self.device).long()
            target = role == TARGET
            pair = pair.masked_fill(~target[:, None], 0)
            product = self.user_table[pair[:, 0], :d] * self.item_table[pair[:, 1], :d]
            features = torch.cat((features, product.masked_fill(~target[:, None], 0)), dim=1)
        return features

    def _check(self, batch: PackedBatch) -> None:
        if batch.slot_id.numel() == 0:
            return
        if self.mapper is None:
            raise ValueError(f"collm: expected a mapper for the prompts' {batch.slot_id.numel()} slots, got None")
        role, index = batch.slot_role.cpu().numpy(), batch.slot_id.cpu().numpy()
        sides = [("user", self.user_table, index[role == USER]), ("item", self.item_table, index[role != USER])]
        if self.mapper.pair_dim:
            pair = batch.slot_pair.cpu().numpy()[role == TARGET]
            if (pair[:, 0] == 0).any():
                raise ValueError("collm: expected a batch packed with pairs=True for a +pair mapper, got one without")
            sides += [("user", self.user_table, pair[:, 0]), ("item", self.item_table, pair[:, 1])]
        for name, table, ids in sides:
            bad = ids[(ids < 0) | (ids >= len(table))]
            if len(bad):
                raise ValueError(f"collm: expected {name} ids in [0, {len(table)}), got {bad[0]}")

    def _padded(self, batch: PackedBatch) -> Tensor:
        """The same logits through the model's own forward: every prompt a right-padded row of [B, L]."""
        tree, branch, answer = (x.cpu().numpy() for x in (batch.tree, batch.branch, batch.answer))
        rows = [np.flatnonzero((tree == tree[a]) & ((branch < 0) | (branch == branch[a]))) for a in answer]
        source = nn.utils.rnn.pad_sequence([torch.from_numpy(r) for r in rows], batch_first=True, padding_value=-1)
        source = source.to(self.device)
        mask, last = (source >= 0).long(), torch.tensor([len(r) - 1 for r in rows], device=self.device)
        batch = batch.to(self.device)
        source = source.clamp_min(0)
        embeds = self.llm.get_input_embeddings()(batch.token_ids[source])
        rows_index = batch.row_index[source].long()
        mapped = self.mapped_rows(batch)
        if len(mapped):
            embeds = torch.where((rows_index >= 0)[..., None], mapped[rows_index.clamp_min(0)], embeds)
        # Logits of [B, L, V] are never needed whole: ask for the last positions where the model lets one ask.
        keep, where = torch.unique(last, return_inverse=True)
        asks = "logits_to_keep" in inspect.signature(self.llm.forward).parameters
        options = {"logits_to_keep": keep} if asks else {}
        logits = self.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **options).logits
        chosen = logits[torch.arange(len(last), device=self.device), where if asks else last]
        return self._read(chosen[:, [self.yes_id, self.no_id]].float())

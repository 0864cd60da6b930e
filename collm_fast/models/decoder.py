"""A forward of our own over the decoder layers of a loaded Hugging Face model, for packed prompt trees.

It calls the model's own modules (so adapted and quantised layers in their place keep working) and computes less: the
last layer's queries and MLP only where an answer is read, and tokens before the first injected row without a graph.
Attention is models/attention.py, embeddings and the head are models/collm.py. Floor F2.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.models.attention import tree_attention
from collm_fast.models.frozen import add_projected, mlp_residual, norm
from collm_fast.models.lora import LoraLinear, project_together
from collm_fast.models.tree_plan import TreePlan
from collm_fast.ops.decoder import rotate_heads

_log = logging.getLogger(__name__)

# RMSNorm, rotary positions, grouped-query attention and a gated MLP, in layers of one shape.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_BASE = ("layers", "norm", "rotary_emb")
_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")

Past = list[tuple[Tensor, Tensor]]
Rotary = tuple[Tensor, Tensor]


class Decoder:
    """The decoder layers of a causal language model over one packed token axis.

        x = x + o_proj(attention(q, k, v)),  q, k, v of norm(x);   x = x + mlp(norm(x))

    x is float32 where the model is in half precision: what every layer adds is rounded, their sum is not. Rounded after
    every layer, as models do by themselves, it drowned the gradient that stage 2 trains on: SmolLM2 in bfloat16 after
    the demo's stage 1, batches of 16, was off by 1.1 to 2.3 times the mapper's gradient of float32 (the same weights;
    the model's own forward, or ours with any attention), and with x in float32 by .5 to .9 times.

    Args: llm: a model of `FAMILIES`; `Decoder.of` asks first whether it is one.
    Dropout of LoRA layers is drawn by the row of each layer's input: the packed position, but for o_proj and the MLP
    of the last layer, whose rows are the answers in packed order.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.base = llm.base_model
        # Mistral keeps its window in the configuration, for all layers; the others in each layer that has one.
        every = llm.config.sliding_window if llm.config.model_type == "mistral" else None
        # Positions whose frequencies depend on how long the batch is: a key then is not its prefix's alone.
        self.fixed_positions = getattr(self.base.rotary_emb, "rope_type", "default") not in ("dynamic", "longrope")
        self.windows = [every or getattr(layer.self_attn, "sliding_window", None) for layer in self.base.layers]

    @classmethod
    def of(cls, llm: Any) -> Decoder | None:
        """The decoder of a model, or None, with a warning, where this forward is not the model's own.

        Its structure is looked at, and then every layer's output for a small packed batch is compared, normwise, with
        what the model itself computes from the same input. The model's attention must be `attention.register()`'s.
        """
        reason = _missing(llm)
        if reason is None:
            decoder = cls(llm)
            reason = decoder._difference()
            if reason is None:
                return decoder
        family = llm.config.model_type
        _log.warning("%s runs through its own forward, with more work than the answers need: %s", family, reason)
        return None

    def rotary(self, position_ids: Tensor, like: Tensor) -> Rotary:
        """(cos, sin), [T, d] each, of the positions of a whole batch."""
        cos, sin = self.base.rotary_emb(like, position_ids[None])
        return cos[0], sin[0]

    @torch.no_grad()
    def past(self, x: Tensor, rotary: Rotary, plan: TreePlan, past: Past | None = None) -> Past:
        """Keys and values [1, h, T, d] of every layer, without a graph, for tokens whose output nobody reads.

        Args: x, rotary, past: as for `answers`.
        """
        x, found = _stream(x), []
        for index, layer in enumerate(self.base.layers):
            normed = norm(layer.input_layernorm, x)
            # The last layer's output is read nowhere.
            if index + 1 == len(self.base.layers):
                found.append(self._keys(layer.self_attn, normed, rotary))
            else:
                query, key, value = self._heads_of(layer.self_attn, normed, rotary)
                found.append((key, value))
                x = self._rest(layer, x, self._attend(index, query, key, value, plan, past), into_x=index > 0)
        return found

    def answers(self, x: Tensor, rotary: Rotary, plan: TreePlan, past: Past | None = None) -> Tensor:
        """The model's last hidden states [B, H], float32 at least: its final norm's, at the last token of each branch.

        Args:
            x: [T, H], the embeddings of the plan's own tokens. rotary: their positions'.
            past: keys and values of the plan's past tokens.
        """
        x, last = _stream(x), len(self.base.layers) - 1
        for index, layer in enumerate(self.base.layers):
            attention, normed = layer.self_attn, norm(layer.input_layernorm, x)
            if index < last:
                query, key, value = self._heads_of(attention, normed, rotary)
            else:
                place = plan.ends_on(x.device)
                # A dropout mask belongs to the packed position, so that it is drawn for all of them.
                if isinstance(attention.q_proj, LoraLinear) and attention.q_proj.draws:
                    query, key, value = self._heads_of(attention, normed, rotary)
                    query = query[:, :, place]
                else:
                    key, value = self._keys(attention, normed, rotary)
                    at = rotary[0][place], rotary[1][place]
                    query = _heads(attention, attention.q_proj(normed[place]), "q_norm", at)
                x, plan = x[place], plan.answers()
            x = self._rest(layer, x, self._attend(index, query, key, value, plan, past), into_x=index > 0)
        return norm(self.base.norm, x, wide=True)

    def _heads_of(self, attention: Any, normed: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        q, k, v = project_together((attention.q_proj, attention.k_proj, attention.v_proj), normed)
        key = _heads(attention, k, "k_norm", rotary)
        return _heads(attention, q, "q_norm", rotary), key, _heads(attention, v, None, None)

    def _keys(self, attention: Any, normed: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        k, v = project_together((attention.k_proj, attention.v_proj), normed)
        return _heads(attention, k, "k_norm", rotary), _heads(attention, v, None, None)

    def _attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, past: Past | None
    ) -> Tensor:
        scaling, before = self.base.layers[index].self_attn.scaling, None if past is None else past[index]
        out = tree_attention(query, key, value, plan, scaling=scaling, window=self.windows[index], past=before)
        return out[0].transpose(0, 1).flatten(1)

    def _rest(self, layer: Any, x: Tensor, attended: Tensor, *, into_x: bool = False) -> Tensor:
        """What follows attention; x may be overwritten where `into_x` says that it is nobody else's."""
        return mlp_residual(layer, add_projected(x, layer.self_attn.o_proj, attended, into_x=into_x))

    @torch.no_grad()
    def _difference(self) -> str | None:
        """What differs between this forward and the model's own, if anything does."""
        tree, branch = np.repeat([0, 1], (12, 3)), np.repeat([-1, 0, 1, 2], (5, 3, 4, 3))
        position = np.array([*range(5), *range(5, 8), *range(5, 9), *range(3)])
        table = self.llm.get_input_embeddings().weight
        plan = TreePlan(tree, branch, per_branch=table.device.type == "cpu")
        ids = torch.arange(len(tree), device=table.device) * (len(table) // len(tree))
        positions = torch.from_numpy(position).to(table.device)
        embeds = table[ids]
        inputs, outputs = self._own_layers(embeds, positions, plan)
        rotary = self.rotary(positions, embeds)
        limit = max(1e-4, 3 * torch.finfo(embeds.dtype).eps)
        for index, (x, theirs) in enumerate(zip(map(_stream, inputs), outputs[:-1], strict=True)):
            layer = self.base.layers[index]
            normed = norm(layer.input_layernorm, x)
            query, key, value = self._heads_of(layer.self_attn, normed, rotary)
            ours = self._rest(layer, x, self._attend(index, query, key, value, plan, None))
            error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
            # Not "error > limit": a nan is a difference too.
            if not error <= limit:
                return f"layer {index} differs by {error:.1e} from the model's own"
        if not torch.allclose(norm(self.base.norm, outputs[-2]), outputs[-1], rtol=limit, atol=limit):
            return "the final norm differs from the model's own"
        return None

    def _own_layers(self, embeds: Tensor, positions: Tensor, plan: TreePlan) -> tuple[list[Tensor], list[Tensor]]:
        """(the input of each layer, the output of each layer and the final one) of the model's own forward."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def seen(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"])[0])
            outputs.append((out[0] if isinstance(out, tuple) else out)[0])

        hooks = [layer.register_forward_hook(seen, with_kwargs=True) for layer in self.base.layers]
        try:
            outputs.append(own_forward(self.base, embeds, positions, plan))
        finally:
            for hook in hooks:
                hook.remove()
        return inputs, outputs


def _stream(x: Tensor) -> Tensor:
    """The layers' running sum in the dtype it is kept in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_forward(base: Any, embeds: Tensor, position_ids: Tensor, plan: TreePlan) -> Tensor:
    """[T, H] -> [T, H]: the model's own forward of packed tokens, its attention by the plan."""
    hidden: Tensor = base(
        inputs_embeds=embeds[None],
        position_ids=position_ids[None],
        # Any 4-D mask keeps transformers from building its own [T, T] one; the tree attention reads its plan alone.
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        use_cache=False,
        tree_plan=plan,
    ).last_hidden_state[0]
    return hidden


def _missing(llm: Any) -> str | None:
    if llm.config.model_type not in FAMILIES:
        return f"its family is none of {', '.join(FAMILIES)}"
    base = llm.base_model
    wanted = [(base, name) for name in _BASE]
    for layer in getattr(base, "layers", ()):
        wanted += [(layer, name) for name in _LAYER]
        wanted += [(getattr(layer, "self_attn", None), name) for name in _ATTENTION]
    lacking = next((name for module, name in wanted if not hasattr(module, name)), None)
    return None if lacking is None else f"it has no {lacking}"


def _heads(attention: Any, x: Tensor, head_norm: str | None, rotary: Rotary | None) -> Tensor:
    """[T, h d] -> [1, h, T, d], normed where the family norms heads, at its position where it has one."""
    x = x.view(len(x), -1, attention.head_dim)
    if head_norm is not None and hasattr(attention, head_norm):
        x = norm(getattr(attention, head_norm), x)
    if rotary is not None:
        return rotate_heads(x.flatten(1), *rotary)[None]
    return x.transpose(0, 1)[None]


def gradient_free(plan: TreePlan, row_index: NDArray[np.int32], *, branches: bool = True) -> list[list[int]] | None:
    """How many tokens of each piece stand before the first injected row of their path; None where no token does.

    The last token of a branch is never counted: its output is read. branches=False counts in shared prefixes alone.
    """
    sizes = np.array([piece.own for tree in plan.trees for piece in tree])
    ends = np.cumsum(sizes)
    starts = ends - sizes
    injected = np.append(np.flatnonzero(row_index >= 0), len(row_index))
    free = (np.minimum(injected[np.searchsorted(injected, starts)], ends) - starts).tolist()
    cut, at = [], 0
    for tree in plan.trees:
        prefix, *rest = free[at : at + len(tree)]
        at += len(tree)
        if prefix < tree[0].own or not branches:
            rest = [0] * len(rest)
        cut.append([prefix, *(min(n, piece.own - 1) for n, piece in zip(rest, tree[1:], strict=True))])
    return cut if any(map(any, cut)) else None

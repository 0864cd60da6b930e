"""What one forward of a packed batch reads, made before it starts: its trees, and everything else on the device.

`CoLLM.layout` makes it and `CoLLM.compute` reads it. Once `tensors` of a padded layout was called, which also makes the
masks, nothing is moved to a device any more; and they fit into those of another one of its shape, which is what a CUDA
graph needs (training/graphs.py). Floor F2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from collm_fast.data.packing import PackedBatch
from collm_fast.data.prompts import USER
from collm_fast.data.transfer import on_device
from collm_fast.models.decoder import gradient_free
from collm_fast.models.flex import padded_length
from collm_fast.models.tree_plan import TreePlan

# An opening of fewer tokens saves less than the copies of its keys cost.
_SHORTEST = 4


@dataclass(frozen=True)
class Opening:
    """Text that all trees of a batch begin with: it runs once, as a tree of its own."""

    plan: TreePlan
    rest: TreePlan  # the head's other tokens, to each of whose trees it is past
    place: Tensor  # [R] int64, where these stand in the head
    order: Tensor  # [P] int64, of each token of the head its place in [opening, others]
    kept: bool  # whether its keys and values stay for later batches

    @property
    def tokens(self) -> int:
        return self.plan.trees[0][0].own

    @classmethod
    def of(cls, plan: TreePlan, tokens: int, device: torch.device, *, kept: bool) -> Opening:
        """Of a head whose trees all begin with so many tokens alike."""
        cut = _of_prefixes(plan, tokens)
        at, place = plan.own_places(cut)
        first, rest = plan.split(cut)
        order = np.empty(len(at) + len(place), np.int64)
        order[at] = np.tile(np.arange(tokens), len(plan.trees))
        order[place] = tokens + np.arange(len(place))
        others, places = (on_device(torch.from_numpy(x), device) for x in (place, order))
        return cls(first.only(0), rest, others, places, kept)


@dataclass(frozen=True)
class Head:
    """Tokens that run first, without a graph; the others see their keys.

    Those before the first injected row, or the opening alone where nothing has a graph.
    """

    plan: TreePlan
    place: Tensor  # [P] int64, where they stand in the batch
    rest: Tensor  # [Q] int64, where the others stand
    token_ids: NDArray[np.int64]  # [P]
    opening: Opening | None


@dataclass(frozen=True)
class Layout:
    """A batch on the device, the plan of the tokens whose answers are read, and the place of each row's answer."""

    batch: PackedBatch
    plan: TreePlan
    order: Tensor  # [B] int64: the row's branch among the plan's
    head: Head | None

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        device: torch.device,
        *,
        free_branches: bool | None = None,
        opening: Literal["kept", "once"] | None = None,
        padded: bool = False,
    ) -> Layout:
        """Lay out a batch that lies on the CPU.

        Args:
            free_branches: None: all tokens run together. Else those before the first injected row are the head, True:
                in branches too, False: in shared prefixes alone.
            opening: what all trees begin with runs once; where no other token runs before the rest, it is the head.
                kept: for later batches too. Not of a padded batch, whose last tree begins with nothing.
            padded: with further tokens and slots that nobody reads, so that few shapes occur.
        Raises: ValueError where a row's answer is not the end of its branch, or the trees are broken.
        """
        plan = TreePlan(batch.tree.cpu().numpy(), batch.branch.cpu().numpy(), per_branch=device.type == "cpu")
        branch = np.argsort(batch.answer.cpu().numpy())
        if not np.array_equal(batch.answer.cpu().numpy()[branch], plan.ends()):
            raise ValueError("collm: expected the answer of every row at the end of its branch, got others")
        cut = None
        if free_branches is not None:
            cut = gradient_free(plan, batch.row_index.cpu().numpy(), branches=free_branches)
        shared = _opening(batch, plan) if opening and not padded else 0
        if shared and cut is None:
            cut = _of_prefixes(plan, shared)
        if padded:
            batch, plan, cut = _padded(batch, plan, cut)
        head = None
        if cut is not None:
            places = plan.own_places(cut)
            first, plan = plan.split(cut)
            place, rest = (on_device(torch.from_numpy(x), device) for x in places)
            opened = Opening.of(first, shared, device, kept=opening == "kept") if shared else None
            head = Head(first, place, rest, batch.token_ids.cpu().numpy()[places[0]], opened)
        order = on_device(torch.from_numpy(np.argsort(branch)), device)
        return cls(batch.to(device), plan, order, head)

    @property
    def shape(self) -> tuple[int, ...]:
        """(tokens, those of the head, rows, slots): what the shapes of all `tensors` follow from."""
        first = 0 if self.head is None else len(self.head.place)
        return len(self.batch.token_ids), first, len(self.batch), len(self.batch.slot_id)

    def tensors(self, windows: Iterable[int | None]) -> list[Tensor]:
        """All that `CoLLM.compute` reads of it where FlexAttention serves, in one order for all layouts of a shape."""
        moved, device = self.batch, self.order.device
        found = [moved.token_ids, moved.position_ids, moved.row_index, moved.label]
        found += [moved.slot_role, moved.slot_id, moved.slot_pair, self.order, self.plan.ends_on(device)]
        plans = [self.plan, self.plan.answers()]
        if self.head is not None:
            found += [self.head.place, self.head.rest]
            plans.append(self.head.plan)
        for plan in plans:
            for window in windows:
                found += plan.block_mask(window, device).tensors
        return found


def _of_prefixes(plan: TreePlan, tokens: int) -> list[list[int]]:
    """A cut behind so many tokens of every tree."""
    return [[tokens, *[0] * (len(tree) - 1)] for tree in plan.trees]


def _opening(batch: PackedBatch, plan: TreePlan) -> int:
    """How many tokens of text all trees begin with alike; 0 where running them once would not pay."""
    sizes = np.array([[tree[0].own, sum(piece.own for piece in tree)] for tree in plan.trees])
    places = (np.cumsum(sizes[:, 1]) - sizes[:, 1])[:, None] + np.arange(sizes[:, 0].min())
    ids, row_index = (x.cpu().numpy()[places] for x in (batch.token_ids, batch.row_index))
    alike = ((ids == ids[:1]) & (row_index < 0)).all(axis=0)
    shared = len(alike) if alike.all() else int(np.argmin(alike))
    return shared if shared >= _SHORTEST and len(plan.trees) > 1 else 0


def _padded(
    batch: PackedBatch, plan: TreePlan, cut: list[list[int]] | None
) -> tuple[PackedBatch, TreePlan, list[list[int]] | None]:
    """Behind all trees one more without a branch, and slots that no token names; head and rest are padded each."""
    total, first = len(batch.token_ids), 0 if cut is None else sum(map(sum, cut))
    before = padded_length(first) - first if first else 0
    tokens = before + padded_length(total - first) - (total - first)
    slots = padded_length(len(batch.slot_id)) - len(batch.slot_id) if len(batch.slot_id) else 0
    filled = replace(
        batch,
        token_ids=F.pad(batch.token_ids, (0, tokens)),
        position_ids=F.pad(batch.position_ids, (0, tokens)),
        row_index=F.pad(batch.row_index, (0, tokens), value=-1),
        tree=F.pad(batch.tree, (0, tokens), value=len(plan.trees)),
        branch=F.pad(batch.branch, (0, tokens), value=-1),
        slot_role=F.pad(batch.slot_role, (0, slots), value=USER),
        slot_id=F.pad(batch.slot_id, (0, slots)),
        slot_pair=F.pad(batch.slot_pair, (0, 0, 0, slots)),
    )
    if tokens == 0:
        return filled, plan, cut
    return filled, plan.with_filler(tokens), None if cut is None else [*cut, [before]]

"""Fits a collaborative model to the train rows of a dataset, with early stopping on validation AUC.

The models are models/cf; what a fitted one is and how it is stored, models/cf/frozen.py. Floor F3.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce_loss
from tqdm import tqdm

from collm_fast import metrics
from collm_fast.config import CFConfig, TrainConfig, to_mapping
from collm_fast.data.dataset import Dataset, Split
from collm_fast.data.sampler import Positives, batches_of, sample_negatives
from collm_fast.graph import BipartiteGraph
from collm_fast.io.atomic import write_atomic
from collm_fast.io.run_folder import RunFolder
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.cf.lightgcn import LightGCN
from collm_fast.models.cf.mf import MF
from collm_fast.training.bpr import bpr_loss
from collm_fast.training.scores import baseline_scores, table_of

MODELS: dict[str, type[MF]] = {"mf": MF, "lightgcn": LightGCN}
# Validation rows scored at once: their gathered embeddings stay within some tens of MB.
_BLOCK = 16384

_log = logging.getLogger(__name__)


def held_out_rows(split: Split, fraction: float) -> NDArray[np.bool_]:
    """[n] true for the rows that the collaborative model does not see: the latest of each user.

    Of a user's m rows the last floor(fraction m) by time are held out; of equal times, the later rows.

    Raises: ValueError for a fraction outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"held_out_rows: expected fraction in [0, 1), got {fraction}")
    order = np.lexsort((split.timestamp, split.uid))
    rows = np.bincount(split.uid)
    # Place of each row among its user's, counted from the user's last.
    first = np.cumsum(rows) - rows
    user = split.uid[order]
    from_last = rows[user] - 1 - (np.arange(len(split)) - first[user])
    held_out = np.zeros(len(split), dtype=bool)
    # The small term keeps 0.3 of 10 rows at 3, which floating point would make 2.
    held_out[order] = from_last < np.floor(fraction * rows[user] + 1e-9)
    return held_out


def with_recipe(config: CFConfig) -> CFConfig:
    """`config` with the model's own dim, lr and weight_decay, and the seed 2023, where it says None.

    Raises: ValueError for a model that this version does not have.
    """
    if config.model not in MODELS:
        known = " or ".join(MODELS)
        raise ValueError(f"fit_cf: expected model {known}, got {config.model!r}, which a later version brings")
    recipe = {**MODELS[config.model].recipe(), "seed": TrainConfig().seed}
    return replace(config, **{name: value for name, value in recipe.items() if getattr(config, name) is None})


def fit_cf(dataset: Dataset, config: CFConfig, *, out: Path | None = None, progress: bool = False) -> CFModel:
    """Fit MF or LightGCN and keep the epoch with the best validation AUC.

        bce: mean_(u,i) [softplus(s_ui) - label_ui s_ui]        over the train rows
        bpr: mean_(u,i) softplus(s_uj - s_ui)                   over the liked ones, j drawn anew in every epoch

    Adam with the weight decay added to the gradient, as published; stops after `patience` epochs without a better
    validation AUC. The last `held_out` of each user's train rows reach neither the loss nor the graph. Equal seeds
    give equal bits.

    Args:
        dataset: prepared data.
        config: None fields mean the model's recipe.
        out: a folder for cf.safetensors, config.yaml and metrics.json (rows item_mean, item_user_mean and cf on
            valid and test); None writes nothing.
        progress: a bar over the epochs on stderr.
    Returns: the fitted model.
    Raises: ValueError, before any work, for a model of a later version, an `out` that holds a run, or splits without
        the labels that training and validation need; and where training diverges.
    Source: CoLLM (arXiv 2310.19488), section 5.1; BPR: Rendle et al. (UAI 2009).
    """
    config = with_recipe(config)
    if out is not None and any((Path(out) / name).exists() for name in ("metrics.json", "run.json")):
        raise ValueError(f"fit_cf: expected a folder without a run, got {out}")
    train = dataset.splits["train"].take(~held_out_rows(dataset.splits["train"], config.held_out))
    _check_labels(train, dataset.splits["valid"], config)
    fitted = _fit(dataset, train, config, progress)
    if out is not None:
        _write(fitted, dataset, Path(out))
    return fitted


def _check_labels(train: Split, valid: Split, config: CFConfig) -> None:
    for name, split, classes in (("train", train, (1,) if config.loss == "bpr" else (0, 1)), ("valid", valid, (0, 1))):
        missing = [value for value in classes if not (split.label == value).any()]
        if missing:
            raise ValueError(f"fit_cf: expected {name} rows with label {missing[0]}, got none of {len(split)}")


def _build(dataset: Dataset, train: Split, config: CFConfig, generator: torch.Generator) -> MF:
    sizes = dataset.num_users, dataset.num_items
    graph = None
    if config.model == "lightgcn":
        liked = train.label == 1
        graph = BipartiteGraph.from_interactions(train.uid[liked], train.iid[liked], *sizes)
    model = MODELS[config.model](*sizes, config, graph)
    seen_users, seen_items = (torch.zeros(size, dtype=torch.bool) for size in sizes)
    seen_users[_tensor(train.uid)] = True
    seen_items[_tensor(train.iid)] = True
    model.reset(generator, seen_users, seen_items)
    return model


def _fit(dataset: Dataset, train: Split, config: CFConfig, progress: bool) -> CFModel:
    assert config.lr is not None and config.weight_decay is not None
    generator = torch.Generator().manual_seed(_seed(config))
    model = _build(dataset, train, config, generator)
    # Fused: one pass over the tables a step; a loop over tensors and temporaries would cost more than the batch.
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    epochs = _bce_epochs(train, dataset.num_users) if config.loss == "bce" else _bpr_epochs(train, dataset, config)
    valid = dataset.splits["valid"]
    valid_uid, valid_iid = _tensor(valid.uid), _tensor(valid.iid)
    best_auc, best_epoch, best = -1.0, 0, _state(model)
    with tqdm(total=config.max_epochs, desc=config.model, unit="epoch", disable=not progress, leave=False) as bar:
        for epoch in range(config.max_epochs):
            nodes, label = next(epochs)
            order = torch.randperm(nodes.shape[1], generator=generator)
            batches = batches_of(nodes[:, order], len(model.embedding), config.batch_size)
            for batch, target in zip(batches, label[order].split(config.batch_size), strict=True):
                # The batch's rows only: the last layer and the first one backwards run over their edges alone.
                logits = model.score_batch(batch)
                loss = bpr_loss(logits) if config.loss == "bpr" else bce_loss(logits[0], target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            score = _scores(model, valid_uid, valid_iid)
            if not np.isfinite(score).all():
                raise ValueError(f"fit_cf: expected lr small enough to train with, got {config.lr} (epoch {epoch})")
            auc = metrics.auc(score, valid.label).value
            if auc > best_auc:
                best_auc, best_epoch, best = auc, epoch, _state(model)
            bar.update()
            bar.set_postfix_str(f"valid AUC {auc:.4f}, best {best_auc:.4f}", refresh=False)
            if epoch - best_epoch >= config.patience:
                break
    _log.info("%s: best validation AUC %.4f in epoch %d of %d", config.model, best_auc, best_epoch, epoch + 1)
    model.load_state_dict(best)
    return freeze(model, config, dataset.fingerprint)


def _seed(config: CFConfig) -> int:
    assert config.seed is not None  # `with_recipe` gave it
    return config.seed


def _tensor(column: NDArray[np.int64]) -> Tensor:
    # A copy: columns read from Parquet may be read-only, which torch cannot express.
    return torch.from_numpy(column.copy())


def _bce_epochs(train: Split, num_users: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(user and item nodes [2, n], labels [n]) of every row, the same in every epoch."""
    nodes, label = torch.stack((_tensor(train.uid), num_users + _tensor(train.iid))), _tensor(train.label).float()
    while True:
        yield nodes, label


def _bpr_epochs(train: Split, dataset: Dataset, config: CFConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """(user, item and negative item nodes [3, n], ones [n]) of every liked row, with new negatives in every epoch.

    Negatives are drawn among the items that train mentions: one that appears later is unknown, not disliked.
    """
    known = np.unique(train.iid)
    liked = train.label == 1
    uid, place = train.uid[liked], np.searchsorted(known, train.iid[liked]) + 1
    likes = np.bincount(np.unique(uid * (known.size + 1) + place) // (known.size + 1), minlength=dataset.num_users)
    usable = likes[uid] < known.size
    if not usable.any():
        raise ValueError("fit_cf: expected an item that a user did not like for bpr, got users who like every one")
    uid, place = uid[usable], place[usable]
    positives = Positives.of(uid, place, dataset.num_users, known.size + 1)
    item, ones = dataset.num_users + known, torch.ones(len(uid))
    for epoch in itertools.count():
        negative = sample_negatives(uid, positives, seed=_seed(config), epoch=epoch)
        yield torch.from_numpy(np.stack((uid, item[place - 1], item[negative - 1]))), ones


@torch.no_grad()
def _scores(model: MF, uid: Tensor, iid: Tensor) -> NDArray[np.float32]:
    nodes = model.nodes()
    blocks = [slice(begin, begin + _BLOCK) for begin in range(0, len(uid), _BLOCK)]
    return torch.cat([model.score_nodes(nodes, uid[rows], iid[rows]) for rows in blocks]).numpy()


def _state(model: MF) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def freeze(model: MF, config: CFConfig, fingerprint: str = "") -> CFModel:
    """The tables and biases of a model as a `CFModel`; LightGCN's are propagated once, here."""
    user, item = model.tables()
    user_bias, item_bias, offset = model.biases()
    return CFModel(config.model, config, user, item, user_bias, item_bias, offset, fingerprint)


def _write(fitted: CFModel, dataset: Dataset, out: Path) -> None:
    """metrics.json comes last: a folder that has it is complete."""
    tables: dict[str, dict[str, Any]] = {}
    for name in ("valid", "test"):
        split = dataset.splits[name]
        for row, scores in baseline_scores(dataset, split, fitted).items():
            tables.setdefault(row, {})[name] = table_of(split, scores, _seed(fitted.config))
    fitted.save(out)
    write_atomic(out / "config.yaml", yaml.safe_dump(to_mapping(fitted.config), sort_keys=False))
    RunFolder(out).write_json("metrics.json", tables)

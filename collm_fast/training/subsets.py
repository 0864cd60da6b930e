"""Which rows a run uses: whole users or whole (user, history) groups, and what the collaborative model has seen. F3."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from collm_fast.config import CFConfig, CFName, TrainConfig, to_mapping
from collm_fast.data.dataset import Dataset, Split
from collm_fast.models.cf.frozen import CFModel
from collm_fast.training.cf import held_out_rows, with_recipe
from collm_fast.training.loop import derived_seed

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]


def whole_users(split: Split, limit: int | None, seed: int) -> IntArray:
    """Rows of randomly chosen whole users, in the split's order, until `limit` rows are reached (None: all rows)."""
    return _whole(np.unique(split.uid, return_inverse=True)[1].reshape(-1), limit, seed)


def whole_groups(split: Split, limit: int | None, seed: int, among: NDArray[np.bool_] | None = None) -> IntArray:
    """Rows of randomly chosen whole (user, history) groups, in the split's order, until `limit` rows are reached.

    Args:
        split: the rows.
        limit: None for all of them.
        seed:  of the choice.
        among: [n] bool, only these rows take part.
    """
    rows = np.flatnonzero(among) if among is not None else np.arange(len(split))
    # Users' rows of one history are told apart by the history's bytes: equal lengths may hold different items.
    keys: dict[tuple[int, bytes], int] = {}
    group = np.empty(rows.size, np.int64)
    for place, row in enumerate(rows):
        history = split.his[split.his_offsets[row] : split.his_offsets[row + 1]]
        group[place] = keys.setdefault((int(split.uid[row]), history.tobytes()), len(keys))
    return np.asarray(rows[_whole(group, limit, seed)])


def _whole(group: IntArray, limit: int | None, seed: int) -> IntArray:
    if limit is None or group.size <= limit:
        return np.arange(group.size)
    counts = np.bincount(group)
    order = np.random.default_rng(seed).permutation(counts.size)
    needed = int(np.searchsorted(np.cumsum(counts[order]), limit)) + 1
    return np.flatnonzero(np.isin(group, order[:needed]))


def valid_sample(config: TrainConfig, valid: Split) -> IntArray | None:
    """Positions in the run's validation rows that an evaluation during a stage scores: whole users, the same each time.

    None where it scores all of them.
    """
    if config.valid_rows is None or config.valid_rows >= len(valid):
        return None
    sample = whole_users(valid, config.valid_rows, derived_seed(config.seed, "rows", "valid sample"))
    return sample if sample.size < len(valid) else None


def given_cf(config: TrainConfig, dataset: Dataset, run: Path | None = None) -> CFModel | None:
    """The fitted model that the folder `run` holds or `cf` points to, or None where it names a model to be fitted.

    Raises: ValueError for neither a name that can be fitted nor a folder with cf.safetensors, or for one fitted to
        other data.
    """
    held = run is not None and (run / "cf.safetensors").is_file()
    if config.cf in get_args(CFName) and not held:
        own = config.collaborative.model
        if own not in (CFConfig().model, config.cf):
            raise ValueError(f"collaborative.model: expected {config.cf!r} as cf says, got {own!r}")
        with_recipe(replace(config.collaborative, model=config.cf))  # type: ignore[arg-type]
        return None
    path = run if run is not None and held else Path(config.cf)
    if not (path.is_dir() and (path / "cf.safetensors").is_file()) and not path.is_file():
        names = "|".join(get_args(CFName))
        raise ValueError(f"cf: expected {names} or a folder that fit-cf wrote, got {config.cf!r}")
    cf = CFModel.load(path)
    if cf.fingerprint != dataset.fingerprint:
        raise ValueError(f"cf: expected a model fitted to {dataset.path}, got {path}, fitted to other data")
    return cf


def warn_of_unused(config: TrainConfig, given: CFModel) -> None:
    """Say in the log which keys of `collaborative` a fitted model makes void: those it was fitted otherwise."""
    wanted, default, has = (to_mapping(each) for each in (config.collaborative, CFConfig(), given.config))
    unused = [f"collaborative.{name}" for name in wanted if wanted[name] not in (default[name], has[name])]
    if unused:
        logger.warning("%s: not used, the collaborative model is a fitted one", ", ".join(unused))


def held_out_of(config: TrainConfig, given: CFModel | None) -> float:
    """The fraction of each user's train rows that the collaborative model does not see."""
    return (given.config if given is not None else config.collaborative).held_out


def choose_rows(config: TrainConfig, dataset: Dataset, held_out: float) -> dict[str, IntArray]:
    """The rows of every part, fixed by the configuration alone.

    Raises: ValueError where `cie_rows` asks for held-out rows and there are none.
    """
    train, valid, test = (dataset.splits[name] for name in ("train", "valid", "test"))
    unseen = held_out_rows(train, held_out) if config.cie_rows == "held-out" else None
    if unseen is not None and not unseen.any():
        raise ValueError(f"cie_rows: expected held-out rows of the collaborative model, got none (held_out {held_out})")
    limit_valid = config.limit_valid if config.limit_valid is not None else config.limit_eval
    return {
        "stage1": whole_groups(train, config.limit_train, derived_seed(config.seed, "rows", "stage1")),
        "stage2": whole_groups(train, config.limit_train, derived_seed(config.seed, "rows", "stage2"), unseen),
        "valid": whole_users(valid, limit_valid, derived_seed(config.seed, "rows", "valid")),
        "test": whole_users(test, config.limit_eval, derived_seed(config.seed, "rows", "test")),
    }

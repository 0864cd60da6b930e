"""`collm-fast rank`: its options, and what it does with them. Ranking itself is run.py's and rank.py's. Floor F4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import collm_fast


@dataclass(frozen=True)
class RankConfig:
    """`collm-fast rank`; ids as the source data has them, separated by commas."""

    run: Path = Path("runs/run")
    users: tuple[str, ...] = ()  # or the one word `all`
    users_file: Path | None = None
    candidates: tuple[str, ...] = ()
    all_items: bool = False
    retrieve: int | None = None
    top_k: int = 10
    at: int | None = None
    exclude_seen: bool = False
    include_seen: bool = False
    out: Path | None = None

    def seen(self) -> bool | None:
        """What `Run.rank_users` calls exclude_seen: None where neither option was given."""
        return self.exclude_seen if self.exclude_seen or self.include_seen else None


def rank_to_file(config: RankConfig) -> int:
    """Rank every user's candidates and write user, rank, item, score to `out`, user by user; returns the rows.

    Raises: ValueError, before the language model is loaded, for options that do not fit together and unknown ids.
    """
    from collm_fast.io.tables import check_suffix, write_parts

    if bool(config.users) == (config.users_file is not None):
        raise ValueError("rank: expected --users U,.. (or --users all) or --users-file FILE, got neither or both")
    if bool(config.candidates) == config.all_items:
        raise ValueError("rank: expected --candidates I,.. or --all-items, got neither or both")
    if config.exclude_seen and config.include_seen:
        raise ValueError("rank: expected --exclude-seen or --include-seen, got both")
    if config.out is None:
        raise ValueError("rank: expected --out FILE, got none")
    check_suffix(config.out, "out")
    if config.out.is_dir():
        raise ValueError(f"out: expected a file, got the folder {config.out}")
    run = collm_fast.open_run(config.run)
    found = run.rank_users(
        _users(config),
        None if config.all_items else list(config.candidates),
        top_k=config.top_k,
        retrieve=config.retrieve,
        at=config.at,
        exclude_seen=config.seen(),
        progress=True,
    )
    users, items = run.dataset.raw_users.dtype, run.dataset.raw_items.dtype
    kinds = {"user": users, "rank": np.dtype(np.int64), "item": items, "score": np.dtype(np.float32)}
    return write_parts(config.out, kinds, map(_columns, found))


def _users(config: RankConfig) -> list[Any] | None:
    """Each user once, in the order given; None for all."""
    from collm_fast.io.tables import read_table

    if config.users == ("all",):
        return None
    if config.users_file is None:
        return list(dict.fromkeys(config.users))
    return list(dict.fromkeys(read_table(config.users_file, ["user"], "users_file")["user"].tolist()))


def _columns(ranking: Any) -> dict[str, Any]:
    user, items, scores = ranking
    return {"user": np.full(len(items), user), "rank": np.arange(1, len(items) + 1), "item": items, "score": scores}

"""The Python API of a run: `train`, `open_run`, and `Run`, which scores and ranks. Floor F3.

run = collm_fast.train("data/ml-100k", "smollm2", "mf", "runs/first", limit_train=1000)
run.score(users=[196, 186], items=[242, 302])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from collm_fast.config import TrainConfig, from_mapping
from collm_fast.data.dataset import Dataset, Split, load_dataset
from collm_fast.data.history import history_before
from collm_fast.data.prompts import Prompts
from collm_fast.evaluate import score_prompts, sigmoid
from collm_fast.io.peft import load_adapter, read_adapter_config
from collm_fast.io.run_folder import RunFolder
from collm_fast.models.branch_scorer import BranchDecoder, branch_decoder, branch_logits
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import add_lora
from collm_fast.rank import Ranked, Ranking, Request, rank_users
from collm_fast.training.cf import held_out_rows
from collm_fast.training.pipeline import run_training, stage2_row, wanted_rows
from collm_fast.training.scores import baseline_scores, table_of
from collm_fast.training.stages import Base, load_mapper, mapper_file, statistics, with_biases
from collm_fast.training.subsets import choose_rows


def train(data: str | Path, llm: str | Path, cf: str | Path, out: str | Path, **options: Any) -> Run:
    """Train CoLLM as `collm-fast train` does, and open the run.

    Args:
        data: a folder that `prepare` wrote. llm: a folder, a hub name, a FILE.gguf or `smollm2`.
        cf:   a collaborative model's name, fitted first, or the folder that `fit-cf` wrote.
        out:  the run folder, new unless `resume="auto"`.
        options: the keys of `TrainConfig`, nested ones as mappings: `stage1={"lr": 1e-3}`.
    Returns: the opened run.
    Raises: ValueError, one line, for bad input, before anything is written; `training.interrupt.Interrupted` (a
        KeyboardInterrupt) after SIGINT or SIGTERM, with the state saved.
    """
    given = {"data": str(data), "llm": str(llm), "cf": str(cf), "out": str(out)}
    config = from_mapping(TrainConfig, {**given, **options})
    arguments = [*map(repr, given.values()), *(f"{name}={value!r}" for name, value in options.items())]
    run_training(config, command=f"collm_fast.train({', '.join(arguments)})")
    return open_run(out)


def open_run(out: str | Path, *, data: str | Path | None = None, llm: str | Path | None = None) -> Run:
    """Open a run folder that `train` wrote; the language model is loaded when something is scored.

    Args:
        data, llm: where the dataset and the language model lie now, if they were moved since.
    Raises: ValueError for a folder without a finished stage.
    """
    return Run(Path(out), data=data, llm=llm)


class Run:
    """A finished run. `metrics` is metrics.json, `record` run.json, `config` the configuration it was trained with."""

    def __init__(self, path: Path, *, data: str | Path | None = None, llm: str | Path | None = None) -> None:
        self.folder = RunFolder.open(path)
        values = self.folder.config()
        values["out"] = str(path)
        if values.get("dtype") == "auto":
            # The precision it was trained in, whatever this machine would choose.
            values["dtype"] = self.record.get("dtype", "auto")
        for name, moved in (("data", data), ("llm", llm)):
            if moved is not None:
                values[name] = str(moved)
        self.config = from_mapping(TrainConfig, values)
        stages = self.record.get("stages", {})
        self.rows = [row for row, _ in wanted_rows(self.config) if stages.get(row, {}).get("done")]
        if not self.rows:
            raise ValueError(f"{path}: expected a run with a finished stage, got one that was interrupted before")

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return self.folder.metrics

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        return self.folder.record

    @property
    def row(self) -> str:
        """The row of the table that `score` computes: stage 2 with the configured mapper, or stage 1 alone."""
        main = stage2_row(self.config.mapper.inputs)
        return main if main in self.rows else self.rows[0]

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset of the run. Raises: ValueError where it is not the one the run was trained on."""
        dataset = load_dataset(self.config.data)
        if dataset.fingerprint != self.record["data"]["fingerprint"]:
            raise ValueError(
                f"data: expected the dataset of the run {self.path}, got another one in {self.config.data}"
            )
        return dataset

    @cached_property
    def cf(self) -> CFModel:
        """The collaborative model of the run."""
        return CFModel.load(self.path)

    @cached_property
    def _base(self) -> Base:
        base = Base.load(self.config, self.dataset, self.record.get("prompts"))
        if base.fingerprint != self.record["llm"]["fingerprint"]:
            # One model in another precision is another model to the bit; say which it was.
            was = f"{self.record['llm']['name']} in {self.record['dtype']}"
            now = f"{self.config.llm} in {str(base.dtype).removeprefix('torch.')}"
            raise ValueError(f"llm: expected the model of the run, {was}, got {now}")
        adapter = self.path / "adapter"
        if (adapter / "adapter_config.json").is_file():
            add_lora(base.llm, read_adapter_config(adapter))
            load_adapter(base.llm, adapter)
        base.llm.requires_grad_(False)
        return base

    def model(self, row: str | None = None) -> CoLLM:
        """The hybrid model of a row of the table (default: `row`), ready to score."""
        row = row or self.row
        if row not in self.rows:
            raise ValueError(f"row: expected one of {', '.join(self.rows)}, got {row!r}")
        if row == "stage1":
            return self._base.model("stage1", self.config)
        inputs = row.removeprefix("stage2") or "embedding"
        path = self.path / mapper_file(inputs, self.config.mapper.inputs)
        mapper = load_mapper(path, {"data": self.dataset.fingerprint, "llm": self._base.fingerprint})
        if mapper.config.inputs != inputs:
            raise ValueError(f"mapper: expected one that reads {inputs} in {path}, got {mapper.config.inputs}")
        seen = ~held_out_rows(self.dataset.splits["train"], self.cf.config.held_out)
        stats = statistics(mapper.config, self.dataset, seen)
        return self._base.model("stage2", self.config, with_biases(self.cf), mapper, stats)

    def logits(self, split: Split, row: str | None = None, progress: str | None = None) -> NDArray[np.float32]:
        """The answer's logit for the rows of a split, [n] float32."""
        row = row or self.row
        return score_prompts(
            self.model(row),
            self._prompts(row, split),
            tokens_per_batch=self.config.tokens_per_batch,
            pairs="+pair" in row,
            progress=progress,
        )

    def _prompts(self, row: str, split: Split) -> Prompts:
        stage = "stage1" if row == "stage1" else "stage2"
        return self._base.prompts(stage, split, self.dataset, self.config, cache=False)

    def score(self, users: ArrayLike, items: ArrayLike, at: Any = None) -> NDArray[np.float32]:
        """P(yes) of user-item pairs, [n] float32.

        Args:
            users, items: [n] ids as the source data has them.
            at: one timestamp (seconds) or [n] of them: the history is what the user liked before it. None: before the
                test period.
        Raises: ValueError for an unknown id, naming it, or for unequal lengths.
        """
        return sigmoid(self.logits(self._pairs(users, items, at))).astype(np.float32)

    def _pairs(self, users: ArrayLike, items: ArrayLike, at: Any) -> Split:
        users, items = np.atleast_1d(np.asarray(users)), np.atleast_1d(np.asarray(items))
        if users.ndim != 1 or users.shape != items.shape:
            raise ValueError(f"score: expected as many users as items, got {users.shape} and {items.shape}")
        uid, iid = self.dataset.user_index(users), self.dataset.item_index(items)
        offsets, history = history_before(self.dataset, uid, at)
        zero = np.zeros(uid.size, np.int64)
        return Split(uid, iid, zero, zero, offsets, history, zero.astype(bool))

    def rank(
        self, user: Any, candidates: Sequence[Any] | NDArray[Any], top_k: int | None = None, at: Any = None
    ) -> list[Ranked]:
        """The best of the candidates for a user: (item, score) pairs, best first, ties in the candidates' order.

        All candidates are scored behind one prefix. The scores are `score`'s up to rounding.

        Args:
            user: an id of the source data. candidates: item ids, each once, seen or not.
            top_k: how many to return; None for all. at: as for `score`, one timestamp.
        Raises: ValueError, before any work, for an unknown id, a repeated candidate or top_k below 1.
        """
        _, items, scores = next(self.rank_users([user], candidates, top_k=top_k, at=at))
        return [Ranked(item, score) for item, score in zip(items.tolist(), scores.tolist(), strict=True)]

    def rank_users(
        self,
        users: Sequence[Any] | NDArray[Any] | None,
        candidates: Sequence[Any] | NDArray[Any] | None = None,
        *,
        top_k: int | None = 10,
        retrieve: int | None = None,
        at: Any = None,
        exclude_seen: bool | None = None,
        progress: bool = False,
    ) -> Iterator[Ranking]:
        """The best candidates of each user as (user, items, scores), one user after another as they are scored.

        Args:
            users: ids of the source data; None for all.
            candidates: item ids, each once; None for all items with a title.
            top_k: how many to return for each user; None for all. A user with fewer candidates gets fewer.
            retrieve: score only the so many candidates that the run's collaborative model finds best for the user.
            at: as for `score`, one timestamp.
            exclude_seen: leave out what the user rated, liked or not, before the moment that histories end at.
                None: only where candidates is None.
            progress: a bar on stderr once it takes longer than 5 s.
        Raises: ValueError, before any work, for an unknown id, a repeated candidate, or top_k or retrieve below 1.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"rank: expected top_k at least 1, got {top_k}")
        exclude = candidates is None if exclude_seen is None else exclude_seen
        request = Request.of(
            self.dataset,
            users,
            candidates,
            retrieve=retrieve,
            at=at,
            exclude_seen=exclude,
            history_length=self.config.prompt.history_length,
        )

        def found() -> Iterator[Ranking]:
            total = int(request.counts().sum())
            with tqdm(total=total, desc="rank", unit="candidate", disable=not progress, delay=5, leave=False) as bar:
                yield from rank_users(request, with_biases(self.cf), lambda rows: self._branches(rows, bar), top_k)

        return found()

    @cached_property
    def _ranker(self) -> tuple[CoLLM, BranchDecoder | None]:
        model = self.model()
        return model, branch_decoder(model)

    def _branches(self, rows: Split, bar: Any) -> NDArray[np.float32]:
        """`logits` behind prefixes that are computed once, where the language model allows it."""
        model, decoder = self._ranker
        prompts, pairs, room = self._prompts(self.row, rows), "+pair" in self.row, self.config.tokens_per_batch
        if decoder is not None:
            return branch_logits(model, decoder, prompts, tokens_per_batch=room, pairs=pairs, done=bar.update)
        logits = score_prompts(model, prompts, tokens_per_batch=room, pairs=pairs)
        bar.update(len(logits))
        return logits

    def evaluate(self, split: str, progress: bool = False) -> dict[str, Any]:
        """Score the run's rows of a split again: `{ROW: {split: {"all" | "warm" | "cold": {...}}}}`.

        Raises: ValueError for an unknown split.
        """
        if split not in self.dataset.splits:
            raise ValueError(f"split: expected one of {', '.join(self.dataset.splits)}, got {split!r}")
        chosen = choose_rows(self.config, self.dataset, self.cf.config.held_out)
        rows = self.dataset.splits[split].take(chosen["stage1" if split == "train" else split])
        seed = self.config.seed
        found = {
            row: table_of(rows, scores, seed) for row, scores in baseline_scores(self.dataset, rows, self.cf).items()
        }
        for row in self.rows:
            logits = self.logits(rows, row, f"{row} {split}" if progress else None)
            found[row] = table_of(rows, (logits, sigmoid(logits)), seed)
        return {row: {split: table} for row, table in found.items()}

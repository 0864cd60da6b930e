"""Times training steps, evaluation and ranking of CoLLM against the official way and two generic ones.

    python benchmarks/bench_train.py --llm smollm2 --data DATA --dtype float32 --seconds 10 --json FILE --plot FILE.png

One call of a case is several steps (or one evaluation, or one ranking) over the same rows for everybody; it gives the
logits of all rows and, in a step, the gradients summed over the steps. They must agree with the naive way's in float32
(bfloat16: within twice the naive way's own error), or a row gets no ratio. The ways to compute are described in
`train_peers.py`, the floor in `train_rows.py`. Without --data the prompts are synthetic, of MovieLens-1M's shape; --llm
takes a shape with random weights, or whatever `collm-fast train --llm` takes.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import train_llm
import train_memory
import train_peers as peers
import train_report
import train_rows
import train_steps
from ceilings import dtype_name
from rows import TIMES, Row
from torch import Tensor

from collm_fast.config import TrainConfig
from collm_fast.data.packing import PackedBatch, batches, pack
from collm_fast.data.prompts import Prompts
from collm_fast.evaluate import score_prompts
from collm_fast.models.llm import cpu_has_bf16
from collm_fast.training.graphs import StepGraphs
from collm_fast.training.memory import EVERY_STEPS, bound_caches, give_back_memory

BATCH, EVAL_BATCH = 16, 64  # the official configurations of MovieLens-1M
CANDIDATES = 1000
TOKENS = TrainConfig().tokens_per_batch
# Normwise, of logits and gradients in float32; the losses differ by less.
TOLERANCE = 1e-4
# In bfloat16 twice the naive way's own error, or this where that is less.
HALF_TOLERANCE = 0.02
# Of a model too large to be run in float32 beside: from the naive way in its own dtype, whose error is not known.
LARGE_TOLERANCE = 0.1
CACHE_GB = 8.0
EPOCH_PART = 128  # batches of an epoch among which typical ones are looked for
# Beyond this the float32 copy of a model that everything is compared with would not fit beside it.
LARGE = 4 << 30
STEPS = {
    "stage1-random": (1, "random"),
    "stage1-grouped": (1, "group"),
    "stage2-random": (2, "random"),
    "stage2-grouped": (2, "group"),
    "stage2-warm": (2, "group"),
}


class Bench:
    """The models and rows of a run; each is made when a case first needs it."""

    def __init__(self, suite: harness.Suite) -> None:
        self.suite, self.quick, more = suite, suite.options.quick, suite.options.more
        fast = suite.device.type == "cuda" or cpu_has_bf16()
        names = more["dtype"] or (["float32", "bfloat16"] if fast and not self.quick else ["float32"])
        self.dtypes: list[torch.dtype] = [getattr(torch, name) for name in names]
        self.llm = more["llm"] or ("tiny" if self.quick else "smollm2")
        self.folder: Path | None = more["data"]
        self.steps: int = more["steps"] or (1 if self.quick else 4)
        self.eval_rows: int = more["eval_rows"] or (32 if self.quick else 128)
        self.timed: int = min(more["rank_rows"] or (40 if self.quick else CANDIDATES), CANDIDATES)
        self.frozen = False
        self.base = cache(self._base)
        self.adapted = cache(self._adapted)
        self.truths: dict[tuple[str, torch.dtype], list[Tensor]] = {}

    @cached_property
    def rows(self) -> train_rows.Rows:
        if self.folder is not None:
            for part in ("train", "test"):
                self.suite.file(part, self.folder / f"{part}.parquet")
            return train_rows.of_dataset(self.folder, self.llm, CANDIDATES)
        vocabulary = self.base(self.dtypes[0]).config.vocab_size
        return train_rows.synthetic(vocabulary, 60 if self.quick else 2000, CANDIDATES, short=self.quick)

    def _base(self, dtype: torch.dtype) -> Any:
        return train_llm.open_llm(self.llm, dtype, self.suite.device)

    def _adapted(self, kind: str, stage: int, dtype: torch.dtype) -> train_llm.Adapted:
        base = self.base(dtype)
        begin = train_llm.start(
            self.rows.num_users, self.rows.num_items, base.config.hidden_size, self.rows.answers, self.suite.device
        )
        ours = train_llm.with_our_layers(base, begin, stage)
        return ours if kind == "ours" else train_llm.with_peft(base, begin, ours, stage)

    def logits(
        self, impl: str, stage: int, dtype: torch.dtype, prompts: Prompts
    ) -> tuple[peers.Logits, train_llm.Adapted]:
        """A peer's logits, and the model whose parameters it trains."""
        if impl == "prefix-grouper":
            # A copy of its own: it changes the model's attention.
            model = self.adapted(impl, stage, dtype)
            return peers.prefix_grouper_logits(model, prompts), model
        model = self.adapted("peft", stage, dtype)
        return (peers.naive_logits if impl == "naive" else peers.generic_logits)(model, prompts), model

    def truth(self, name: str, dtype: torch.dtype, make: Callable[[str, torch.dtype], harness.Impl]) -> list[Tensor]:
        """What the naive way gives in float32, once for both dtypes; of a model too large for that, in its own."""
        exact = self.exact_dtype(dtype)
        if (name, exact) not in self.truths:
            out = make("naive", exact)()
            self.truths[name, exact] = [out] if isinstance(out, Tensor) else list(out)
        return self.truths[name, exact]

    def exact_dtype(self, dtype: torch.dtype) -> torch.dtype:
        size = sum(parameter.numel() for parameter in self.base(dtype).parameters()) * 4
        return torch.float32 if size <= LARGE else dtype

    def case(
        self,
        name: str,
        pass_: str,
        dtype: torch.dtype,
        make: Callable[[str, torch.dtype], harness.Impl],
        work: Callable[[], harness.Work],
        more: Sequence[str] = (),
    ) -> list[Row]:
        """One case and its rows: `make` gives an implementation in a dtype by its name; `more` beside the others."""
        truth = self.truth(name, dtype, make)
        impls = {impl: make(impl, dtype) for impl in ("ours", *more, "naive", "generic")}
        try:
            impls["prefix-grouper"] = make("prefix-grouper", dtype)
        except ImportError:
            self.suite.failures.append(f"{name} prefix-grouper: not installed (pip install prefix-grouper)")
        if not self.frozen:
            # The modules of transformers and the models stay: without them the harness's collections take no time.
            gc.collect()
            gc.freeze()
            self.frozen = True
        rows = self.suite.case(name, pass_, dtype, impls, expected=lambda: truth, work=work, tolerance=TOLERANCE)
        if dtype != torch.float32:
            exact = self.exact_dtype(dtype) == torch.float32
            theirs = next((row.error for row in rows if row.impl == "naive" and row.error is not None), 0.0)
            limit = max(HALF_TOLERANCE, 2 * theirs) if exact else LARGE_TOLERANCE
            for row in rows:
                row.agrees = row.error is not None and row.error <= limit
        return rows

    def step(self, name: str, stage: int, order: Any, dtype: torch.dtype) -> None:
        if not self.suite.wanted(name, ("step",), dtype):
            return
        prompts, warm = self.rows.prompts["train", stage], name.endswith("warm")
        drawn = batches(prompts, order=order, batch_size=BATCH, generator=np.random.default_rng(0))
        plan = train_steps.typical(prompts, drawn[:EPOCH_PART], self.steps, BATCH)
        together = np.concatenate(plan)

        def make(impl: str, dtype: torch.dtype) -> harness.Impl:
            if impl == "ours-graphs":
                # Made when it is first called: a machine that cannot capture fails this row alone.
                captured = cache(partial(self.captured, stage, dtype, plan))
                return lambda: captured()()
            if impl == "ours":
                model = self.adapted(impl, stage, dtype)
                logits = peers.ours_logits(peers.ours(model, kv_cache_gb=CACHE_GB if warm else 0.0), prompts)
            else:
                logits, model = self.logits(impl, stage, dtype, prompts)
            chosen = peers.by_length(prompts, together, BATCH) if impl == "generic" else plan
            return train_steps.steps(logits, model.parameters, chosen, prompts)

        packed = [pack(prompts, rows) for rows in plan]
        self.note(name, prompts, together, packed)
        work = partial(self.work, packed, "step", stage, warm)
        captured = self.suite.device.type == "cuda" and dtype != torch.float32 and not warm
        self.case(name, "step", dtype, make, work, ("ours-graphs",) if captured else ())

    def captured(self, stage: int, dtype: torch.dtype, plan: Sequence[np.ndarray]) -> harness.Impl:
        model = self.adapted("ours", stage, dtype)
        graphs = StepGraphs(peers.ours(model), model.parameters)
        return train_steps.graph_steps(graphs, model.parameters, plan, self.rows.prompts["train", stage])

    def evaluation(self, name: str, pass_: str, dtype: torch.dtype) -> None:
        """Logits of whole groups of the test split, or of one user's candidates (`rank`), without gradients."""
        if not self.suite.wanted(name, (pass_,), dtype):
            return
        prompts, warm = self.scored(pass_), name.endswith("warm")
        timed = np.arange(self.timed if pass_ == "rank" else len(prompts))

        def make(impl: str, dtype: torch.dtype) -> harness.Impl:
            if impl == "ours":
                hybrid = peers.ours(self.adapted(impl, 2, dtype), kv_cache_gb=CACHE_GB if warm else 0.0)
                score = peers.ours_ranking(hybrid) if pass_ == "rank" else partial(score_prompts, hybrid)
                return lambda: torch.from_numpy(score(prompts, tokens_per_batch=TOKENS)[timed])
            logits, _ = self.logits(impl, 2, dtype, prompts)
            plan = [timed[start : start + EVAL_BATCH] for start in range(0, len(timed), EVAL_BATCH)]
            if impl == "generic":
                plan = peers.by_length(prompts, timed, EVAL_BATCH)
            return train_steps.scores(logits, plan)

        plan = batches(prompts, order="group", max_tokens=TOKENS)
        packed = [pack(prompts, rows) for rows in plan]
        self.note(name, prompts, np.arange(len(prompts)), packed)
        for row in self.case(name, pass_, dtype, make, partial(self.work, packed, pass_, 2, warm)):
            if row.impl != "ours" and len(timed) < len(prompts):
                scale_times(row, len(prompts) / len(timed))

    def memory(self, count: int, dtype: torch.dtype) -> dict[str, Any]:
        """Ours in stage 2, `count` different batches of the grouped order, one optimizer step each."""
        prompts, model = self.rows.prompts["train", 2], self.adapted("ours", 2, dtype)
        logits = peers.ours_logits(peers.ours(model), prompts)
        plan: list[np.ndarray] = []
        generator = np.random.default_rng(2)
        while len(plan) < count:
            plan += batches(prompts, order="group", batch_size=BATCH, generator=generator)
        optimizer = train_steps.optimizer_of(model.parameters)

        def one(number: int) -> None:
            train_steps.step(logits, optimizer, plan[number], prompts)
            # As the trainer's loop does.
            if (number + 1) % EVERY_STEPS == 0:
                give_back_memory(self.suite.device)

        return {"dtype": dtype_name(dtype), **train_memory.watch(one, count, self.suite.device)}

    def scored(self, pass_: str) -> Prompts:
        if pass_ == "rank":
            return self.rows.prompts["rank", 2]
        everyone = self.rows.prompts["test", 2]
        return everyone.take(train_steps.typical_groups(everyone, self.eval_rows))

    def note(self, name: str, prompts: Prompts, rows: np.ndarray, packed: Sequence[PackedBatch]) -> None:
        """What a call of the case computes, into the result file."""
        tokens, tree_tokens = int(np.diff(prompts.offsets)[rows].sum()), sum(len(batch.token_ids) for batch in packed)
        self.suite.data[name] = {"samples": len(rows), "tokens": tokens, "tree_tokens": tree_tokens}
        if name.startswith("rank") and self.timed < len(rows):
            self.suite.data[name]["samples_timed_of_peers"] = self.timed

    def work(self, packed: Sequence[PackedBatch], pass_: str, stage: int, warm: bool) -> harness.Work:
        config = self.base(self.dtypes[0]).config
        return harness.Work(flops=sum(train_rows.flops(config, b, pass_, stage=stage, warm=warm) for b in packed))


def scale_times(row: Row, factor: float) -> None:
    """The times of all samples from those of some, all of which cost the same."""
    for name in TIMES:
        setattr(row, name, getattr(row, name) * factor)
    row.over_ours = None if row.over_ours is None else row.over_ours * factor


def add_options(parser: argparse.ArgumentParser) -> None:
    shapes = ", ".join(train_llm.SHAPES)
    parser.add_argument("--llm", help=f"smollm2, a model folder, or random weights of a shape: {shapes}")
    parser.add_argument("--data", type=Path, help="a prepared dataset's folder (synthetic prompts without it)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: what the device is fast in"
    )
    parser.add_argument("--plot", type=Path, help="write a bar chart here")
    parser.add_argument("--steps", type=int, help="optimizer steps a call (4; 1 with --quick)")
    parser.add_argument("--eval-rows", type=int, help="rows of an evaluation (128; 32 with --quick)")
    parser.add_argument("--memory-steps", type=int, help="also run so many steps of stage 2, and watch the memory")
    parser.add_argument(
        "--rank-rows", type=int, help="candidates that the peers score, their time scaled (1000; 40 with --quick)"
    )


def cases(suite: harness.Suite) -> None:
    bench = Bench(suite)
    for name, (stage, order) in STEPS.items():
        for dtype in bench.dtypes:
            bench.step(name, stage, order, dtype)
    for name, pass_ in (("eval", "eval"), ("eval-warm", "eval"), (f"rank-{CANDIDATES}", "rank")):
        for dtype in bench.dtypes:
            bench.evaluation(name, pass_, dtype)
    if count := suite.options.more["memory_steps"]:
        suite.data["memory"] = bench.memory(count, bench.dtypes[0])
    gc.unfreeze()


def finish(result: dict[str, Any], options: harness.Options) -> None:
    """Adds the summary to the result, prints it, and draws it where --plot asks."""
    result["summary"] = train_report.summary(result)
    print(train_report.table(result["summary"]))
    if memory := result["data"].get("memory"):
        print(train_report.memory_line(memory))
    if options.more["plot"] is not None and result["summary"]:
        train_report.draw(result, options.more["plot"])


if __name__ == "__main__":
    # As a training does; later than the first product, which the harness calls, it would bound nothing.
    bound_caches()
    raise SystemExit(harness.main(cases, __doc__, add=add_options, finish=finish))

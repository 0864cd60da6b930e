"""Trains LightGCN by BPR on the Gowalla split of its paper and draws recall@20 and NDCG@20 beside the published values.

    python benchmarks/lightgcn_gowalla.py --data ../shared/data/gowalla-lightgcn --folder runs/gowalla --threads 2
    python benchmarks/lightgcn_gowalla.py --data ../shared/data/gowalla-lightgcn --epoch-time --threads 2

Goes on from the checkpoint in --folder, if there is one; Ctrl-C saves one first. Writes results/gowalla-lightgcn.json,
.md and .png; --epoch-time adds a run to --json FILE and writes the medians of all its runs beside it as .md: an epoch
with and without trimming, part by part. Accuracy and the whole epoch are measured here, the op in bench_propagate.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bpr_steps
import machine
import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor

from collm_fast.config import BPRConfig, to_mapping
from collm_fast.data.sampler import Batch, batches_of, sample_triples
from collm_fast.graph import BipartiteGraph
from collm_fast.io import checkpoints
from collm_fast.ops import lightgcn_propagate
from collm_fast.ranking import Lists, full_ranking
from collm_fast.training.bpr import bpr_backward, fit_lightgcn

# github.com/gusye1234/LightGCN-PyTorch: 3 layers, 64 dimensions, 1000 epochs.
PUBLISHED = {"recall@20": 0.1824, "ndcg@20": 0.1547}
USERS, ITEMS, TOP = 29_858, 40_981, 20
OUT = Path(__file__).parent / "results"
Pairs = tuple[np.ndarray, np.ndarray]


def pairs(path: Path) -> Pairs:
    table = pyarrow.parquet.read_table(path, columns=["user", "item"])
    return table["user"].to_numpy(), table["item"].to_numpy()


def evaluator(train: Pairs, test: Pairs) -> Callable[[Tensor, Tensor], Mapping[str, float]]:
    seen, held_out = Lists.of(*train, USERS), Lists.of(*test, USERS)

    def evaluate(user: Tensor, item: Tensor) -> dict[str, float]:
        found = full_ranking(user, item, seen, held_out, k=TOP)[TOP]
        return {f"recall@{TOP}": found.recall, f"ndcg@{TOP}": found.ndcg, f"precision@{TOP}": found.precision}

    return evaluate


def config_of(options: argparse.Namespace) -> BPRConfig:
    return BPRConfig(
        epochs=options.epochs,
        seed=options.seed,
        storage_dtype=options.storage,
        evaluate_every=options.every,
        checkpoint_every=options.every,
    )


def description(options: argparse.Namespace) -> dict[str, Any]:
    head = machine.description(torch.device(options.device))
    return head | {"date": datetime.date.today().isoformat(), "threads": options.threads}


# --- the curve ----------------------------------------------------------------------------------------------------
def report(result: dict[str, Any]) -> str:
    rows = [record for record in result["history"] if f"recall@{TOP}" in record]
    best = max(rows, key=lambda record: record[f"recall@{TOP}"])
    shown = [row for row in rows if row["epoch"] % result["shown_every"] == 0 or row in (rows[-1], best)]
    seconds = np.array([record["seconds"] for record in result["history"]])
    lines = [
        "# LightGCN on Gowalla, by BPR",
        "",
        f"{result['date']}, {result['device']}, {result['simd']}, {result['threads']} thread(s), commit "
        f"{result['commit'][:12]}, torch {result['versions']['torch']}. Made by "
        "`python benchmarks/lightgcn_gowalla.py`.",
        "",
        f"{len(result['history'])} epochs of the 1000 that the published values were trained for, by the authors' "
        f"recipe ({result['recipe']}). Test users: {result['test_users']}. Seconds of an epoch without evaluation: "
        f"median {np.median(seconds):.1f}, fastest {seconds.min():.1f} (wall time, beside any other work).",
        "",
        f"| epoch | loss | recall@{TOP} | NDCG@{TOP} | precision@{TOP} |",
        "|---|---|---|---|---|",
        *(
            f"| {row['epoch']} | {row['loss']:.4f} | {row[f'recall@{TOP}']:.4f} | {row[f'ndcg@{TOP}']:.4f} | "
            f"{row[f'precision@{TOP}']:.4f} |"
            for row in shown
        ),
        f"| published, 1000 | | {PUBLISHED['recall@20']:.4f} | {PUBLISHED['ndcg@20']:.4f} | |",
        "",
        f"Best recall@{TOP}: {best[f'recall@{TOP}']:.4f} after {best['epoch']} epochs, "
        f"{best[f'recall@{TOP}'] / PUBLISHED['recall@20']:.1%} of the published value.",
        "",
        "![recall and NDCG by epoch](gowalla-lightgcn.png)",
        "",
    ]
    return "\n".join(lines)


def draw(history: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [record for record in history if f"recall@{TOP}" in record]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, colour in (("recall", "tab:blue"), ("ndcg", "tab:orange")):
        key = f"{name}@{TOP}"
        title = "NDCG" if name == "ndcg" else name
        axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], color=colour, label=f"{title}@{TOP}")
        axes.axhline(PUBLISHED[key], color=colour, linestyle="--", label=f"published, 1000 epochs: {PUBLISHED[key]}")
    axes.set(xlabel="epoch", title="LightGCN on Gowalla (K=3, D=64, BPR)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(options: argparse.Namespace, history: list[dict[str, float]], edges: Pairs, test: Pairs) -> None:
    config = config_of(options)
    recipe = f"K={config.num_layers}, D={config.dim}, lr {config.lr}, L2 {config.l2}, batch {config.batch_size}, "
    result = description(options) | {
        "data": f"Gowalla split of arXiv 2002.02126: {len(edges[0]):,} train and {len(test[0]):,} test pairs",
        "config": to_mapping(config),
        "recipe": recipe + f"N(0, {config.init_std}), seed {config.seed}, {config.storage_dtype} layers",
        "published": PUBLISHED,
        "test_users": len(np.unique(test[0])),
        "shown_every": 10 if len(history) <= 200 else 50,
        "history": history,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gowalla-lightgcn.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (options.out / "gowalla-lightgcn.md").write_text(report(result))
    draw(history, options.out / "gowalla-lightgcn.png")


def train(options: argparse.Namespace, edges: Pairs, test: Pairs) -> int:
    status = 0
    try:
        fit_lightgcn(
            *edges,
            USERS,
            ITEMS,
            config_of(options),
            evaluate=evaluator(edges, test),
            folder=options.folder,
            device=options.device,
            progress=True,
        )
    except KeyboardInterrupt:
        status = 3
    found = checkpoints.latest(options.folder)
    if found is not None and any(f"recall@{TOP}" in record for record in found.state["history"]):
        write(options, found.state["history"], edges, test)
        print(report(json.loads((options.out / "gowalla-lightgcn.json").read_text())))
    return status


# --- the time of an epoch -------------------------------------------------------------------------------------------
def timed(fn: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - wall, time.process_time() - cpu


def epoch_time(options: argparse.Namespace, edges: Pairs) -> int:
    """Steps of one epoch, trimmed and untrimmed in blocks in turn, and what they consist of."""
    machine.pin(options.threads)
    config = config_of(options)
    graph = BipartiteGraph.from_interactions(*edges, USERS, ITEMS)
    steps = -(-graph.num_edges // config.batch_size)
    nodes = np.empty(0)

    def sample() -> None:
        nonlocal nodes
        nodes = sample_triples(graph, graph.num_edges, seed=config.seed)
        nodes[1:] += USERS

    seconds: dict[str, list[tuple[float, float]]] = {"sampling": [timed(sample) for _ in range(5)]}
    batches: list[Batch] = []
    for _ in range(5):
        seconds.setdefault("distinct rows", []).append(
            timed(lambda: batches.__setitem__(slice(None), batches_of(nodes, graph.num_nodes, config.batch_size)))
        )
    generator = torch.Generator().manual_seed(config.seed)
    start = torch.empty(graph.num_nodes, config.dim).normal_(0.0, config.init_std, generator=generator)
    storage = getattr(torch, config.storage_dtype)

    def whole(x: Tensor) -> Tensor:
        return lightgcn_propagate(x, graph, config.num_layers, storage_dtype=storage)

    ways: dict[str, Callable[[Tensor, Batch], Tensor]] = {
        "rows": lambda table, batch: bpr_backward(table, graph, batch, config),
        "all rows": lambda table, batch: bpr_steps.untrimmed_backward(table, batch, config, whole),
    }
    tables = {name: start.clone().requires_grad_() for name in ways}
    adams = {name: torch.optim.Adam([tables[name]], lr=config.lr, fused=True) for name in ways}
    block = 12
    for first in range(0, min(options.steps, steps), block):
        for name, backward in ways.items():
            # Blocks, not single steps: each way shall find the memory as its own loop leaves it.
            for place, batch in enumerate(batches[first : first + block]):
                gradient = timed(lambda b=batch, n=name, f=backward: f(tables[n], b))
                update = timed(adams[name].step)
                if place >= 2:
                    seconds.setdefault(f"{name}: forward and backward", []).append(gradient)
                    seconds.setdefault(f"{name}: Adam", []).append(update)
    summary = {
        name: {"median_s": float(np.median([w for w, _ in times])), "cpu_s": float(np.median([c for _, c in times]))}
        for name, times in seconds.items()
    }
    kept = "MALLOC_MMAP_THRESHOLD_" in os.environ and "MALLOC_TRIM_THRESHOLD_" in os.environ
    result = description(options) | {"storage": config.storage_dtype, "freed_memory": "kept" if kept else "returned"}
    result |= {"steps": steps, "parts": summary, "epoch": {}}
    for name in ways:
        result["epoch"][name] = {
            clock: summary["sampling"][clock]
            + summary["distinct rows"][clock]
            + steps * (summary[f"{name}: forward and backward"][clock] + summary[f"{name}: Adam"][clock])
            for clock in ("median_s", "cpu_s")
        }
    trained = (tables["rows"] - start).detach().norm()
    result["difference"] = float((tables["rows"] - tables["all rows"]).detach().norm() / trained)
    print(json.dumps({key: result[key] for key in ("threads", "parts", "epoch", "difference")}, indent=1))
    if options.json is not None:
        runs = json.loads(options.json.read_text())["runs"] if options.json.is_file() else []
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"runs": [*runs, result]}, indent=1, allow_nan=False) + "\n")
        options.json.with_suffix(".md").write_text(epoch_report([*runs, result]))
    return 0


def epoch_report(runs: list[dict[str, Any]]) -> str:
    last = runs[-1]
    lines = [
        "# One BPR epoch of LightGCN on Gowalla",
        "",
        f"{last['date']}, {last['cpu']}, {last['simd']}, commit {last['commit'][:12]}, "
        f"torch {last['versions']['torch']}. K=3, D=64, batch 2048, {last['steps']} steps; medians over fresh "
        "processes. Made by `python benchmarks/lightgcn_gowalla.py --epoch-time`.",
        "",
        "`rows` reads and propagates for the batch's rows only (what `fit_lightgcn` does), `all rows` is the same step "
        "without. Wall seconds include whatever else ran on the machine; CPU seconds are those of all threads. Freed "
        "memory is kept under MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000 "
        "MALLOC_TOP_PAD_=67108864: glibc then does not hand the tables of every step back to the system, which would "
        "clear them for the next one.",
        "",
        "| threads | layers in | freed memory | processes | | sampling | distinct rows | forward + backward | Adam | "
        "epoch, wall s | epoch, CPU s |",
        "|" + "---|" * 11,
    ]
    kinds = [tuple(str(run[key]) for key in ("threads", "storage", "freed_memory")) for run in runs]
    for kind in sorted(set(kinds)):
        group = [run for run, own in zip(runs, kinds, strict=True) if own == kind]
        head = " | ".join(kind)
        medians = {}
        for name in ("rows", "all rows"):
            shares = [
                np.median([run["parts"][part]["cpu_s"] for run in group]) * steps
                for part, steps in (
                    ("sampling", 1),
                    ("distinct rows", 1),
                    (f"{name}: forward and backward", last["steps"]),
                    (f"{name}: Adam", last["steps"]),
                )
            ]
            medians[name] = [np.median([run["epoch"][name][clock] for run in group]) for clock in ("median_s", "cpu_s")]
            cells = " | ".join(f"{value:.2f}" for value in (*shares, *medians[name]))
            lines.append(f"| {head} | {len(group)} | {name} | {cells} |")
        wall, cpu = (b / a for a, b in zip(medians["rows"], medians["all rows"], strict=True))
        lines.append(f"| {head} | | gain | | | | | {wall:.2f}x | {cpu:.2f}x |")
    differences = {run["storage"]: run["difference"] for run in sorted(runs, key=lambda run: run["difference"])}
    lines += [
        "",
        "The parts are in CPU seconds. Largest distance between the tables of the two ways after the timed steps, "
        "relative to what was learned: "
        + ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with train.parquet and test.parquet")
    parser.add_argument("--folder", type=Path, default=Path("runs/gowalla"), help="where checkpoints are")
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--every", type=int, default=5, help="epochs between evaluations and checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--storage", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epoch-time", action="store_true", help="time the parts of an epoch instead of training")
    parser.add_argument("--steps", type=int, default=120, help="steps that --epoch-time takes each way")
    parser.add_argument("--json", type=Path, help="where --epoch-time writes its result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    edges = pairs(options.data / "train.parquet")
    if options.epoch_time:
        return epoch_time(options, edges)
    return train(options, edges, pairs(options.data / "test.parquet"))


if __name__ == "__main__":
    raise SystemExit(main())

"""Time and memory of LightGCN by the number of edges: building, propagating, a BPR epoch; a process for each size.

    python benchmarks/growth.py --pairs 1M 3M 10M --large 100M --threads 2

writes growth.json, growth.md and growth.png. The large sizes are built and propagated forwards only. An epoch is timed
whole where that takes less than --seconds, else by as many of its steps. The graphs are those of graphs.py; the fits,
the page and the plot are in growth_report.py, the plan for a billion edges in growth_plan.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import graphs
import growth_report
import harness
import machine
import numpy as np
import torch
from ceilings import Table, gather_rate, measure_ceilings, sample

from collm_fast import BipartiteGraph
from collm_fast.config import BPRConfig
from collm_fast.data.sampler import batches_of, sample_triples
from collm_fast.ops import lightgcn_propagate
from collm_fast.training.bpr import bpr_backward

D, K = 64, 3
CPU = torch.device("cpu")
CHUNK = 512  # batches drawn at once, as fit_lightgcn does
UNITS = {"k": 10**3, "M": 10**6, "": 1}


def count_of(text: str) -> int:
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "M") else (text, "")
    return int(number) * UNITS[unit]


def chosen(wall: float, cpu: float) -> dict[str, float]:
    """Other programs' turns are not ours: one thread goes by processor time, several by wall time."""
    return {"seconds": cpu if torch.get_num_threads() == 1 else wall, "wall_s": wall, "cpu_s": cpu}


def timed(fn: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Memory above what is there before (of the first call), then the median of up to nine calls in that time."""
    peak = machine.peak_bytes(fn, CPU)
    first = sample(fn, 1, CPU)
    rounds = max(1, min(9, int(seconds / first[0])))
    wall, cpu = zip(*(sample(fn, 1, CPU) for _ in range(rounds)), strict=True)
    return chosen(float(np.median(wall)), float(np.median(cpu))) | {"samples": rounds, "peak_bytes": peak}


def build(suite: harness.Suite, pairs: int, seconds: float) -> tuple[BipartiteGraph, dict[str, Any]]:
    users, items, num_users, num_items = graphs.power_law_pairs(suite, pairs)

    def make() -> BipartiteGraph:
        return BipartiteGraph.from_interactions(users, items, num_users, num_items)

    return make(), timed(make, seconds)


def propagation(graph: BipartiteGraph, seconds: float, backward: bool, quick: bool) -> dict[str, Any]:
    """Forward, with float32 and with bfloat16 layers, and the gradient too where it is asked for."""
    x = torch.randn(graph.num_nodes, D, generator=torch.Generator().manual_seed(0)).mul_(0.1)
    found = {}
    for name, dtype in (("forward", torch.float32), ("forward bf16", torch.bfloat16)):

        def forward(storage: torch.dtype = dtype) -> object:
            return lightgcn_propagate(x, graph, K, storage_dtype=storage)

        found[name] = timed(forward, seconds)
        table = Table(graph.num_nodes, D, dtype)
        gathered = K * graph.col.numel() * table.row_bytes
        found[name] |= {
            "gathered_bytes_per_s": gathered / found[name]["seconds"],
            "gather_ceiling_bytes_per_s": gather_rate(table, CPU, quick=quick),
        }
    if backward:
        grad = torch.randn_like(x)
        both = harness.backward(lambda t: lightgcn_propagate(t, graph, K), [x], grad)
        found["forward+backward"] = timed(both, seconds)
    return found


def epoch(graph: BipartiteGraph, config: BPRConfig, seconds: float) -> dict[str, Any]:
    """Sampling, forward, backward and Adam of an epoch's batches, or of as many as take that time."""
    batches = math.ceil(graph.num_edges / config.batch_size)

    def start() -> tuple[torch.Tensor, torch.optim.Optimizer]:
        table = torch.randn(graph.num_nodes, D, generator=torch.Generator().manual_seed(0)).mul_(config.init_std)
        return table.requires_grad_(), torch.optim.Adam([table], lr=config.lr, fused=True)

    def run(table: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int, drawn: int | None = None) -> None:
        for first in range(0, steps, CHUNK):
            count, row = min(CHUNK, drawn or steps - first) * config.batch_size, first * config.batch_size
            nodes = sample_triples(graph, count, seed=config.seed, first_row=row)
            nodes[1:] += graph.num_users
            for batch in islice(batches_of(nodes, graph.num_nodes, config.batch_size), steps - first):
                bpr_backward(table, graph, batch, config)
                optimizer.step()

    peak = machine.peak_bytes(lambda: run(*start(), 2, min(CHUNK, batches)), CPU)
    gc.collect()
    state = start()
    run(*state, 2)
    one = sample(lambda: run(*state, 3), 1, CPU)[0] / 3
    steps = max(3, min(batches, int(seconds / one)))
    wall, cpu = sample(lambda: run(*state, steps), 1, CPU)
    return chosen(wall / steps * batches, cpu / steps * batches) | {
        "steps": steps,
        "steps_of_an_epoch": batches,
        "peak_bytes": peak,
    }


def measure(pairs: int, threads: int, seconds: float, large: bool, quick: bool) -> dict[str, Any]:
    """One size, in this process."""
    machine.pin(threads)
    # Memory that a first call needs (of autograd, of Adam) is of no size.
    small = BipartiteGraph.from_interactions([0, 1], [0, 1], 2, 2)
    propagation(small, 0.0, True, True)
    epoch(small, BPRConfig(dim=D, num_layers=K), 0.0)
    suite = harness.Suite(harness.Options(threads=threads))
    suite.reseed(f"power-law {pairs}")
    graph, built = build(suite, pairs, seconds)
    gc.collect()
    size = sum(t.nbytes for t in (graph.crow, graph.col, graph.inv_sqrt_degree))
    stages = {"build": built, **propagation(graph, seconds, not large, quick)}
    if not large:
        for name, storage in (("BPR epoch", "float32"), ("BPR epoch bf16", "bfloat16")):
            stages[name] = epoch(graph, BPRConfig(dim=D, num_layers=K, storage_dtype=storage), seconds)
    return {
        "pairs": pairs,
        "edges": graph.num_edges,
        "users": graph.num_users,
        "items": graph.num_items,
        "largest_degree": int(graph.crow.diff().max()),
        "graph_bytes": size,
        "table_bytes": graph.num_nodes * D * 4,
        "large": large,
        "data": suite.data,
        "stages": stages,
    }


def in_a_new_process(pairs: int, options: argparse.Namespace, large: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "size.json"
        command = [sys.executable, os.path.abspath(__file__), "--measure", str(pairs), "--into", str(path)]
        command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
        command += ["--is-large"] * large + ["--quick"] * options.quick
        subprocess.run(command, check=True)
        result: dict[str, Any] = json.loads(path.read_text())
        return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=count_of, default=[10**6, 3 * 10**6, 10**7], metavar="N")
    parser.add_argument("--large", nargs="*", type=count_of, default=[10**8], metavar="N", help="no training there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the samples of one stage of one size")
    parser.add_argument("--quick", action="store_true", help="small ceilings: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--is-large", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is None and len(options.pairs) < 2:
        parser.error(f"--pairs: expected at least two sizes to fit, got {len(options.pairs)}")
    return options


def main() -> int:
    options = parse()
    if options.measure is not None:
        found = measure(options.measure, options.threads, options.seconds, options.is_large, options.quick)
        options.into.write_text(json.dumps(found))
        return 0
    if machine.peak_bytes(lambda: None, CPU) is None:
        raise SystemExit("growth: expected the mark of the resident memory (/proc/self/clear_refs), got none")
    sizes = []
    for large, counts in ((False, options.pairs), (True, options.large)):
        for pairs in counts:
            print(f"{pairs} pairs", file=sys.stderr, flush=True)
            sizes.append(in_a_new_process(pairs, options, large))
    torch.set_num_threads(options.threads)
    result = machine.description(CPU) | {
        "threads": options.threads,
        "D": D,
        "K": K,
        "batch_size": BPRConfig().batch_size,
        "ceilings": measure_ceilings(CPU, quick=options.quick),
        "sizes": sizes,
    }
    result["fits"] = growth_report.fits(sizes)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "growth.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (options.out / "growth.md").write_text(growth_report.page(result))
    growth_report.plot(result, options.out / "growth.png")
    print(growth_report.page(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Times propagation divided among processes against one process: sharded_propagate and lightgcn_propagate.

It starts its own ranks, one on each core (gloo) or GPU (NCCL, --device cuda); rank 0 also runs the whole graph alone,
in turn with the divided one, with 1 and (on a CPU) as many threads as there are ranks. A divided call counts from a
barrier to the last rank's end. Beside it: the same call without its exchanges (`compute_s`), its exchanges alone
(`exchange_s`), the time that ranks waited in it (`wait_s`, CPU only), and how much of the exchange did not show:
`hidden` = 1 - (median_s - compute_s) / exchange_s. `link`, CPU only: the same call, sums and all, over a network of 10
Gbit/s that is only a clock (link.py). The pass `step` is the forward and backward of the rows of one BPR batch, of
which each rank takes a part. `dtype` is what the layers of a float32 call are stored and sent in. Graphs come from a
file that every rank maps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import graphs
import harness
import machine
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from link import Link
from rows import write_json
from torch import Tensor

from collm_fast import BipartiteGraph, distributed, exchange, sharding
from collm_fast.ops import lightgcn_propagate

K = 3
BATCH = 2048
# Bytes a second each way of a network of 10 Gbit/s.
SPEED = 1.25e9
# What the layers are stored and sent in.
STORAGE = (torch.float32, torch.bfloat16)


def _threads() -> set[int]:
    return {int(thread.name) for thread in Path("/proc/self/task").iterdir()}


class Rank:
    """What one process measures; `results` holds the seconds of every sample by name."""

    def __init__(self, rank: int, options: argparse.Namespace, folder: Path) -> None:
        self.rank, self.options, self.folder = rank, options, folder
        self.device, self.pool = torch.device("cpu"), list[int]()
        if options.device == "cuda":
            self.device = torch.device("cuda", rank)
            torch.cuda.set_device(self.device)
        else:
            self.cores = sorted(os.sched_getaffinity(0))
            self.use([self.cores[rank]])
        dist.init_process_group(
            "nccl" if options.device == "cuda" else "gloo",
            store=dist.FileStore(str(folder / "store"), options.ranks),
            rank=rank,
            world_size=options.ranks,
            timeout=timedelta(minutes=5),
        )
        self.waited = 0.0
        self._wait = exchange.Chain.wait

        def timed_wait(chain: exchange.Chain) -> None:
            start = time.perf_counter()
            self._wait(chain)
            self.waited += time.perf_counter() - start

        exchange.Chain.wait = timed_wait  # type: ignore[method-assign]

    def use(self, cores: list[int]) -> None:
        """One torch thread on each of these cores; every other thread of the process on the first."""
        before = _threads()
        torch.set_num_threads(len(cores))
        if len(cores) > 1:
            torch.ones(1 << 20).sum()  # starts the pool's threads, once
            self.pool += sorted(_threads() - before)
        for thread in _threads() - set(self.pool):
            os.sched_setaffinity(thread, cores[:1])
        for thread, core in zip(self.pool, cores[1:] or cores * len(self.pool), strict=True):
            os.sched_setaffinity(thread, [core])

    def sample(self, fn: Callable[[], object]) -> tuple[float, float, float]:
        """(wall, processor, waited) seconds of one call, from a moment when all ranks are ready."""
        self.waited = 0.0
        self.synchronize()
        dist.barrier()
        start, processor = time.perf_counter(), time.process_time()
        fn()
        self.synchronize()
        return time.perf_counter() - start, time.process_time() - processor, self.waited

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def thread_counts(self) -> list[int]:
        """How many threads one process is timed with."""
        return sorted({1, self.options.ranks}) if self.device.type == "cpu" else [1]

    def alone(self, fn: Callable[[], object], threads: int) -> tuple[float, float, float]:
        """The same of a call that rank 0 makes by itself, on as many cores, while the others wait."""
        result = (0.0, 0.0, 0.0)
        self.synchronize()
        dist.barrier()
        if self.rank == 0:
            if self.device.type == "cpu":
                self.use(self.cores[:threads])
            start, processor = time.perf_counter(), time.process_time()
            fn()
            self.synchronize()
            result = (time.perf_counter() - start, time.process_time() - processor, 0.0)
            if self.device.type == "cpu":
                self.use([self.cores[0]])
                # The second thread spins for a while before it sleeps, and now on the first one's core.
                time.sleep(0.02)
        dist.barrier()
        return result


def differentiated(fn: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    leaf = x.detach().requires_grad_()

    def run() -> list[Tensor]:
        out = fn(leaf)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad)]

    return run


def exchanges(part: sharding.ShardedGraph, storage: torch.dtype, D: int, layers: int) -> Callable[[], None]:
    """All exchanges of `layers` layers, with nothing to hide behind."""
    counts = [(side.halo_counts, side.send_counts) for side in part.sides]
    buffers = [[torch.zeros(sum(n), D, dtype=storage, device=part.device) for n in pair] for pair in counts]

    def run() -> None:
        for _ in range(layers):
            works = [
                dist.all_to_all_single(*pair, *count, group=part.group, async_op=True)
                for pair, count in zip(buffers, counts, strict=True)
            ]
            for work in works:
                work.wait()

    return run


def measure(rank: Rank, graph: BipartiteGraph, D: int, storage: torch.dtype) -> dict[str, Any]:
    """Samples of every implementation and pass, interleaved; and whether the divided result is the right one."""
    part = sharding.ShardedGraph.of(graph, device=rank.device)
    generator = torch.Generator().manual_seed(0)
    x, grad = (0.1 * torch.randn(graph.num_nodes, D, generator=generator) for _ in range(2))
    rows = torch.randint(0, graph.num_users, (BATCH,), generator=generator)
    rows = torch.cat((rows, torch.randint(graph.num_users, graph.num_nodes, (2 * BATCH,), generator=generator)))
    some = torch.randn(len(rows), D, generator=generator)
    mine = [t.chunk(part.world_size)[rank.rank].to(rank.device) for t in (rows, some)]
    own, own_grad = part.shard(x), part.shard(grad)

    def ours(t: Tensor, **more: Any) -> Tensor:
        return distributed.sharded_propagate(t, part, K, storage_dtype=storage, **more)

    divided: dict[str, Callable[[], object]] = {
        "fwd": lambda: ours(own),
        "fwd+bwd": differentiated(ours, own, own_grad),
        "step": differentiated(lambda t: ours(t, rows=mine[0]), own, mine[1]),
    }
    whole: dict[str, Callable[[], object]] = {}
    out = ours(own)
    error = torch.zeros(2, dtype=torch.float64)
    here = graph.to(rank.device) if rank.rank == 0 else graph
    if rank.rank == 0:
        x, grad, rows, some = (t.to(rank.device) for t in (x, grad, rows, some))

        def single(t: Tensor, **more: Any) -> Tensor:
            return lightgcn_propagate(t, here, K, storage_dtype=storage, **more)

        whole = {
            "fwd": lambda: single(x),
            "fwd+bwd": differentiated(single, x, grad),
            "step": differentiated(lambda t: single(t, rows=rows), x, some),
        }
        expected = part.shard(lightgcn_propagate(x, here, K).cpu()).double()
        error = torch.stack(((out.double() - expected).norm(), expected.norm())).cpu()
    samples: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(rank.options.rounds + 2):
        found = {}
        for name, layers in (("fwd", K), ("fwd+bwd", 2 * K), ("step", 0)):
            found[f"{name} ours"] = rank.sample(divided[name])
            if layers:
                for label, speed in (("compute", math.inf), ("link", SPEED))[: 2 if rank.device.type == "cpu" else 1]:
                    with Link(speed).carrying():
                        found[f"{name} {label}"] = rank.sample(divided[name])
                found[f"{name} exchange"] = rank.sample(exchanges(part, storage, D, layers))
            for threads in rank.thread_counts():
                found[f"{name} one_process x{threads}"] = rank.alone(whole.get(name, int), threads)
        if turn >= 2:  # the first two warm up
            for key, value in found.items():
                samples.setdefault(key, []).append(value)
    return {
        "samples": samples,
        "error": float(error[0] / error[1]),
        "bytes_per_layer": part.bytes_per_layer(D, storage),
        "peak_bytes": {name: machine.peak_bytes(fn, rank.device) for name, fn in divided.items()},
        "nodes": part.num_local,
        "edges": sum(side.col.numel() for side in part.sides),
    }


def serve(rank: int, options: argparse.Namespace, folder: str, names: list[str]) -> None:
    """One rank, from start to end; leaves its samples in the folder."""
    this = Rank(rank, options, Path(folder))
    results = []
    for number in range(len(names)):
        graph = BipartiteGraph.load(Path(folder) / f"graph-{number}.safetensors", mmap=True)
        results += [measure(this, graph, options.width, storage) for storage in STORAGE]
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def row(case: str, impl: str, pass_: str, dtype: str, threads: int, samples: np.ndarray) -> dict[str, Any]:
    """samples [ranks, rounds, 3]: a round lasts until its last rank is done, and costs what all ranks spend."""
    wall = samples[:, :, 0].max(0)
    p20, median, p80 = np.quantile(wall, (0.2, 0.5, 0.8)).tolist()
    return {
        "case": case,
        "impl": impl,
        "pass": pass_,
        "dtype": dtype,
        "threads": threads,
        "median_s": median,
        "p20_s": p20,
        "p80_s": p80,
        "cpu_s": float(np.median(samples[:, :, 1].sum(0))),
    }


def parts_of(pass_: str, samples: dict[str, np.ndarray], ours: dict[str, Any]) -> dict[str, Any]:
    """What the time of a divided call is made of; nothing for a pass whose exchanges were not timed alone."""
    if f"{pass_} exchange" not in samples:
        return {}
    wall = {key: float(np.median(values[:, :, 0].max(0))) for key, values in samples.items()}
    whole, compute, exchange = (wall[f"{pass_} {name}"] for name in ("ours", "compute", "exchange"))
    waited = float(np.median(samples[f"{pass_} ours"][:, :, 2].max(0)))
    parts: dict[str, Any] = {
        "compute_s": compute,
        "exchange_s": exchange,
        "wait_s": waited,
        "hidden": None,
        "link": None,
    }
    alone = {"fwd": K, "fwd+bwd": 2 * K}[pass_] * max(ours["bytes_per_layer"]) / SPEED
    if alone:
        parts["hidden"] = 1.0 - (whole - compute) / exchange
    if alone and f"{pass_} link" in wall:
        linked = wall[f"{pass_} link"]
        parts["link"] = {"median_s": linked, "exchange_s": alone, "hidden": 1.0 - (linked - compute) / alone}
    return parts


def rows_of(case: str, dtype: str, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The result rows of one measurement, from what each rank brought back."""
    samples = {key: np.array([rank["samples"][key] for rank in ranks]) for key in ranks[0]["samples"]}
    found = []
    for key in samples:
        pass_, impl, *threads = key.split()
        if impl in ("compute", "link", "exchange"):
            continue
        result = row(case, impl, pass_, dtype, int(threads[0][1:]) if threads else len(ranks), samples[key])
        if impl == "ours":
            error = ranks[0]["error"]
            result |= {"error": error, "agrees": error <= (1e-6 if dtype == "float32" else 1e-3)}
            # The largest rank's, above what was there before the call, its result included.
            peaks = [rank["peak_bytes"][pass_] for rank in ranks]
            result["peak_bytes"] = None if None in peaks else max(peaks)
            result["bytes_per_layer"] = [max(rank["bytes_per_layer"]) for rank in ranks]
            result["nodes"], result["edges"] = ([rank[name] for rank in ranks] for name in ("nodes", "edges"))
            result |= parts_of(pass_, samples, result)
        found.append(result)
    return found


def line(rows: list[dict[str, Any]], ours: dict[str, Any]) -> str:
    """One pass: ours, its parts, and one process beside it."""
    peers = [r for r in rows if all(r[k] == ours[k] for k in ("case", "pass", "dtype")) and r is not ours]
    cells = [f"{ours['case']} {ours['pass']} {ours['dtype']}: {ours['median_s'] * 1e3:.2f} ms"]
    cells += [
        f"one process x{r['threads']} {r['median_s'] * 1e3:.2f} ms ({r['median_s'] / ours['median_s']:.2f}x)"
        for r in peers
    ]
    if "hidden" in ours:
        times = ", ".join(f"{name} {ours[f'{name}_s'] * 1e3:.2f}" for name in ("compute", "exchange", "wait"))
        cells.append(f"{times} ms" + ("" if ours["hidden"] is None else f", {ours['hidden']:.0%} hidden"))
    if ours.get("link"):
        whole, alone, hidden = (ours["link"][name] for name in ("median_s", "exchange_s", "hidden"))
        cells.append(f"10 Gbit/s: {whole * 1e3:.2f} ms with {alone * 1e3:.2f} of exchange, {hidden:.0%} hidden")
    cells.append(f"{max(ours['bytes_per_layer']) / 1e6:.2f} MB a layer, error {ours['error']:.1e}")
    return " | ".join(cells)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if the divided result is not the right one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--graphs", nargs="+", default=["gowalla", "power-law 1M"])
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result file here")
    options = parser.parse_args(argv)
    available = torch.cuda.device_count() if options.device == "cuda" else len(os.sched_getaffinity(0))
    if not 1 <= options.ranks <= available:
        parser.error(f"--ranks: expected 1 to {available} (one for each of this machine's), got {options.ranks}")
    suite = harness.Suite(harness.Options(device="cpu"))
    names = graphs.available(suite, options.graphs)
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            graphs.load(suite, name).save(Path(folder) / f"graph-{number}.safetensors")
        mp.spawn(serve, (options, folder, names), nprocs=options.ranks)
        results = [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(options.ranks)]
    rows: list[dict[str, Any]] = []
    cases = [(name, str(storage).removeprefix("torch.")) for name in names for storage in STORAGE]
    for (name, dtype), ranks in zip(cases, zip(*results, strict=True), strict=True):
        rows += rows_of(f"{name} D={options.width} K={K} ranks={options.ranks}", dtype, list(ranks))
    ours = [r for r in rows if r["impl"] == "ours"]
    print("\n".join([line(rows, r) for r in ours] + [f"not run: {failure}" for failure in suite.failures]))
    if options.json is not None:
        head = machine.description(torch.device(options.device))
        result = {**head, "data": suite.data, "ceilings": {}, "failures": suite.failures, "rows": rows}
        write_json(result, options.json)
    return int(not ours or not all(r["agrees"] for r in ours))


if __name__ == "__main__":
    raise SystemExit(main())

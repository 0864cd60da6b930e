"""What growth.py measured, as power fits, a page and a plot. Measures nothing; the plan for a billion edges is in
growth_plan.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import growth_plan
import numpy as np
from growth_plan import GB, short, table
from matplotlib.figure import Figure

Size = dict[str, Any]
STAGES = ("build", "forward", "forward bf16", "forward+backward", "BPR epoch", "BPR epoch bf16")


def peak_of(size: Size, stage: str) -> float:
    """Bytes resident at the stage's peak: its own, the graph, and its input beside the ids."""
    own = size["stages"][stage]["peak_bytes"]
    if stage == "build":
        return float(own)
    # Forward holds x, the gradient also what comes back; a training starts from the graph alone.
    inputs = {"forward": 1, "forward bf16": 1, "forward+backward": 2}.get(stage, 0)
    return float(own + size["graph_bytes"] + inputs * size["table_bytes"])


VALUES: dict[str, Callable[[Size, str], float]] = {
    "seconds": lambda size, stage: float(size["stages"][stage]["seconds"]),
    "bytes": peak_of,
}


def fits(sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """value = c edges^exponent for each stage, least squares of the logarithms over the sizes that are trained."""
    found = []
    for stage in STAGES:
        for what, value in VALUES.items():
            small = [size for size in sizes if stage in size["stages"] and not size["large"]]
            if len(small) < 2:
                continue
            edges = [size["edges"] for size in small]
            exponent, log_c = np.polyfit(np.log(edges), np.log([value(size, stage) for size in small]), 1)
            fit = {"stage": stage, "what": what, "exponent": float(exponent), "c": float(np.exp(log_c)), "held_out": []}
            for size in sizes:
                if size["large"] and stage in size["stages"]:
                    predicted = float(np.exp(log_c) * size["edges"] ** exponent)
                    fit["held_out"].append(
                        {"edges": size["edges"], "predicted": predicted, "measured": value(size, stage)}
                    )
            found.append(fit)
    return found


def times(sizes: Sequence[Size]) -> list[str]:
    def cell(size: Size, stage: str) -> str:
        found = size["stages"].get(stage)
        if found is None:
            return "-"
        text = short(found["seconds"])
        if "steps" in found and found["steps"] < found["steps_of_an_epoch"]:
            text += f" (from {found['steps']} of {found['steps_of_an_epoch']} steps)"
        return text

    rows = [
        [f"{size['edges']:,}", f"{size['users'] + size['items']:,}", *(cell(size, s) for s in STAGES)] for size in sizes
    ]
    return table(["edges", "nodes", *STAGES], rows)


def memory(sizes: Sequence[Size]) -> list[str]:
    def cell(size: Size, stage: str) -> str:
        return f"{peak_of(size, stage) / GB:.3f}" if stage in size["stages"] else "-"

    head = ["edges", "graph", "table N x D", *STAGES, "build / graph", "scratch of forward / table, f32", "bf16"]
    rows = []
    for size in sizes:
        scratch = [
            f"{size['stages'][s]['peak_bytes'] / size['table_bytes'] - 1:.2f}" for s in ("forward", "forward bf16")
        ]
        ratio = size["stages"]["build"]["peak_bytes"] / size["graph_bytes"]
        sizes_gb = [f"{size[name] / GB:.3f}" for name in ("graph_bytes", "table_bytes")]
        rows.append([f"{size['edges']:,}", *sizes_gb, *(cell(size, s) for s in STAGES), f"{ratio:.2f}", *scratch])
    return table(head, rows)


def gather(sizes: Sequence[Size]) -> list[str]:
    rows = []
    for size in sizes:
        cells = [f"{size['edges']:,}"]
        for stage in ("forward", "forward bf16"):
            found = size["stages"][stage]
            rate, ceiling = found["gathered_bytes_per_s"], found["gather_ceiling_bytes_per_s"]
            cells += [f"{rate / GB:.1f}", f"{ceiling / GB:.1f}", f"{rate / ceiling:.0%}"]
        rows.append(cells)
    names = ("gathered GB/s", "uniform gather GB/s", "ratio")
    return table(["edges", *(f"{name}, {dtype}" for dtype in ("f32", "bf16") for name in names)], rows)


def fit_rows(found: Sequence[dict[str, Any]]) -> list[str]:
    def text(value: float, what: str) -> str:
        return short(value) if what == "seconds" else f"{value / GB:.2f} GB"

    rows = []
    for fit in found:
        held = "; ".join(
            f"{text(h['predicted'], fit['what'])} / {text(h['measured'], fit['what'])} at {h['edges']:,} edges"
            for h in fit["held_out"]
        )
        rows.append([fit["stage"], fit["what"], f"{fit['exponent']:.2f}", held or "-"])
    return table(["stage", "what", "exponent", "fit / measured beyond it"], rows)


def page(result: dict[str, Any]) -> str:
    sizes = result["sizes"]
    clock = "processor" if result["threads"] == 1 else "wall"
    rates = result["ceilings"]["copy_bytes_per_s"]
    copied = max(rates, key=int)
    lines = [
        "# Growth with the number of edges",
        "",
        f"{result['cpu']}, {result['simd']}, {result['threads']} thread(s), torch {result['versions']['torch']}, "
        f"commit {result['commit'][:12]}; D = {result['D']}, K = {result['K']}; "
        f"a copy of {int(copied) >> 20} MiB runs at {rates[copied] / GB:.0f} GB/s (read + written). "
        f"Made by `python benchmarks/growth.py --threads {result['threads']}`, each size in a process of its own; "
        f"{clock} time, medians of up to nine calls. The graphs are synthetic: users uniform, items by "
        "(rank + 20)^-0.8, 25 edges a user and 40 an item (`benchmarks/graphs.py`); pairs drawn twice count once.",
        "",
        "![Time and memory by edges](growth.png)",
        "",
        "## Time",
        "",
        *times(sizes),
        "`build`: from unsorted int64 pairs. `forward+backward`: every row asked for. `BPR epoch`: as many samples as "
        f"edges in batches of {result['batch_size']}, drawn within the time, with trimmed layers and fused Adam; where "
        "it says so, the mean step of those taken times the number of steps.",
        "",
        "How far the propagation is from the gather ceiling: bytes of gathered rows by the time of the whole forward, "
        "beside the fastest sum of uniformly random rows of a table of that size that torch reaches on as many "
        "threads. Popular items stay in a cache, so the ratio may pass 100 %.",
        "",
        *gather(sizes),
        "## Memory",
        "",
        "GB resident at the peak of a stage: the graph, its inputs, its result and its scratch; of `build` what comes "
        "on top of the ids, the graph included. A training holds the embedding, its gradient and two moments, and at "
        "any size 0.1 GB of drawn batches.",
        "",
        *memory(sizes),
        "## Fits",
        "",
        "value = c edges^exponent, least squares of the logarithms over the sizes that are trained. A step propagates "
        "over the whole graph and an epoch has edges / batch steps: at one batch size an epoch grows with the square. "
        "Where the tables outgrow the caches within these sizes, the exponent of the time is above that of the work, "
        "and does not hold beyond them: compare the last column.",
        "",
        *fit_rows(result["fits"]),
        *growth_plan.lines(result),
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    sizes = result["sizes"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    marks = dict(zip(STAGES, "osD^vP", strict=True))
    for axes, what in ((left, "seconds"), (right, "bytes")):
        for stage in STAGES:
            having = [size for size in sizes if stage in size["stages"]]
            if not having:
                continue
            edges = np.array([size["edges"] for size in having], dtype=float)
            values = [VALUES[what](size, stage) for size in having]
            fit = next((f for f in result["fits"] if (f["stage"], f["what"]) == (stage, what)), None)
            label = stage if fit is None else f"{stage}: edges^{fit['exponent']:.2f}"
            (line,) = axes.loglog(edges, values, marks[stage], label=label)
            if fit is not None:
                axes.loglog(edges, fit["c"] * edges ** fit["exponent"], color=line.get_color(), linewidth=1)
        axes.set_xlabel("distinct edges")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
    left.set_ylabel("seconds")
    right.set_ylabel("bytes resident at the peak")
    left.set_title(f"Time, {result['threads']} thread(s), D={result['D']}, K={result['K']}")
    right.set_title("Memory")
    figure.savefig(path, dpi=110, metadata={"Software": None})

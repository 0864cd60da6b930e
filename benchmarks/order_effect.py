"""What the order of training costs in accuracy: the stages in the orders group and random, over several seeds.

    collm-fast prepare --source ml-100k --out data/ml-100k
    python benchmarks/order_effect.py --data data/ml-100k --llm smollm2 --out runs/order

Trains one run for each order and seed on the rows of one choice, with one collaborative model, and writes
results/order-effect.json and .md. Continues where it was stopped. The speed of the orders is bench_train.py's matter.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

import collm_fast
from collm_fast.config import CFConfig
from collm_fast.data.dataset import load_dataset
from collm_fast.training.cf import fit_cf

STAGES = {"lora": ("stage1",), "cie": ("stage2",), "both": ("stage1", "stage2")}
HELD_OUT = 0.1


def run_one(arguments: argparse.Namespace, order: str, seed: int) -> dict[str, Any]:
    """One run's test metrics and seconds; the rows of the subsets follow from the seed, the same for all orders."""
    kind, _, cut = order.partition(":")
    steps = -(-arguments.prompts // 16)
    stage = {"epochs": 1.0, "eval_every": -(-steps // 2), "patience": None}
    run = collm_fast.train(
        arguments.data,
        arguments.llm,
        arguments.out / "cf",
        arguments.out / f"{order.replace(':', '')}-{seed}",
        order=kind,
        group_rows=int(cut) if cut else None,
        seed=seed,
        stage=arguments.stage,
        loss="yes-no",
        cie_rows="held-out",
        collaborative={"held_out": HELD_OUT},
        prompt={"history_length": 5},
        limit_train=arguments.prompts,
        limit_valid=500,
        limit_eval=1000,
        resume="auto",
        stage1={**stage, "lr": 1e-3},
        stage2={**stage, "lr": 3e-4},
    )
    row: dict[str, Any] = {"order": order, "seed": seed, "dtype": run.record["dtype"]}
    for name in STAGES[arguments.stage]:
        test = run.metrics[name]["test"]["all"]
        row |= {f"{name}_auc": test["auc"], f"{name}_uauc": test["uauc"]}
        row[f"{name}_s"] = run.record["seconds"][name]
    return row


def table(rows: Sequence[dict[str, Any]], stages: Sequence[str]) -> str:
    """Every run, the mean of each order, and its difference from the last one within a seed."""
    names = [f"{stage}_{metric}" for stage in stages for metric in ("auc", "uauc")]
    titles = [f"stage {stage[-1]} {metric}" for stage in stages for metric in ("AUC", "UAUC")]
    lines = [f"| order | seed | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for row in rows:
        lines.append(f"| {row['order']} | {row['seed']} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    orders = list(dict.fromkeys(row["order"] for row in rows))
    values = {order: np.array([[r[n] for n in names] for r in rows if r["order"] == order]) for order in orders}
    for order in orders:
        mean, spread = values[order].mean(0), values[order].std(0, ddof=1)
        shown = " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))
        lines.append(f"| **{order}** | mean ± sd | {shown} |")
    for order in orders[:-1]:
        difference = values[order] - values[orders[-1]]
        error = difference.std(0, ddof=1) / np.sqrt(len(difference))
        shown = " | ".join(f"{d:+.3f} ± {e:.3f}" for d, e in zip(difference.mean(0), error, strict=True))
        lines.append(f"| {order} - {orders[-1]} | mean ± standard error | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llm", default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--orders",
        nargs="+",
        default=["group", "random"],
        help="the last one is what the others are compared with; group:4 is the order group with --group-rows 4",
    )
    parser.add_argument("--prompts", type=int, default=1000, help="training prompts of each stage")
    parser.add_argument("--stage", choices=tuple(STAGES), default="both")
    parser.add_argument("--name", default="order-effect", help="of the two files in the results folder")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        parser.error(f"order_effect: expected at least 2 seeds, got {len(arguments.seeds)}")
    dataset = load_dataset(arguments.data)
    if not (arguments.out / "cf" / "cf.safetensors").is_file():
        fit_cf(
            dataset,
            CFConfig(model="mf", dim=64, lr=1e-2, bias=True, held_out=HELD_OUT, seed=2023),
            out=arguments.out / "cf",
        )
    rows = [run_one(arguments, order, seed) for seed in arguments.seeds for order in arguments.orders]
    found = {
        "date": datetime.date.today().isoformat(),
        **machine.description(torch.device("cpu")),
        "data": dataset.fingerprint,
        "prompts": arguments.prompts,
        "stage": arguments.stage,
        "rows": rows,
    }
    (arguments.results / f"{arguments.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    heading = f"# The order of training and test metrics: {arguments.prompts} prompts a stage"
    shown = table(rows, STAGES[arguments.stage])
    (arguments.results / f"{arguments.name}.md").write_text(f"{heading}\n\n{shown}\n")


if __name__ == "__main__":
    main()

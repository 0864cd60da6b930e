"""What a run of the training benchmark shows: samples per second, ratios, a bar chart. Timing: `bench_train.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ORDER = ("naive", "generic", "prefix-grouper", "ours")
COLOURS = {"naive": "#a8a29e", "generic": "#c2410c", "prefix-grouper": "#0f766e", "ours": "#1d4ed8"}


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each implementation in each case, from the rows of a result file.

    Processor time counts on one thread of a CPU, wall time elsewhere; `ours_over_it` is how many times as fast ours is,
    None where either computes something else; `floor_fraction` is the floor's time over the implementation's.
    """
    out = []
    ours = {_case(row): row for row in result["rows"] if row["impl"] == "ours"}
    for row in result["rows"]:
        mine, samples = ours.get(_case(row)), result["data"][row["case"]]["samples"]
        comparable = mine is not None and mine["agrees"] and row["agrees"]
        paired, quotient = row.get("over_ours"), _seconds(row, result) / _seconds(mine, result) if comparable else None
        out.append(
            {
                "case": row["case"],
                "impl": row["impl"],
                "dtype": row["dtype"],
                "threads": row["threads"],
                "samples_per_s": samples / _seconds(row, result),
                "ours_over_it": (quotient if paired is None else paired) if comparable else None,
                "floor_fraction": row["floor_s"] / _seconds(row, result) if row["floor_s"] else None,
                "peak_bytes": row["peak_bytes"],
            }
        )
    return out


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["pass"], row["dtype"], row["threads"]


def _seconds(row: Mapping[str, Any], result: Mapping[str, Any]) -> float:
    by_cpu = result["device"] == result["cpu"] and row["threads"] == 1
    return float(row["cpu_s"] if by_cpu and row["cpu_s"] > 0 else row["median_s"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of `summary`: a line a case and dtype, a column an implementation."""
    lines = [
        "| case | dtype | threads | " + " | ".join(f"{impl}, samples/s" for impl in ORDER) + " | over naive | over the "
        "better generic | of the floor | peak, MiB (naive) |",
        "|" + "---|" * 11,
    ]
    cases: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["dtype"], row["threads"]), {})[row["impl"]] = row
    for (case, dtype, threads), found in cases.items():
        speed = [f"{found[impl]['samples_per_s']:.2f}" if impl in found else "-" for impl in ORDER]
        generic = [r for impl in ("generic", "prefix-grouper") if (r := _ratio(found, impl)) is not None]
        ratios = [_ratio(found, "naive"), min(generic, default=None)]
        fraction = found["ours"]["floor_fraction"] if "ours" in found else None
        cells = [
            case,
            dtype,
            str(threads),
            *speed,
            *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            "-" if fraction is None else f"{fraction:.0%}",
            " ".join([_mebibytes(found.get("ours")), f"({_mebibytes(found.get('naive'))})"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(found: Mapping[str, Mapping[str, Any]], impl: str) -> float | None:
    return found[impl]["ours_over_it"] if impl in found else None


def _mebibytes(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"


def memory_line(memory: Mapping[str, Any]) -> str:
    """The memory of a long run in a sentence."""
    if memory["growth_bytes"] is None:
        return f"memory after {memory['steps']} steps: too few to tell"
    growth, slope = memory["growth_bytes"] / 2**20, memory["growth_bytes_per_step"] / 2**10
    peaks = " and ".join(f"{peak / 2**20:.0f}" for peak in memory["halves_peak_bytes"])
    return (
        f"memory from step 50 to {memory['steps']}: {growth:+.1f} MiB, {slope:+.2f} KiB a step; "
        f"highest in each half {peaks} MiB"
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bars of samples per second over the naive way's, a group a case, a panel a dtype; written as PNG."""
    from matplotlib.figure import Figure

    rows = result["summary"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(10, 3.6 * len(dtypes)), dpi=110, layout="constrained")
    for panel, dtype in enumerate(dtypes):
        axes = figure.add_subplot(len(dtypes), 1, panel + 1)
        speed = {(row["case"], row["impl"]): row["samples_per_s"] for row in rows if row["dtype"] == dtype}
        cases = list(dict.fromkeys(case for case, impl in speed if (case, "naive") in speed))
        for place, impl in enumerate(ORDER):
            x = [n + (place - 1.5) * 0.2 for n, case in enumerate(cases) if (case, impl) in speed]
            height = [speed[case, impl] / speed[case, "naive"] for case in cases if (case, impl) in speed]
            bars = axes.bar(x, height, 0.19, label=impl, color=COLOURS[impl])
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.set_xticks(range(len(cases)), cases, fontsize=8)
        axes.set(title=f"{dtype}, {result['device']}", ylabel="samples per second, naive = 1")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No version in the file: the same numbers give the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})

"""The plots of a report as PNG bytes; what is in them is `report.py`'s matter. Imports matplotlib. Floor F3."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collm_fast import metrics

# One colour a row in every plot; further stage 2 rows take the rest in turn.
COLOURS = {
    "item_mean": "#a8a29e",
    "item_user_mean": "#78716c",
    "cf": "#0f766e",
    "stage1": "#c2410c",
    "stage2": "#1d4ed8",
}
_MORE = ("#7e22ce", "#be185d", "#4d7c0f")
# Upper ends of the classes of training interactions; the last class is open.
INTERACTION_CLASSES = (0, 4, 9, 19, 49, 99, 199)
MIN_CLASS_ROWS = 20


@dataclass(frozen=True)
class Scored:
    """The test rows as one model scored them; `probability` is None where the model has none."""

    score: NDArray[np.float64]
    probability: NDArray[np.float64] | None
    label: NDArray[np.int64]
    user_train_rows: NDArray[np.int64]
    item_train_rows: NDArray[np.int64]


def colour(row: str, place: int = 0) -> str:
    """The colour of a row of the table."""
    return COLOURS.get(row, _MORE[place % len(_MORE)])


def _figure(draw: Callable[[Any], None], title: str, x: str, y: str) -> bytes:
    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No date in the file: the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def loss_plot(history: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Training loss over steps, each stage with its running mean."""

    def draw(axes: Any) -> None:
        for place, (row, curves) in enumerate(history.items()):
            loss = np.asarray(curves["loss"], np.float64)
            if loss.size == 0:
                continue
            width = max(1, loss.size // 20)
            padded = np.concatenate([[0.0], np.cumsum(loss)])
            ends = np.arange(1, loss.size + 1)
            starts = np.maximum(ends - width, 0)
            axes.plot(ends, loss, color=colour(row, place), alpha=0.25, linewidth=0.8)
            smooth = (padded[ends] - padded[starts]) / (ends - starts)
            axes.plot(ends, smooth, color=colour(row, place), label=f"{row}, mean of {width} steps")

    return _figure(draw, "Training loss", "optimizer step", "binary cross-entropy")


def validation_plot(
    history: Mapping[str, Mapping[str, Sequence[float]]], kept: Mapping[str, int], levels: Mapping[str, float]
) -> bytes:
    """Validation AUC over steps, the step whose state was kept marked, beside the level of the baselines.

    Where evaluations scored a sample, its 95 % interval is shaded.
    """

    def draw(axes: Any) -> None:
        for place, (row, curves) in enumerate(history.items()):
            steps, values = np.asarray(curves["eval_step"]), np.asarray(curves["valid_auc"], np.float64)
            if steps.size:
                axes.plot(steps, values, marker="o", markersize=3, color=colour(row, place), label=row)
                low, high = (np.asarray(curves.get(name, ()), np.float64) for name in ("valid_low", "valid_high"))
                if low.size == steps.size:
                    axes.fill_between(steps, low, high, color=colour(row, place), alpha=0.12, linewidth=0)
                at = steps == kept.get(row)
                axes.plot(steps[at], values[at], marker="*", markersize=13, linestyle="", color=colour(row, place))
        for row, level in levels.items():
            axes.axhline(level, color=colour(row), linestyle="--", linewidth=1, label=row)

    return _figure(draw, "Validation AUC (star: the state that was kept)", "optimizer step", "AUC")


def roc_plot(rows: Mapping[str, Scored]) -> bytes:
    """ROC curves on the test rows."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="#d6d3d1", linewidth=1)
        for place, (row, scored) in enumerate(rows.items()):
            value = metrics.auc(scored.score, scored.label).value
            if np.isnan(value):
                continue
            order = np.argsort(-scored.score, kind="stable")
            score, label = scored.score[order], scored.label[order]
            last = np.flatnonzero(np.r_[score[1:] != score[:-1], True])
            true = np.r_[0, np.cumsum(label)[last]] / label.sum()
            false = np.r_[0, np.cumsum(1 - label)[last]] / (1 - label).sum()
            axes.plot(false, true, color=colour(row, place), linewidth=1.4, label=f"{row}: {value:.3f}")

    return _figure(draw, "ROC on the test rows (area in the legend)", "false positive rate", "true positive rate")


def calibration_plot(rows: Mapping[str, Scored], bins: int = 10) -> bytes:
    """Share of liked items against the predicted probability, in bins of equally many test rows."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="#d6d3d1", linewidth=1)
        for place, (row, scored) in enumerate(rows.items()):
            if scored.probability is None or scored.label.size == 0:
                continue
            order = np.argsort(scored.probability, kind="stable")
            parts = [part for part in np.array_split(order, bins) if part.size]
            predicted = [scored.probability[part].mean() for part in parts]
            liked = [scored.label[part].mean() for part in parts]
            axes.plot(predicted, liked, marker="o", markersize=3, color=colour(row, place), label=row)

    return _figure(draw, "Calibration on the test rows", "predicted P(yes)", "share liked")


def interactions_plot(rows: Mapping[str, Scored]) -> bytes:
    """AUC by the number of training rows of the user, and of the item."""
    figure = Figure(figsize=(9.6, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what in zip(panels, ("user", "item"), strict=True):
        names: list[str] = []
        for place, (row, scored) in enumerate(rows.items()):
            counts = scored.user_train_rows if what == "user" else scored.item_train_rows
            classes = interaction_classes(counts)
            names = [f"{name}\n({mask.sum()})" for name, mask in classes]
            values = [metrics.auc(scored.score[mask], scored.label[mask]).value for _, mask in classes]
            axes.plot(range(len(values)), values, marker="o", markersize=4, color=colour(row, place), label=row)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.axhline(0.5, color="#d6d3d1", linewidth=1)
        axes.set(title=f"by the {what}'s training rows", xlabel="training rows (test rows in the class)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("AUC")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False, fontsize=8)
    return _png(figure)


def interaction_classes(counts: NDArray[np.int64]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Classes of training interactions with at least `MIN_CLASS_ROWS` rows; a smaller one joins the next."""
    classes: list[tuple[str, NDArray[np.bool_]]] = []
    low = 0
    for high in (*INTERACTION_CLASSES, None):
        mask = (counts >= low) & (counts <= (high if high is not None else counts.max(initial=0)))
        if mask.sum() >= MIN_CLASS_ROWS or (high is None and mask.any()):
            name = f"{low}+" if high is None else str(low) if high == low else f"{low}-{high}"
            classes.append((name, mask))
            low = 0 if high is None else high + 1
    return classes

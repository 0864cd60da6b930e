"""The report of a run: report.md with PNG plots, and report.html, one self-contained file. Floor F3.

Reads the run folder and nothing else, so a report can be made again at any time. Sentences are `conclusions.py`'s,
plots `plots.py`'s, the page's style `report_page.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast import conclusions
from collm_fast.io.atomic import write_atomic
from collm_fast.io.run_folder import RunFolder
from collm_fast.io.tables import read_table
from collm_fast.report_page import Block, Heading, Image, Items, Paragraph, Pre, Table, to_html, to_markdown

logger = logging.getLogger(__name__)

# The order of the rows in every table; stage 2 rows with other inputs follow.
ROWS = ("item_mean", "item_user_mean", "cf", "stage1", "stage2")


def ordered_rows(rows: Mapping[str, Any]) -> list[str]:
    """The rows of metrics.json in the order of the tables."""
    return [row for row in ROWS if row in rows] + sorted(row for row in rows if row not in ROWS)


def number(value: float | None) -> str:
    """A metric as tables print it."""
    return "–" if value is None else f"{value:.3f}"


def with_interval(table: Mapping[str, Any], name: str) -> str:
    """`.739 [.701, .778]`, or a dash."""
    if table[name] is None:
        return "–"
    low, high = table[f"{name}_low"], table[f"{name}_high"]
    return number(table[name]) + (f" [{number(low)}, {number(high)}]" if low is not None else "")


def table_rows(metrics: Mapping[str, Any], split: str, part: str) -> list[list[str]]:
    """One table of numbers as text: a line for each row of metrics.json that has this split."""
    lines = []
    for row in ordered_rows(metrics):
        if split in metrics[row]:
            table = metrics[row][split][part]
            lines.append(
                [
                    row,
                    with_interval(table, "auc"),
                    with_interval(table, "uauc"),
                    number(table["ndcg"]),
                    number(table["log_loss"]),
                    str(table["users_counted"]),
                    str(table["rows"]),
                ]
            )
    return lines


HEADER = ["row", "AUC [95 %]", "UAUC [95 %]", "NDCG", "log loss", "users counted", "rows"]


def console_table(metrics: Mapping[str, Any], split: str = "test") -> str:
    """The test table for a terminal, overall, warm and cold; a part without rows is left out."""
    lines: list[str] = []
    for part in ("all", "warm", "cold"):
        if not any(splits[split][part]["rows"] for splits in metrics.values() if split in splits):
            continue
        body = [[part, *HEADER[1:]], *table_rows(metrics, split, part)]
        widths = [max(len(line[column]) for line in body) for column in range(len(HEADER))]
        for line in body:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def console_text(folder: RunFolder) -> str:
    """The test table of a run and its conclusions, for a terminal."""
    sentences = folder.record.get("conclusions", [])
    return "\n".join([console_table(folder.metrics), "", *(f"- {sentence}" for sentence in sentences)]).rstrip()


@dataclass(frozen=True)
class _Predictions:
    """The test rows as predictions/test.parquet holds them."""

    user: NDArray[np.int64]
    label: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]

    @classmethod
    def read(cls, folder: RunFolder, split: str) -> _Predictions | None:
        path = folder.path / "predictions" / f"{split}.parquet"
        if not path.is_file():
            return None
        columns = read_table(path, ["uid", "label"], "report")
        return cls(columns["uid"].astype(np.int64), columns["label"].astype(np.int64), columns)

    def scores(self, kind: str = "score") -> dict[str, NDArray[np.float64]]:
        """The scores of the table's rows, or of what is beside the table (`control`)."""
        prefix = f"{kind}:"
        found = {name.removeprefix(prefix): column for name, column in self.columns.items() if name.startswith(prefix)}
        return {row: found[row].astype(np.float64) for row in ordered_rows(found)}


def write_report(folder: RunFolder) -> list[str]:
    """Write report.html, report.md and the plots of a run, and the sentences of the conclusion, which it returns."""
    predictions = _Predictions.read(folder, "test")
    stages = folder.record.get("stages", {})
    sentences: list[str] = []
    if predictions is not None:
        scores = {**predictions.scores(), **predictions.scores("control")}
        sentences = conclusions.conclusions(folder.metrics, stages, scores, predictions.user, predictions.label)
    folder.update(conclusions=sentences)
    images = _plots(folder, predictions)
    blocks = [*_summary(folder, sentences), *_tables(folder, predictions), *_notes(folder)]
    blocks += [Heading("Plots"), *images] if images else []
    blocks += [*_prompts(folder), *_machine(folder)]
    for image in images:
        write_atomic(folder.path / image.name, image.png)
    write_atomic(folder.path / "report.md", to_markdown(blocks))
    write_atomic(folder.path / "report.html", to_html(blocks, title=f"CoLLM run {folder.path.name}"))
    return sentences


def _summary(folder: RunFolder, sentences: list[str]) -> list[Block]:
    record = folder.record
    data, llm, cf = record.get("data", {}), record.get("llm", {}), record.get("cf", {})
    text = (
        f"{llm.get('name', '?')} on {data.get('path', '?')} ({data.get('source', '?')}, split rule "
        f"{data.get('split_rule', '?')}), collaborative model {cf.get('name', '?')}."
    )
    return [Heading(f"CoLLM run {folder.path.name}", 1), Paragraph(text), Heading("What it shows"), Items(sentences)]


def _tables(folder: RunFolder, predictions: _Predictions | None) -> list[Block]:
    blocks: list[Block] = []
    liked = "" if predictions is None else f" ({np.unique(predictions.user[predictions.label == 1]).size} in test)"
    warm = "user and item both occur in the train rows (`not_cold`)"
    for split, what in (("test", "Test"), ("valid", "Validation (chose the kept state)")):
        if not any(split in tables for tables in folder.metrics.values()):
            continue
        blocks.append(Heading(what))
        for part, name in (("all", "All rows"), ("warm", f"Warm rows: {warm}"), ("cold", "Cold rows: the others")):
            blocks.append(Table(name, HEADER, table_rows(folder.metrics, split, part)))
    blocks.append(
        Paragraph(
            "Intervals are 95 % percentile intervals over resampled users. UAUC is the mean AUC over the users that "
            f"have both classes, counted in the table; NDCG is over each user's full list, of the users with a liked "
            f"row{liked}. item_mean and "
            "item_user_mean are smoothed means of the training labels, cf is the collaborative model alone: none of "
            "them needs a language model."
        )
    )
    controls = folder.record.get("controls", {})
    if controls:
        lines = [[name, with_interval(table, "auc"), with_interval(table, "uauc")] for name, table in controls.items()]
        blocks.append(Table("More without a language model, same test rows", ["model", *HEADER[1:3]], lines))
        blocks.append(
            Paragraph(
                "logistic is a ridge-regularised logistic regression on the user's and the item's embedding, fitted "
                "to the rows that stage 2 trained on: a linear reading of what the mapper reads. +stats adds user and "
                "item statistics, +pair the product of the two embeddings."
            )
        )
    return blocks


def _notes(folder: RunFolder) -> list[Block]:
    record = folder.record
    rows = record.get("rows", {})
    notes = []
    for row, stage in record.get("stages", {}).items():
        if "train_rows" in stage:
            interim = stage.get("interim")
            first = "" if interim else f"; {stage['first_auc']:.3f} before the first step"
            text = (
                f"{row} took {stage['steps']} optimizer steps over {stage['train_rows']} training rows and kept the "
                f"state of step {stage['best_step']} (validation AUC {stage['best_auc']:.3f}{first})."
            )
            if interim:
                text += f" {_interim(interim, stage['first_auc'], rows.get('valid'))}"
            if "inputs" in stage:
                text += f" The mapper read: {stage['inputs']}."
            notes.append(text)
    if rows.get("stage2_rule"):
        notes.append(f"Stage 2 trained on {rows['stage2_rule']}.")
    if rows.get("test"):
        notes.append(
            f"Scored: {rows['test']} of {rows['test_all']} test rows and {rows['valid']} of {rows['valid_all']} "
            "validation rows, whole users."
        )
    return [Heading("What was done"), Items(notes)] if notes else []


def _interim(interim: Mapping[str, Any], first: float, all_rows: int | None) -> str:
    """The sentence on a stage whose evaluations scored a sample of the validation rows."""
    scored, margin = interim["scored_on_all_rows"], interim["margin"]
    each = ", ".join(f"step {state['step']}: {state['auc']:.3f}" for state in scored)
    near = "" if margin is None else f", those within {margin:.3f} (half the width of its interval) of the best"
    return (
        f"Its {interim['evaluations']} evaluations scored a fixed sample of {interim['rows']} validation rows, whole "
        f"users: AUC {with_interval(interim, 'auc')} for the kept state, {first:.3f} before the first step; "
        f"{len(scored)} of the states{near}, were then scored on all {all_rows} ({each})."
    )


def _prompts(folder: RunFolder) -> list[Block]:
    examples = folder.record.get("prompt_examples", {})
    blocks: list[Block] = [Heading("What the model reads")] if examples else []
    for stage, text in examples.items():
        blocks += [Paragraph(f"First training prompt of {stage}; ⟨user⟩ and ⟨item⟩ are injected rows:"), Pre(text)]
    return blocks


def _machine(folder: RunFolder) -> list[Block]:
    record = folder.record
    lines = [
        [name, str(record[name])] for name in ("device", "dtype", "quantize", "seed") if record.get(name) is not None
    ]
    lines += [[name, version] for name, version in record.get("versions", {}).items()]
    seconds = [[part, f"{value:.1f}"] for part, value in record.get("seconds", {}).items()]
    blocks: list[Block] = [
        Heading("To repeat it"),
        Pre("\n".join(record.get("commands", []))),
        Table("Machine and versions", ["what", "value"], lines),
    ]
    return blocks + ([Table("Seconds", ["part", "seconds"], seconds)] if seconds else [])


def _plots(folder: RunFolder, predictions: _Predictions | None) -> list[Image]:
    try:
        from collm_fast import plots
    except ImportError:
        logger.warning("matplotlib is not installed: the report has no plots")
        return []
    images = []
    history = {row: curves for row, curves in folder.read_json("history.json").items() if curves["eval_step"]}
    if history:
        levels = {
            row: folder.metrics[row]["valid"]["all"]["auc"]
            for row in ("item_user_mean", "cf")
            if folder.metrics.get(row, {}).get("valid", {}).get("all", {}).get("auc") is not None
        }
        images.append(Image("loss.png", "Training loss", plots.loss_plot(history)))
        kept = {row: stage["best_step"] for row, stage in folder.record.get("stages", {}).items()}
        images.append(
            Image("validation.png", "Validation AUC over steps", plots.validation_plot(history, kept, levels))
        )
    if predictions is not None:
        columns = predictions.columns
        rows = {
            row: plots.Scored(
                score,
                columns[f"probability:{row}"].astype(np.float64) if f"probability:{row}" in columns else None,
                predictions.label,
                columns["user_train_rows"],
                columns["item_train_rows"],
            )
            for row, score in predictions.scores().items()
        }
        images.append(Image("roc.png", "ROC", plots.roc_plot(rows)))
        images.append(Image("calibration.png", "Calibration", plots.calibration_plot(rows)))
        images.append(Image("interactions.png", "AUC by training interactions", plots.interactions_plot(rows)))
    return images

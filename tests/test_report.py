"""Reports: what the sentences may say, what is escaped, and that the page needs nothing outside itself."""

from __future__ import annotations

import builtins
import json
import re

import numpy as np
import pytest

from collm_fast import conclusions, metrics, plots
from collm_fast.conclusions import auc_difference, compare
from collm_fast.evaluate import metric_table, sigmoid
from collm_fast.io.run_folder import RunFolder
from collm_fast.io.tables import write_table
from collm_fast.plots import interaction_classes
from collm_fast.report import console_table, ordered_rows, write_report
from collm_fast.report_page import Image, Items, Pre, Table, to_html, to_markdown


def scored(seed: int, strength: float, users: int = 40, rows_each: int = 12):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows_each)
    label = np.random.default_rng(9).integers(0, 2, user.size)
    return user, label, strength * label + rng.normal(size=user.size)


def table(user, score, label):
    return metric_table(user, score, sigmoid(score), label, np.arange(user.size) % 3 > 0)


def make_run(path, rows=("item_mean", "item_user_mean", "cf", "stage1", "stage2", "stage2+pair")) -> RunFolder:
    path.mkdir()
    folder = RunFolder(path)
    folder.write_config({"llm": "x"})
    columns = {}
    for place, row in enumerate(rows):
        user, label, score = scored(place, 0.3 * place)
        columns |= {"uid": user, "label": label, f"score:{row}": score}
        if row.startswith(("stage", "cf")):
            columns[f"probability:{row}"] = sigmoid(score)
        for split in ("valid", "test"):
            folder.add_metrics(row, split, table(user, score, label))
    columns["control:logistic"] = scored(2, 0.6)[2]
    columns |= {name: np.arange(columns["uid"].size) % 60 for name in ("user_train_rows", "item_train_rows")}
    write_table(path / "predictions" / "test.parquet", columns)
    curves = {"loss": [0.9, 0.7, 0.6], "eval_step": [0, 3], "valid_auc": [0.5, 0.6]}
    folder.write_json("history.json", {"stage1": curves, "stage2": curves})
    stage = {"done": True, "steps": 3, "best_step": 3, "first_auc": 0.5, "train_rows": 10}
    folder.update(
        commands=["collm-fast train --data 'd & <x>'"],
        device="cpu",
        dtype="float32",
        seed=1,
        data={"path": "d", "source": "table", "split_rule": "user"},
        llm={"name": "<b>llm</b>"},
        cf={"name": "mf"},
        rows={"test": 480, "test_all": 900, "valid": 480, "valid_all": 500, "stage2_rule": "rows it did not see"},
        stages={
            "stage1": {**stage, "best_auc": 0.7, "first_auc": 0.71},
            "stage2": {**stage, "best_auc": 0.6, "inputs": "embedding"},
        },
        prompt_examples={"stage1": "```\n<script>alert(1)</script>\x07"},
        seconds={"stage1": 1.5},
        versions={"torch": "2"},
        controls={"lightgcn": folder.metrics["cf"]["test"]["all"]},
    )
    return folder


def test_report_files_are_whole_and_self_contained(tmp_path):
    folder = make_run(tmp_path / "run")
    sentences = write_report(folder)
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "<b>llm" not in page and "\\x07" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 5
    text = (folder.path / "report.md").read_text(encoding="utf-8")
    for name in ("loss", "validation", "roc", "calibration", "interactions"):
        assert (folder.path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"({name}.png)" in text
    for wanted in (
        "Warm rows",
        "Cold rows",
        "item_user_mean",
        "stage2+pair",
        "users counted",
        "of the users with a liked row (40 in test)",
        "collm-fast train --data",
        "rows it did not see",
        "The mapper read: embedding",
        "480 of 900 test rows",
        "lightgcn",
    ):
        assert wanted in text, wanted
    assert any("ends below stage 1 in validation AUC: 0.600 against 0.700" in sentence for sentence in sentences)
    assert any("a logistic regression on the same inputs" in sentence for sentence in sentences)
    assert any("did not raise the validation AUC of stage 1 (text only): 0.710 before" in text for text in sentences)
    assert folder.record["conclusions"] == sentences


def test_the_same_run_gives_the_same_report(tmp_path):
    folder = make_run(tmp_path / "run")
    write_report(folder)
    first = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    write_report(RunFolder(folder.path))
    assert first == {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}


def test_a_sample_of_the_validation_rows_is_told_and_compared_with_itself(tmp_path):
    folder = make_run(tmp_path / "run")
    scored = [{"step": 3, "sample_auc": 0.72, "auc": 0.7}, {"step": 2, "sample_auc": 0.715, "auc": 0.69}]
    interim = {"rows": 96, "auc": 0.72, "auc_low": 0.65, "auc_high": 0.79, "margin": 0.07, "evaluations": 4}
    stage = folder.record["stages"]["stage1"]
    folder.update(stages={"stage1": {**stage, "interim": {**interim, "scored_on_all_rows": scored}}})
    sentences = write_report(folder)
    text = (folder.path / "report.md").read_text(encoding="utf-8")
    assert "kept the state of step 3 (validation AUC 0.700). Its 4 evaluations scored a fixed sample of 96" in text
    assert "whole users: AUC 0.720 [0.650, 0.790] for the kept state, 0.710 before the first step" in text
    assert "2 of the states, those within 0.070 (half the width of its interval) of the best, were then " in text
    assert "scored on all 480 (step 3: 0.700, step 2: 0.690)" in text
    # .70 on all rows is below the .71 of the sample before training, which says nothing; .72 on the sample is above.
    assert not any("did not raise the validation AUC of stage 1" in sentence for sentence in sentences)


def test_report_without_matplotlib_or_predictions(tmp_path, monkeypatch, caplog):
    folder = make_run(tmp_path / "run")
    (folder.path / "predictions" / "test.parquet").unlink()
    real = builtins.__import__

    def no_plots(name, *args, **kwargs):
        if name.startswith("matplotlib") or (name == "collm_fast" and args[2] == ("plots",)):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_plots)
    assert write_report(folder) == []
    assert "the report has no plots" in caplog.text
    assert "data:image" not in (folder.path / "report.html").read_text()


def test_difference_is_paired_and_its_interval_covers_the_value():
    user, label, score = scored(1, 0.5)
    better = score + 0.8 * label
    difference = auc_difference(user, better, score, label)
    assert difference.value == pytest.approx(metrics.auc(better, label).value - metrics.auc(score, label).value)
    assert 0 < difference.low < difference.value < difference.high
    alone = metrics.bootstrap(user, better, label)
    assert difference.high - difference.low < alone.auc.high - alone.auc.low
    same = auc_difference(user, score, score, label)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_sentences_claim_no_more_than_the_interval():
    user, label, score = scored(1, 0.5)
    above = compare("stage2", "cf", auc_difference(user, score + 2 * label, score, label))
    below = compare("stage2", "cf", auc_difference(user, score, score + 2 * label, label))
    level = compare("stage2", "cf", auc_difference(user, score, scored(2, 0.5)[2], label))
    assert above.startswith("Stage 2 (CoLLM) ranks above the collaborative model alone: +")
    assert below.startswith("Stage 2 (CoLLM) ranks below")
    assert "cannot be told from" in level and level.endswith("contains zero.")
    one_class = auc_difference(user, score, score, np.ones_like(label))
    assert "cannot be compared" in compare("stage2", "cf", one_class)
    empty = auc_difference(user[:0], score[:0], score[:0], label[:0])
    assert np.isnan(empty.low)


def test_chance_is_named():
    user, label, score = scored(1, 0.0)
    assert "is at chance" in conclusions.against_chance("stage1", table(user, score, label)["all"])
    assert "better than chance" in conclusions.against_chance("stage1", table(user, score + label, label)["all"])
    assert "worse than chance" in conclusions.against_chance("stage1", table(user, score - label, label)["all"])
    none = table(user, score, np.ones_like(label))["all"]
    assert "has no AUC" in conclusions.against_chance("stage1", none)


def test_console_table_has_every_part_and_dashes_for_nothing():
    user, label, score = scored(1, 1.0)
    everything = {"stage2": {"test": table(user, score, label)}, "item_mean": {"test": table(user, score, label)}}
    everything["cf"] = {"test": metric_table(user, score, None, np.ones_like(label), np.ones(label.size, bool))}
    text = console_table(everything)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if line] == ["all", "item_mean", "cf", "stage2"] + [
        "warm",
        "item_mean",
        "cf",
        "stage2",
        "cold",
        "item_mean",
        "cf",
        "stage2",
    ]
    assert "–" in text and json.dumps(everything, allow_nan=False)
    assert ordered_rows({"stage2+pair": 0, "stage2": 0, "item_mean": 0}) == ["item_mean", "stage2", "stage2+pair"]


def test_interaction_classes_cover_every_row_once_where_they_are_large_enough():
    counts = np.repeat([0, 3, 7, 15, 30, 70, 150, 900], 25)
    classes = interaction_classes(counts)
    assert [name for name, _ in classes] == ["0", "1-4", "5-9", "10-19", "20-49", "50-99", "100-199", "200+"]
    assert np.sum([mask for _, mask in classes], axis=0).tolist() == [1] * counts.size
    few = interaction_classes(np.array([0] * 5 + [7] * 40 + [900] * 3))
    assert [name for name, _ in few] == ["0-9", "10+"]
    assert interaction_classes(np.array([], np.int64)) == []


def test_page_blocks_escape_in_both_forms():
    blocks = [
        Items(["a <i> & b"]),
        Pre("x ```` y"),
        Table("caption | <c>", ["n", "v"], [["a|b", "<1>"]]),
        Image("p.png", "plot", b"\x89PNG"),
    ]
    markdown, page = to_markdown(blocks), to_html(blocks, title="<t>")
    assert "`````\nx ```` y\n`````" in markdown and "a\\|b" in markdown and "<1>" not in markdown
    assert "<title>&lt;t&gt;</title>" in page and "a &lt;i&gt; &amp; b" in page and "<td>&lt;1&gt;</td>" in page


def test_the_star_stands_at_the_kept_step_and_not_at_the_best(monkeypatch):
    stars, bands = [], []

    def look(figure):
        lines = figure.axes[0].lines
        bands.extend(band.get_paths()[0].vertices for band in figure.axes[0].collections)
        stars.extend(
            (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines if line.get_marker() == "*"
        )
        return b""

    monkeypatch.setattr(plots, "_png", look)
    # The untrained state is measured and never kept.
    plots.validation_plot({"stage1": {"eval_step": [0, 4, 8], "valid_auc": [0.6, 0.4, 0.5]}}, {"stage1": 8}, {})
    assert stars == [([8], [0.5])] and not bands
    # The interval of a sample is shaded; one that does not exist (None) leaves a gap.
    curves = {"eval_step": [0, 4, 8], "valid_auc": [0.6, 0.4, 0.5], "valid_low": [0.5, 0.3, None]}
    plots.validation_plot({"stage1": {**curves, "valid_high": [0.7, 0.5, None]}}, {}, {})
    assert {tuple(np.round(point, 3)) for point in bands[0]} == {(0, 0.5), (0, 0.7), (4, 0.3), (4, 0.5)}

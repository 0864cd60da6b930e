"""A small world for the tests of a whole run: ratings that have structure, a random language model, and its folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_llm import small_model, small_tokenizer

from collm_fast.config import PrepareConfig
from collm_fast.data.prepare import prepare

# Titles that a prompt must survive: every tag, quotes, control characters, markup.
ODD_TITLES = (
    "<UserID> <ItemIDList> <ItemTitleList> <TargetItemID> <TargetItemTitle>",
    'A "quoted", title|with\ttab and \x07 bell',
    "<script>alert(1)</script>",
)


def write_ratings(path: Path, users: int = 24, items: int = 20, rows_each: int = 25, seed: int = 0) -> Path:
    """A CSV of ratings: tastes of two kinds, item quality, noise."""
    rng = np.random.default_rng(seed)
    taste, kind, quality = rng.normal(size=users), rng.normal(size=items), rng.normal(size=items)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "rating", "timestamp", "title"])
        for user in range(users):
            for place in range(rows_each):
                item = int(rng.integers(items))
                liking = taste[user] * kind[item] + quality[item] + 0.5 * rng.normal()
                title = ODD_TITLES[item] if item < len(ODD_TITLES) else f"Film {item} (19{50 + item})"
                rating = int(np.clip(np.round(3.5 + liking), 1, 5))
                writer.writerow([f"u{user}", 100 + item, rating, 10_000 + 50 * place + user, title])
    return path


def save_llm(folder: Path, family: str = "llama", seed: int = 0, tokenizer: bool = True) -> Path:
    """A random language model with a byte-level tokenizer, as a Hugging Face folder."""
    words = small_tokenizer()
    model: Any = small_model(family, seed, vocab_size=len(words))
    model.save_pretrained(folder)
    if tokenizer:
        words.save_pretrained(folder)
    return folder


def quick_reports(patch: pytest.MonkeyPatch) -> None:
    """Few resamples and no drawing: half of a small run's time, and the subject of test_report.py and test_cli.py."""
    patch.setattr("collm_fast.evaluate.BOOTSTRAP_SAMPLES", 20)
    patch.setattr("collm_fast.plots._png", lambda figure: b"\x89PNG")


def write_world(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """`data` and `llm` in a folder, the caches beside them, and `quick_reports`."""
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    quick_reports(patch)
    prepare(PrepareConfig(source="table", input=write_ratings(folder / "ratings.csv"), out=folder / "data"))
    save_llm(folder / "llm")


# Options of a training that takes a second.
QUICK = (
    "--limit-train 32 --limit-eval 40 --max-steps 4 --collaborative.max-epochs 3 --collaborative.dim 4 "
    "--collaborative.held-out 0.2 --cie-rows held-out --prompt.history-length 3 --stage1.eval-every 2 "
    "--stage2.eval-every 2 --stage1.batch-size 8 --stage2.batch-size 8 --loss yes-no --dtype float32"
).split()

"""A whole run that keeps prefixes: scores as without, found prefixes, and the same bits after a break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import write_world

import collm_fast
from collm_fast.models.prefix_cache import PrefixCache
from collm_fast.training import pipeline

OPTIONS = {
    "limit_train": 24,
    "limit_eval": 24,
    "max_steps": 2,
    "collaborative": {"max_epochs": 2, "dim": 4},
    "prompt": {"history_length": 2},
    "stage1": {"eval_every": 2, "batch_size": 8},
    "stage2": {"eval_every": 1, "batch_size": 8},
    "loss": "yes-no",
    "dtype": "float32",
}


def test_a_run_with_kept_prefixes_scores_alike_and_continues_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path, monkeypatch)
    saved: list[int] = []
    look = PrefixCache.get

    def seen(self: PrefixCache, token_ids: np.ndarray) -> torch.Tensor | None:
        found = look(self, token_ids)
        if self.max_bytes > 2**28:  # not the one of the openings
            saved.append(0 if found is None else len(token_ids))
        return found

    monkeypatch.setattr(PrefixCache, "get", seen)

    def run(name: str, gigabytes: float, resume: str = "never") -> None:
        arguments = (tmp_path / "data", tmp_path / "llm", "mf", tmp_path / name)
        collm_fast.train(*arguments, **OPTIONS, kv_cache_gb=gigabytes, resume=resume)

    run("without", 0.0)
    assert not saved
    run("kept", 0.5)
    assert sum(saved) > 0
    real, calls = pipeline.score_prompts, []

    def broken(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:  # the test rows of stage 2
            raise RuntimeError("the machine went down")
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "score_prompts", broken)
    with pytest.raises(RuntimeError, match="went down"):
        run("broken", 0.5)
    monkeypatch.setattr(pipeline, "score_prompts", real)
    run("broken", 0.5, resume="auto")

    mappers = {name: load_file(tmp_path / name / "mapper.safetensors") for name in ("without", "kept", "broken")}
    for key, truth in mappers["without"].items():
        assert torch.equal(mappers["kept"][key], mappers["broken"][key])
        torch.testing.assert_close(mappers["kept"][key], truth, rtol=1e-3, atol=1e-4)
    metrics = {name: collm_fast.open_run(tmp_path / name).metrics["stage2"]["test"] for name in mappers}
    assert metrics["kept"] == metrics["broken"]
    assert metrics["kept"]["all"]["auc"] == pytest.approx(metrics["without"]["all"]["auc"], abs=0.02)

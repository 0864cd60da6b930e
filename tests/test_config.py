"""Configurations from plain values: types, nesting, nearest names, and the round trip through YAML's value set."""

from __future__ import annotations

from pathlib import Path

import pytest

from collm_fast.config import (
    CFConfig,
    PrepareConfig,
    StageConfig,
    TrainConfig,
    from_mapping,
    options,
    to_mapping,
    type_name,
)


def test_round_trip_of_every_default():
    for cls in (PrepareConfig, CFConfig, TrainConfig):
        assert from_mapping(cls, to_mapping(cls())) == cls()


def test_text_values_take_the_declared_type():
    config = from_mapping(
        TrainConfig,
        {
            "stage1": {"lr": "1e-2", "max_steps": "none", "batch_size": "4"},
            "ablations": "+stats,+pair",
            "stage2_lora_dropout": "true",
            "data": "d",
            "limit_train": "12",
            "llm": "7",
        },
    )
    assert config.stage1 == StageConfig(lr=1e-2, batch_size=4)
    assert config.ablations == ("+stats", "+pair") and config.stage2_lora_dropout is True
    assert config.data == Path("d") and config.limit_train == 12 and config.llm == "7"
    assert from_mapping(TrainConfig, {"stage1": config.stage1}).stage1 is config.stage1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stag1": {}}, "config: expected a known key, got 'stag1'; did you mean stage1?"),
        ({"stage1": {"learning": 1}}, "config: expected a known key, got 'stage1.learning'"),
        ({"stage1": {"lrr": 1}}, "got 'stage1.lrr'; did you mean stage1.lr?"),
        ({"stage1": 3}, "stage1: expected a mapping of its keys, got 3"),
        ({"limit_train": "x"}, "limit_train: expected integer, got 'x'"),
        ({"limit_train": 1.5}, "limit_train: expected integer, got 1.5"),
        ({"limit_train": True}, "limit_train: expected integer, got True"),
        ({"stage1": {"lr": "inf"}}, "stage1.lr: expected number, got 'inf'"),
        ({"stage1": {"lr": None}}, "stage1.lr: expected number, got None"),
        ({"order": "sorted"}, "order: expected group|random, got 'sorted'"),
        ({"trust_remote_code": "yes"}, "trust_remote_code: expected true|false, got 'yes'"),
        ({"ablations": 3}, "ablations: expected list of"),
        ({"out": ""}, "out: expected path, got ''"),
        ({"stage1": {"batch_size": 0}}, "stage1.batch_size: expected at least 1, got 0"),
        ({"cie_rows": "held-out"}, "cie_rows: expected held-out only with"),
        ({"stage2": {"patience": 0}}, "stage2.patience: expected at least 1 or none, got 0"),
        ({"stage1": {"clip_norm": 0}}, "stage1.clip_norm: expected above 0 or none, got 0.0"),
        ({"stage1": {"warmup_steps": -1}}, "stage1.warmup_steps: expected at least 0, got -1"),
        ({"stage2": {"weight_decay": -1e-3}}, "stage2.weight_decay: expected at least 0, got -0.001"),
        ({"lora": {"alpha": 0}}, "lora.alpha: expected above 0, got 0.0"),
        ({"mapper": {"tokens_per_id": 256}}, "mapper.tokens_per_id: expected in [1, 255], got 256"),
        ({"tokens_per_batch": 0}, "tokens_per_batch: expected at least 1, got 0"),
        ({"kv_cache_gb": -0.5}, "kv_cache_gb: expected at least 0, got -0.5"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes: expected at least 0, got -1.0"),
        ({"seed": -1}, "seed: expected in [0, 2^63), got -1"),
        ({"collaborative": {"seed": 2**63}}, "collaborative.seed: expected in [0, 2^63), got 9223372036854775808"),
    ],
)
def test_bad_values_name_the_key_and_the_rule(values, message):
    with pytest.raises(ValueError) as error:
        from_mapping(TrainConfig, values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rule_names_the_key_that_was_typed():
    with pytest.raises(ValueError, match=r"^batch_size: expected at least 1, got 0$"):
        from_mapping(StageConfig, {"batch_size": 0})
    with pytest.raises(ValueError, match=r"^stage2.min_lr: expected in \[0, lr\], got 1.0$"):
        from_mapping(TrainConfig, {"stage2": {"min_lr": 1.0}})


def test_none_switches_off_what_may_be_off():
    stage = from_mapping(StageConfig, {"patience": "none", "clip_norm": None, "warmup_steps": 0, "weight_decay": 0})
    assert stage.patience is None and stage.clip_norm is None and stage.warmup_steps == 0


def test_a_fitted_model_may_bring_its_own_held_out_rows():
    assert from_mapping(TrainConfig, {"cie_rows": "held-out", "cf": "runs/cf"}).cie_rows == "held-out"


def test_options_are_the_leaves_with_their_types():
    leaves = {key: (kind, default) for key, kind, default in options(TrainConfig)}
    assert leaves["stage1.lr"] == (float, 1e-3)
    assert type_name(leaves["limit_train"][0]) == "integer|none"
    assert type_name(leaves["lora.target_modules"][0]) == "list of text"
    assert "stage1" not in leaves

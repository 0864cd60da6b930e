"""What a run may begin with: an adapter and a mapper that fit it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from collm_fast.config import MapperConfig, TrainConfig
from collm_fast.models.mapper import Mapper
from collm_fast.training.stages import save_mapper
from collm_fast.training.start import begin_mapper, check_start, take_adapter

MADE_FOR = {"data": "d", "llm": "l"}


def folder_with(path: Path, mapper: Mapper, made_for=MADE_FOR) -> TrainConfig:
    path.mkdir(exist_ok=True)
    save_mapper(path / "mapper.safetensors", mapper, made_for)
    return TrainConfig(start=path)


def test_a_start_must_hold_what_is_needed(tmp_path):
    check_start(TrainConfig())
    with pytest.raises(ValueError, match="start: expected a folder with adapter/ or mapper.safetensors, got"):
        check_start(TrainConfig(start=tmp_path))
    with pytest.raises(ValueError, match="evaluate_only: expected start to hold mapper.safetensors .*, got no start"):
        check_start(TrainConfig(evaluate_only=True))
    check_start(TrainConfig(evaluate_only=True, stage="lora"))
    check_start(folder_with(tmp_path, Mapper(4, 8, MapperConfig())))


def test_a_mapper_is_taken_where_it_fits(tmp_path):
    given = Mapper(4, 8, MapperConfig())
    config = folder_with(tmp_path, given)
    mapper = Mapper(4, 8, MapperConfig())
    begin_mapper(config, mapper, MADE_FOR)
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in mapper.state_dict().items())
    # One that reads something else begins anew; so does every mapper without a start.
    other = Mapper(4, 8, MapperConfig(inputs="+pair"))
    before = other.first.weight.clone()
    begin_mapper(config, other, MADE_FOR)
    begin_mapper(TrainConfig(), other, MADE_FOR)
    assert torch.equal(other.first.weight, before)
    with pytest.raises(ValueError, match="to be trained with this llm"):
        begin_mapper(config, mapper, {"data": "d", "llm": "another"})
    # An imported one does not say what it was trained with.
    begin_mapper(folder_with(tmp_path / "imported", given, {}), mapper, {"data": "d", "llm": "another"})
    wide = Mapper(4, 8, MapperConfig(tokens_per_id=2))
    with pytest.raises(ValueError, match="expected a mapper of d=4, H=8, .*tokens_per_id=2 in .*tokens_per_id=1"):
        begin_mapper(config, wide, MADE_FOR)


def test_an_adapter_is_copied_for_a_stage_2_alone(tmp_path):
    source = tmp_path / "start" / "adapter"
    source.mkdir(parents=True)
    (source / "adapter_config.json").write_text("{}")
    for stage, copied in (("lora", False), ("both", False), ("cie", True)):
        run = tmp_path / stage
        run.mkdir()
        take_adapter(TrainConfig(start=source.parent, stage=stage), run)
        assert (run / "adapter" / "adapter_config.json").exists() == copied
    # What the run has already stays: it is being resumed.
    (run / "adapter" / "adapter_config.json").write_text("own")
    take_adapter(TrainConfig(start=source.parent, stage="cie"), run)
    assert (run / "adapter" / "adapter_config.json").read_text() == "own"

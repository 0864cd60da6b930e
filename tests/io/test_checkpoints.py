"""Checkpoint files: round trip, the newest readable one, pruning, and what a foreign file says."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from collm_fast.io.checkpoints import Checkpoint, latest, load, newest_step, prune, save


def test_round_trip_keeps_bits_and_state(tmp_path):
    shared = torch.randn(4, 3)
    tensors = {"a": shared, "b": shared.T, "rng": torch.get_rng_state(), "half": shared.bfloat16()}
    state = {"loss": [0.1 + 0.2, 1e-30], "best": None}
    path = save(tmp_path, Checkpoint(7, tensors, state))
    read = load(path)
    assert path.name == "00000007.safetensors" and read.step == 7 and read.state == state
    assert all(torch.equal(read.tensors[name], tensors[name]) for name in tensors)


def test_latest_passes_over_an_unreadable_file(tmp_path, caplog):
    assert latest(tmp_path) is None and latest(tmp_path / "missing") is None
    save(tmp_path, Checkpoint(5, {"a": torch.ones(1)}, {}))
    save(tmp_path, Checkpoint(12, {"a": torch.ones(2)}, {}))
    assert latest(tmp_path).step == 12
    (tmp_path / "00000020.safetensors").write_bytes(b"\x10")
    assert latest(tmp_path).step == 12
    assert "00000020.safetensors: expected a checkpoint" in caplog.text


def test_a_safetensors_file_without_our_state_is_no_checkpoint(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="expected a checkpoint of collm_fast"):
        load(tmp_path / "x.safetensors")


def test_equal_checkpoints_are_equal_files(tmp_path):
    state = {name: [0.5] for name in "dbca"}
    paths = [save(tmp_path / str(n), Checkpoint(7, {"a": torch.ones(1)}, state)) for n in range(4)]
    assert len({path.read_bytes() for path in paths}) == 1
    with safe_open(paths[0], framework="pt") as file:
        assert list(file.metadata()) == ["collm_fast"]


def test_newest_step_is_that_of_the_newest_readable_file(tmp_path):
    assert newest_step(tmp_path / "missing") is None
    for step in (9, 12):
        save(tmp_path, Checkpoint(step, {"a": torch.ones(1)}, {}))
    (tmp_path / "00000020.safetensors").write_bytes(b"cut off")
    assert newest_step(tmp_path) == 12


def test_prune_keeps_the_named_steps(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, Checkpoint(step, {"a": torch.ones(1)}, {}))
    (tmp_path / "note.txt").write_text("mine")
    prune(tmp_path, {3, 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000001.safetensors",
        "00000003.safetensors",
        "note.txt",
    ]

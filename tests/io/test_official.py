"""What is read of official checkpoints: the names, the shapes, and that nothing but tensors is."""

from __future__ import annotations

import pytest
import torch
from official_files import cf_state, lora_state, mapper_state, save_checkpoint

from collm_fast.io.official import lora_of, mapper_of, read_official, summary_of, tables_of


class _Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_checkpoint_and_a_plain_state_dict_give_their_tensors(tmp_path):
    state = {**lora_state(8), **mapper_state(4, 8)}
    whole = read_official(save_checkpoint(tmp_path / "a.pth", state))
    torch.save({**state, "epoch": 3}, tmp_path / "b.pth")
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=False)  # before torch 1.6
    for found in (whole, read_official(tmp_path / "b.pth"), read_official(tmp_path / "c.pth")):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_files_that_are_refused(tmp_path, capsys):
    torch.save({"model": {"weight": torch.zeros(1)}, "args": _Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "nothing.pth").write_bytes(b"")
    for name, message in (
        (
            "evil",
            "expected tensors that torch reads with weights_only in .*evil.pth, got .*print, which could run",
        ),
        ("list", "ckpt: expected a state dict in .*, got list"),
        ("empty", "ckpt: expected tensors in .*, got none under 1 keys"),
        ("text", "ckpt: expected .*text.pth"),
        ("nothing", "ckpt: expected .*nothing.pth"),
        ("absent", "ckpt: expected a .pth file .*absent.pth, which is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_official(tmp_path / f"{name}.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["", ".default"])
def test_lora_by_the_keys_of_peft(name):
    state = {**lora_state(8, layers=2, name=name), **mapper_state(4, 8)}
    found, used = lora_of(state)
    assert len(found) == 8 and used == {key for key in state if "lora_" in key}
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    old = f"llama_model_lora.{key.removesuffix('.weight')}{name}.weight"
    assert found[key].dtype == torch.float32 and torch.equal(found[key], state[old].float())
    assert lora_of(mapper_state(4, 8)) == ({}, set())


def test_lora_that_does_not_fit_together():
    state = lora_state(8)
    key = next(key for key in state if "lora_B" in key)
    with pytest.raises(ValueError, match=r"ckpt: expected .*lora_B.weight beside .*, got none"):
        lora_of({name: value for name, value in state.items() if name != key})
    with pytest.raises(ValueError, match=r"expected LoRA matrices of one rank, got \[2, 3\]"):
        lora_of({**state, key: torch.zeros(8, 3)})
    with pytest.raises(ValueError, match="expected finite numbers in .*lora_B"):
        lora_of({**state, key: torch.full((8, 2), torch.nan)})
    with pytest.raises(ValueError, match=r"expected a matrix in .*, got \[8\]"):
        lora_of({**state, key: torch.zeros(8)})


def test_mapper_by_our_names_and_what_is_none():
    state = mapper_state(4, 8, times=3)
    found, used = mapper_of({**state, **lora_state(8)})
    assert used == state.keys() and list(found) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert torch.equal(found["second.weight"], state["llama_proj.2.weight"])
    assert mapper_of(lora_state(8)) == ({}, set())
    with pytest.raises(ValueError, match="expected llama_proj of llama_proj.0.weight.*, got llama_proj.weight"):
        mapper_of({"llama_proj.weight": torch.zeros(8, 20)})  # a soft prompt's
    with pytest.raises(ValueError, match=r"llama_proj of \[k d, d\] and \[H, k d\], got \[12, 4\] and \[8, 8\]"):
        mapper_of({**state, "llama_proj.2.weight": torch.zeros(8, 8)})
    with pytest.raises(ValueError, match=r"expected first.bias of \[12\], got \[3\]"):
        mapper_of({**state, "llama_proj.0.bias": torch.zeros(3)})


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
@pytest.mark.parametrize("prefix", ["", "rec_encoder."])
def test_tables_alone_and_within_a_whole(kind, prefix):
    state = cf_state(kind, prefix=prefix)
    tables, used = tables_of({**state, **mapper_state(4, 8)}, kind)
    assert tables is not None and used == state.keys()
    assert all(torch.equal(table, state[key]) for table, key in zip(tables, state, strict=True))
    assert tables_of(state, "mf" if kind == "lightgcn" else "lightgcn") == (None, set())
    first, second = state
    with pytest.raises(ValueError, match=f"expected {first} and {second}, got {first} alone"):
        tables_of({first: state[first]}, kind)
    with pytest.raises(ValueError, match="expected tables of one width"):
        tables_of({**state, second: torch.zeros(11, 3)}, kind)


def test_a_summary_names_the_first_keys():
    assert summary_of("cab", 2) == "a, b and 1 more"

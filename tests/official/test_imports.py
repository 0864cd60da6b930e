"""import-official: each kind becomes the file a run has, and computes what the official modules compute."""

from __future__ import annotations

import pytest
import torch
from official_files import ITEMS, USERS, cf_state, lora_state, mapper_state, save_checkpoint, write_published
from small_run import save_llm

from collm_fast.cli import main
from collm_fast.config import PrepareConfig
from collm_fast.data.dataset import load_dataset
from collm_fast.data.prepare import prepare
from collm_fast.models.cf.frozen import CFModel
from collm_fast.training.stages import load_mapper


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    prepare(PrepareConfig(source="collm", input=write_published(folder / "raw"), out=folder / "data"))
    return folder / "data"


def run(*arguments):
    return main(["import-official", *map(str, arguments)])


def test_the_adapter_loads_in_stock_peft(tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    state = {**lora_state(32), **mapper_state(4, 32)}
    ckpt = save_checkpoint(tmp_path / "checkpoint_best.pth", state)
    options = ["--kind", "lora", "--alpha", "4", "--dropout", "0.1", "--llm", "some/base"]
    assert run("--ckpt", ckpt, "--out", tmp_path / "out", *options) == 0
    said = capsys.readouterr().out
    assert "10 tensors not used: llama_model_lora" in said and "llama_proj.0.bias" in said
    base = AutoModelForCausalLM.from_pretrained(save_llm(tmp_path / "llm", tokenizer=False))
    weight = base.model.layers[2].self_attn.v_proj.weight.detach().clone()
    stock = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    settings = stock.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (2, 4, 0.1)
    assert settings.base_model_name_or_path == "some/base"
    merged = stock.merge_and_unload().model.layers[2].self_attn.v_proj.weight
    key = "llama_model_lora.base_model.model.model.layers.2.self_attn.v_proj.lora_{}.default.weight"
    update = 4 / 2 * state[key.format("B")].float() @ state[key.format("A")].float()
    assert torch.allclose(merged, weight + update, atol=1e-6)


def test_the_mapper_computes_what_the_official_one_computes(tmp_path):
    torch.manual_seed(1)
    state = mapper_state(4, 6, times=5, tokens=3)
    ckpt = save_checkpoint(tmp_path / "c.pth", state)
    assert run("--ckpt", ckpt, "--kind", "mapper", "--out", tmp_path, "--tokens-per-id", "3") == 0
    mapper = load_mapper(tmp_path / "mapper.safetensors", {"data": "any", "llm": "any"})
    official = torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.ReLU(), torch.nn.Linear(20, 18))
    official.load_state_dict({key.removeprefix("llama_proj."): value for key, value in state.items()})
    x = torch.randn(2, 4)
    assert torch.allclose(mapper(x), official(x).reshape(-1, 6), atol=1e-6)


def test_mf_tables_are_taken_as_they_are(tmp_path, data, capsys):
    torch.save(cf_state("mf"), tmp_path / "mf.pth")
    assert run("--ckpt", tmp_path / "mf.pth", "--kind", "mf", "--out", tmp_path, "--data", data) == 0
    assert "not used" not in capsys.readouterr().out
    found, state = CFModel.load(tmp_path), torch.load(tmp_path / "mf.pth", weights_only=True)
    assert torch.equal(found.user, state["user_embedding.weight"]) and found.name == "mf" and found.dim == 4
    assert torch.equal(found.item, state["item_embedding.weight"]) and found.config.held_out == 0
    assert found.fingerprint == load_dataset(data).fingerprint


def test_lightgcn_is_propagated_over_the_liked_train_rows(tmp_path, data):
    torch.manual_seed(2)
    state = cf_state("lightgcn", prefix="rec_encoder.")
    ckpt = save_checkpoint(tmp_path / "c.pth", {**state, **mapper_state(4, 8)})
    assert run("--ckpt", ckpt, "--kind", "lightgcn", "--out", tmp_path, "--data", data, "--num-layers", 3) == 0
    train = load_dataset(data).splits["train"]
    liked = torch.zeros(USERS + 1, ITEMS + 1)
    liked[train.uid[train.label == 1], train.iid[train.label == 1]] = 1.0
    adjacency = torch.zeros(USERS + ITEMS + 2, USERS + ITEMS + 2)
    adjacency[: USERS + 1, USERS + 1 :], adjacency[USERS + 1 :, : USERS + 1] = liked, liked.T
    scale = adjacency.sum(1).clamp(min=1e-9) ** -0.5 * (adjacency.sum(1) > 0)
    layers = [torch.cat(tuple(state.values()))]
    for _ in range(3):
        layers.append(scale[:, None] * adjacency * scale @ layers[-1])
    wanted = torch.stack(layers).mean(0)
    found = CFModel.load(tmp_path)
    assert torch.allclose(torch.cat((found.user, found.item)), wanted, atol=1e-5)
    assert found.config.num_layers == 3


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, data, capsys):
    whole = save_checkpoint(tmp_path / "c.pth", {**mapper_state(4, 8), **cf_state("mf")})
    other = save_checkpoint(
        tmp_path / "other.pth",
        {"user_embedding.weight": torch.zeros(5, 4), "item_embedding.weight": torch.zeros(11, 4)},
    )
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "mapper.safetensors").write_text("")
    out = tmp_path / "out"
    for arguments, message in (
        (["--kind", "lora"], "--ckpt FILE.pth, --kind and --out FOLDER, got none"),
        (["--kind", "din", "--ckpt", whole], "expected lora, mapper, mf or lightgcn, got 'din', which a later version"),
        (["--kind", "mapping", "--ckpt", whole], "kind: expected lora|mapper|mf|lightgcn|sasrec|din, got 'mapping'"),
        (["--kind", "lora", "--ckpt", whole], "expected llama_model_lora.*.lora_A in"),
        (["--kind", "lightgcn", "--ckpt", whole, "--data", data], "expected the tables of lightgcn in"),
        (["--kind", "mf", "--ckpt", whole], "data: expected --data DATA"),
        (["--kind", "mf", "--ckpt", other, "--data", data], "expected tables of 13 users and 11 items"),
        (["--kind", "mapper", "--ckpt", whole, "--tokens-per-id", "3"], "expected a divisor of the mapper's 8 outputs"),
        (["--kind", "mapper", "--ckpt", tmp_path / "no.pth"], "which is no file"),
    ):
        capsys.readouterr()
        assert run(*arguments, "--out", out) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines
        assert not out.exists()
    assert run("--kind", "mapper", "--ckpt", whole, "--out", tmp_path / "held") == 2
    assert "expected a folder without mapper.safetensors" in capsys.readouterr().err

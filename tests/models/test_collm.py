"""The packed hybrid model against every prompt run alone through the plain model, in every family and form."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from hybrids import NO, YES, D, all_alone, alone, hybrid, make_mapper, statistics, tables
from small_llm import FAMILIES, ITEMS, USERS, VOCABULARY, H, random_prompts, small_model
from torch import Tensor, nn

from collm_fast.config import LoraConfig, MapperConfig
from collm_fast.data.packing import pack
from collm_fast.data.prompts import TARGET, USER
from collm_fast.models.collm import CoLLM
from collm_fast.models.lora import LoraLinear, add_lora, lora_layers, set_dropout, set_step_seed
from collm_fast.models.mapper import IdStatistics, Mapper


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_and_gradients_are_those_of_each_prompt_alone(family: str, share_prefix: bool) -> None:
    prompts, mapper = random_prompts(0), make_mapper()
    rows = np.random.default_rng(0).permutation(len(prompts))
    weight = torch.linspace(-1, 1, len(rows))
    expected = all_alone(small_model(family), prompts, rows, mapper)
    truth = torch.autograd.grad((expected * weight).sum(), list(mapper.parameters()))
    out = hybrid(small_model(family), mapper)(pack(prompts, rows, share_prefix=share_prefix))
    assert out.shape == (len(rows),) and out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    for got, want in zip(torch.autograd.grad((out * weight).sum(), list(mapper.parameters())), truth, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("per_branch", [True, False])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
)
def test_windows_biases_and_ties(
    family: str, options: dict[str, Any], per_branch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collm_fast.models import layout

    plan = layout.TreePlan
    monkeypatch.setattr(layout, "TreePlan", lambda tree, branch, **_: plan(tree, branch, per_branch=per_branch))
    prompts, rows, mapper = random_prompts(1), np.arange(5), make_mapper()
    with torch.no_grad():
        expected = all_alone(small_model(family, **options), prompts, rows, mapper)
        out = hybrid(small_model(family, **options), mapper)(pack(prompts, rows))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens_per_id", [1, 2])
@pytest.mark.parametrize("inputs", ["embedding", "+stats", "+pair", "+stats+pair"])
def test_what_the_mapper_reads(inputs: str, tokens_per_id: int) -> None:
    prompts, mapper = random_prompts(2, tokens_per_id=tokens_per_id), make_mapper(inputs, tokens_per_id)
    rows = np.arange(len(prompts))
    model = hybrid(small_model("llama"), mapper, stats=statistics())
    with torch.no_grad():
        expected = all_alone(small_model("llama"), prompts, rows, mapper)
        out = model(pack(prompts, rows, pairs="+pair" in inputs))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_each_distinct_slot_is_mapped_once() -> None:
    prompts, mapper = random_prompts(3), make_mapper()
    seen: list[int] = []
    mapper.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    batch = pack(prompts, np.arange(len(prompts)))
    with torch.no_grad():
        hybrid(small_model("llama"), mapper)(batch)
    assert seen == [len(batch.slot_id)] and len(batch.slot_id) < int((prompts.slot_role > 0).sum())


def test_text_prompts_need_no_mapper_and_the_loss_names_the_logit() -> None:
    prompts = random_prompts(4, slots=False)
    rows = np.arange(len(prompts))
    with torch.no_grad():
        logits = torch.stack([alone(small_model("llama"), prompts, row, None) for row in rows])
        yes = hybrid(small_model("llama"))(pack(prompts, rows))
        both = hybrid(small_model("llama"), loss="yes-no")(pack(prompts, rows))
    torch.testing.assert_close(yes, logits[:, YES], rtol=0, atol=1e-5)
    torch.testing.assert_close(both, logits[:, YES] - logits[:, NO], rtol=0, atol=1e-5)


def test_heads_with_bias_and_adapted_heads() -> None:
    prompts, rows = random_prompts(5, slots=False), np.arange(4)
    for adapted in (False, True):

        def changed(adapted: bool = adapted) -> Any:
            model = small_model("llama")
            torch.manual_seed(0)
            head = nn.Linear(H, VOCABULARY)
            layer: nn.Module = head
            if adapted:
                layer = LoraLinear(head, r=2, alpha=4.0, dropout=0.0)
                layer.lora_B.data.normal_()
            model.lm_head = layer
            return model

        with torch.no_grad():
            expected = all_alone(changed(), prompts, rows)
            torch.testing.assert_close(hybrid(changed())(pack(prompts, rows)), expected, rtol=0, atol=1e-5)


def test_bfloat16_rows_are_cast_and_logits_are_float32() -> None:
    prompts, mapper, rows = random_prompts(6), make_mapper(), np.arange(6)
    with torch.no_grad():
        exact = all_alone(small_model("llama"), prompts, rows, mapper)
        theirs = all_alone(small_model("llama").bfloat16(), prompts, rows, mapper)
        out = hybrid(small_model("llama").bfloat16(), mapper)(pack(prompts, rows))
    assert out.dtype == torch.float32
    assert (out - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("share_prefix", [True, False])
def test_lora_layers_work_inside_and_follow_train_mode(share_prefix: bool) -> None:
    prompts, rows = random_prompts(7, slots=False), np.arange(6)

    def adapted() -> Any:
        model = small_model("qwen2")
        for layer in add_lora(model, LoraConfig(r=2, dropout=0.5), torch.Generator().manual_seed(1)):
            layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.3)
        return model

    model, batch = hybrid(adapted()), pack(prompts, rows, share_prefix=share_prefix)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), all_alone(adapted(), prompts, rows), rtol=0, atol=1e-5)
        plain = model(batch)
        assert not torch.allclose(plain, hybrid(small_model("qwen2"))(batch), atol=1e-3)

    model.train()
    assert not model.llm.training and all(layer.training for _, layer in lora_layers(model))
    set_step_seed(model, 1)
    with torch.no_grad():
        assert not torch.allclose(model(batch), plain, atol=1e-3)
        set_dropout(model, False)
        torch.testing.assert_close(model(batch), plain)
    set_dropout(model, True)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch), plain)


def test_calls_without_a_plan_still_work() -> None:
    # Generation, or a user's own forward, on a model whose attention is ours.
    plain, ours = small_model("mistral", sliding_window=4), small_model("mistral", sliding_window=4)
    hybrid(ours)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        got, want = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, plain))
    torch.testing.assert_close(got[mask > 0], want[mask > 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
def test_other_families_run_padded_and_say_so(family: str, caplog: pytest.LogCaptureFixture) -> None:
    prompts, mapper = random_prompts(8), make_mapper()
    rows = np.random.default_rng(1).permutation(len(prompts))
    with caplog.at_level(logging.WARNING):
        model = hybrid(small_model(family), mapper)
    assert f"{family} runs padded" in caplog.text and not model.packed
    expected = all_alone(small_model(family), prompts, rows, mapper)
    out = model(pack(prompts, rows))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    out.sum().backward()
    assert mapper.first.weight.grad is not None and mapper.first.weight.grad.abs().sum() > 0
    text = random_prompts(8, slots=False)
    with torch.no_grad():
        out = hybrid(small_model(family))(pack(text, np.arange(3)))
        torch.testing.assert_close(out, all_alone(small_model(family), text, np.arange(3)), rtol=0, atol=2e-5)


def test_a_padded_family_that_cannot_be_asked_for_some_logits() -> None:
    prompts = random_prompts(8, slots=False)
    llm = small_model("gpt_neox")
    whole = llm.forward

    def forward(inputs_embeds: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return whole(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=use_cache)

    llm.forward = forward
    with torch.no_grad():
        out = hybrid(llm)(pack(prompts, np.arange(5)))
        expected = all_alone(small_model("gpt_neox"), prompts, np.arange(5))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def test_construction_errors() -> None:
    def refused(message: str, *, model: Any = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            CoLLM(model or small_model("llama"), **({"yes_id": YES, "no_id": NO} | options))

    refused(r"expected yes_id in \[0, 97\), got 97", yes_id=97)
    refused(r"expected no_id in \[0, 97\), got -1", no_id=-1)
    refused("expected loss yes or yes-no, got 'no'", loss="no")
    refused("expected a collaborative model beside the mapper, got None", mapper=make_mapper())
    refused(r"expected tables \[.., 5\] and mapped rows of 32", cf=tables(), mapper=Mapper(5, H, MapperConfig()))
    refused(r"expected tables \[.., 6\] and mapped rows of 32", cf=tables(), mapper=Mapper(D, 8, MapperConfig()))
    stats = make_mapper("+stats")
    refused("expected statistics of 3 columns, got None", cf=tables(), mapper=stats)
    wide = IdStatistics(torch.zeros(USERS, 4), torch.zeros(ITEMS, 4))
    refused("expected statistics of 3 columns, got 4", cf=tables(), mapper=stats, stats=wide)
    short = IdStatistics(torch.zeros(USERS, 3), torch.zeros(2, 3))
    refused("expected statistics of 9 users, 11 items, got 9 and 2", cf=tables(), mapper=stats, stats=short)


def test_batch_errors() -> None:
    prompts = random_prompts(9)
    batch = pack(prompts, np.arange(4))
    with pytest.raises(ValueError, match=r"expected a mapper for the prompts' \d+ slots, got None"):
        hybrid(small_model("llama"))(batch)
    with pytest.raises(ValueError, match="expected a batch packed with pairs=True"):
        hybrid(small_model("llama"), make_mapper("+pair"))(batch)
    model = hybrid(small_model("llama"), make_mapper())
    for role, name, size in ((USER, "user", USERS), (TARGET, "item", ITEMS)):
        broken = pack(prompts, np.arange(4))
        broken.slot_id[broken.slot_role == role] = 99
        with pytest.raises(ValueError, match=rf"expected {name} ids in \[0, {size}\), got 99"):
            model(broken)


@requires("smollm2")
def test_smollm2_packed_is_unpacked() -> None:
    from collm_fast.data.dataset import Split
    from collm_fast.data.prompts import PromptTemplate, tokenize
    from collm_fast.models.llm import answer_ids, load_llm

    llm, tokenizer = load_llm("smollm2", dtype="float32", device="cpu")
    template = PromptTemplate.load(None, "movie", stage=2)
    titles = ["", *(f"The {word} Film ({1980 + i})" for i, word in enumerate("Red Old Last Good Quiet Lost".split()))]
    histories = [[1, 2, 3], [1, 2, 3], [4]]
    split = Split(
        uid=np.array([1, 1, 2]),
        iid=np.array([4, 5, 6]),
        label=np.array([1, 0, 1]),
        timestamp=np.arange(3),
        his_offsets=np.array([0, 3, 6, 7]),
        his=np.concatenate(histories),
        not_cold=np.ones(3, dtype=bool),
    )
    prompts = tokenize(split, template, tokenizer, titles, history_length=5)
    torch.manual_seed(0)
    mapper = Mapper(D, llm.config.hidden_size, MapperConfig())
    yes, no = answer_ids(tokenizer, template.pieces[-1], "Yes", "No")
    model = CoLLM(llm, yes_id=yes, no_id=no, cf=tables(), mapper=mapper)
    with torch.no_grad():
        shared = model(pack(prompts, np.arange(3)))
        expected = torch.stack([alone(llm, prompts, row, mapper)[yes] for row in range(3)])
    assert len(pack(prompts, np.arange(3)).token_ids) < 0.8 * len(prompts.token_ids)
    torch.testing.assert_close(shared, expected, rtol=0, atol=2e-4)

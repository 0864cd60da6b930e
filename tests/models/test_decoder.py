"""Our decoder forward against each prompt alone through the model's own: values, gradients, and how little it runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hybrids import YES, all_alone, hybrid, make_mapper
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import FAMILIES, VOCABULARY, H, random_layout, random_prompts, small_model
from torch import Tensor

from collm_fast.config import LoraConfig
from collm_fast.data.packing import pack
from collm_fast.data.prompts import HISTORY, TARGET, TEXT, USER, Prompts
from collm_fast.models import frozen
from collm_fast.models import lora as models_lora
from collm_fast.models.collm import CoLLM
from collm_fast.models.decoder import Decoder, gradient_free
from collm_fast.models.frozen import add_projected, mlp_residual, norm
from collm_fast.models.lora import add_lora, lora_layers, set_dropout, set_step_seed
from collm_fast.models.tree_plan import TreePlan

WINDOWED = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
Row = list[tuple[int, int]]  # (role, token or id)


def prompts_of(groups: list[list[Row]]) -> Prompts:
    """Prompts written down token by token."""
    rows = [(number, row) for number, group in enumerate(groups) for row in group]
    tokens = np.array([token for _, row in rows for token in row])
    text = tokens[:, 0] == TEXT
    number = np.array([number for number, _ in rows])
    return Prompts(
        offsets=np.concatenate(([0], np.cumsum([len(row) for _, row in rows]))),
        token_ids=np.where(text, tokens[:, 1], 0).astype(np.int32),
        slot_role=tokens[:, 0].astype(np.uint8),
        slot_id=np.where(text, 0, tokens[:, 1]).astype(np.int32),
        slot_part=np.zeros(len(tokens), np.uint8),
        group=number,
        uid=number % 8 + 1,
        iid=number % 8 + 1,
        label=np.arange(len(rows)) % 2,
        tokens_per_id=1,
    )


def text(*tokens: int) -> Row:
    return [(TEXT, token) for token in tokens]


SHARED, SLOT, ITEM = text(9, 8, 7, 6), [(USER, 3)], [(TARGET, 5)]
EDGES: dict[str, list[list[Row]]] = {
    "one token": [[text(5)], [SLOT]],
    "one token beside long ones": [[text(5)], [SHARED + SLOT + text(4, 5)]],
    "all the same": [[SHARED + SLOT + text(4, 5)] * 5],
    "all different": [[text(10 + n, 20 + n) + [(USER, n)] + text(30 + n)] for n in range(1, 6)],
    "one giant group": [[SHARED + SLOT + text(4) + [(TARGET, n)] + text(5) for n in range(1, 11)] * 2],
    "injected first": [[SLOT + text(4, n, 5) for n in (10, 11)], [ITEM + text(4)]],
    "injected last": [[SHARED + text(n) + ITEM for n in (10, 11)], [text(9) + SLOT, text(9) + ITEM]],
    "injected in some branches": [[SHARED + text(n, n + 1) + end for n, end in ((10, ITEM), (20, text(4)))] * 2],
    "text beside injected": [[SHARED + text(n) for n in (10, 11, 12)], [SHARED + SLOT + text(4)]],
    "injected only in the answer's place of one": [[text(9, 8), text(9) + SLOT]],
    "empty and full histories": [
        [SHARED + SLOT + text(4, n) for n in (10, 11)],
        [SHARED + [(HISTORY, 2), (HISTORY, 4)] + SLOT + text(4, n) + ITEM + text(5) for n in (10, 11)],
    ],
}


def adapted(family: str, **options: Any) -> Any:
    model = small_model(family, **options)
    generator = torch.Generator().manual_seed(2)
    for layer in add_lora(model, LoraConfig(r=2, dropout=0.3), torch.Generator().manual_seed(1)):
        layer.lora_B.data.normal_(generator=generator).mul_(0.3)
    return model


def check_gradients(family: str, prompts: Prompts, *, train_lora: bool, share: bool = True, **options: Any) -> None:
    """Logits and gradients of LoRA or of the mapper, from one packed batch and from every prompt alone."""
    rows = np.random.default_rng(0).permutation(len(prompts))
    weight = torch.linspace(-1, 1.5, len(rows))
    found = []
    for packed in (True, False):
        mapper, llm = make_mapper(), adapted(family, **options)
        mapper.requires_grad_(not train_lora)
        parameters = [p for n, p in llm.named_parameters() if "lora_" in n] if train_lora else list(mapper.parameters())
        for parameter in llm.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        if packed:
            model = hybrid(llm, mapper)
            assert model.decoder is not None
            out = model(pack(prompts, rows, share_prefix=share))
        else:
            out = all_alone(llm, prompts, rows, mapper)
        found.append((out.detach(), torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)))
    (out, got), (expected, want) = found
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    # Where a gradient is zero, as a query's that sees one key alone, both ways leave the rounding of the larger ones.
    rounding = 1e-6 * max(float(b.norm()) for b in want if b is not None)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or (a - b).norm() <= 1e-4 * b.norm() + rounding


@pytest.mark.parametrize("train_lora", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_both_stages_are_those_of_each_prompt_alone(family: str, train_lora: bool) -> None:
    for seed, share in ((0, True), (1, False)):
        check_gradients(family, random_prompts(seed), train_lora=train_lora, share=share)


@pytest.mark.parametrize("family", list(WINDOWED))
def test_windows_reach_from_the_gradient_part_into_the_prefix(family: str) -> None:
    for train_lora in (True, False):
        check_gradients(family, random_prompts(2), train_lora=train_lora, **WINDOWED[family])


@pytest.mark.parametrize("name", list(EDGES))
def test_edges(name: str) -> None:
    for family, train_lora in (("qwen3", False), ("qwen2", True)):
        check_gradients(family, prompts_of(EDGES[name]), train_lora=train_lora)


def test_half_precision_is_nearer_to_float32_than_the_models_own_forward() -> None:
    """The gradient of the mapper, over deep layers: what every layer adds is rounded, the sum of the layers is not."""
    prompts = random_prompts(0, groups=12)
    found = {}
    for dtype, decoder in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        llm = small_model("llama", num_hidden_layers=24, num_key_value_heads=4).to(torch.bfloat16).to(dtype)
        llm.get_input_embeddings().weight.data *= 8  # beside what a layer adds their sum is large, as in trained models
        mapper = make_mapper()
        model = hybrid(llm, mapper, decoder=decoder)
        logits = model(pack(prompts, np.arange(len(prompts))))
        assert logits.dtype == torch.float32
        weight = torch.linspace(-1, 1, len(logits))
        grads = torch.autograd.grad((logits * weight).sum(), list(mapper.parameters()))
        found[dtype, decoder] = logits.detach(), torch.cat([grad.flatten() for grad in grads])
    truth = found[torch.float32, True]
    for place in (0, 1):
        ours, own = ((found[torch.bfloat16, d][place] - truth[place]).norm() for d in (True, False))
        assert ours < 0.8 * own


@pytest.mark.parametrize("per_branch", [True, False])
def test_one_call_a_tree_as_on_a_gpu(per_branch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from collm_fast.models import decoder, layout

    for module in (layout, decoder):
        monkeypatch.setattr(module, "TreePlan", lambda tree, branch, **_: TreePlan(tree, branch, per_branch=per_branch))
    for name in ("injected in some branches", "empty and full histories", "one giant group"):
        check_gradients("llama", prompts_of(EDGES[name]), train_lora=False)
    check_gradients("mistral", random_prompts(3), train_lora=False, **WINDOWED["mistral"])


tokens = st.one_of(st.tuples(st.just(TEXT), st.integers(3, 5)), st.sampled_from([(USER, 1), (TARGET, 2), (HISTORY, 3)]))
rows_of_a_group = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(st.lists(rows_of_a_group, min_size=1, max_size=3), st.booleans())
def test_any_prompts(groups: list[list[Row]], train_lora: bool) -> None:
    if train_lora or any(role != TEXT for group in groups for row in group for role, _ in row):
        check_gradients("qwen3", prompts_of(groups), train_lora=train_lora)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_gradient_part_begins_at_the_first_injected_row_of_each_path(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    tree, branch, _ = (x.numpy() for x in random_layout(rng, trees=3))
    row_index = np.where(rng.random(len(tree)) < share * 0.4, 0, -1).astype(np.int32)
    plan = TreePlan(tree, branch, per_branch=True)
    free = np.zeros(len(tree), bool)
    for place in range(len(tree)):
        path = (tree == tree[place]) & (np.arange(len(tree)) <= place)
        path &= (branch == -1) | (branch == branch[place])
        free[place] = not (row_index[path] >= 0).any()
    free[plan.ends()] = False
    cut = gradient_free(plan, row_index)
    assert (cut is not None) == bool(free.any())
    if cut is not None:
        head, tail = plan.own_places(cut)
        np.testing.assert_array_equal(head, np.flatnonzero(free))
        np.testing.assert_array_equal(tail, np.flatnonzero(~free))


def rows_run(model: CoLLM, run: Callable[[], Any]) -> tuple[list[tuple[int, bool]], list[tuple[int, bool]]]:
    """(rows, whether they have a graph) of each call of the first and of the last layer's MLP."""
    layers = model.llm.base_model.layers
    seen: tuple[list[tuple[int, bool]], ...] = ([], [])
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, out, n=n: seen[n].append((len(out), out.requires_grad)))
        for n, layer in enumerate((layers[0], layers[-1]))
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


def test_only_what_the_answers_and_the_gradient_need_is_run() -> None:
    shared = SHARED + SLOT + text(4)
    prompts = prompts_of([[shared + text(n) + ITEM + text(5) for n in (10, 11, 12)], [text(9, 8) + SLOT + text(5)]])
    rows, model = np.arange(4), hybrid(adapted("llama"), make_mapper())
    batch = pack(prompts, rows)
    total = len(batch.token_ids)
    for parameter in model.llm.parameters():
        parameter.requires_grad_(False)

    def evaluated() -> None:
        with torch.no_grad():
            model(batch)

    assert rows_run(model, evaluated) == ([(total, False)], [(4, False)])
    # Four tokens of the first tree and two of the second come before their user's row.
    assert rows_run(model, lambda: model(batch)) == ([(6, False), (total - 6, True)], [(4, True)])

    # What trains or draws below the injected rows needs all of it.
    model.train()
    set_step_seed(model, 1)
    assert rows_run(model, lambda: model(batch)) == ([(total, True)], [(4, True)])
    set_dropout(model, False)
    assert len(rows_run(model, lambda: model(batch))[0]) == 2
    next(lora_layers(model.llm))[1].lora_A.requires_grad_(True)
    assert rows_run(model, lambda: model(batch)) == ([(total, True)], [(4, True)])


def test_dropout_belongs_to_the_packed_position_in_the_last_layer_too() -> None:
    model, prompts = hybrid(adapted("llama"), make_mapper()), random_prompts(4)
    model.train()
    set_step_seed(model, 3)
    batch = pack(prompts, np.arange(len(prompts)))
    with torch.no_grad():
        ours = model(batch)
        model.decoder = None  # the model's own forward, every position in every layer
        torch.testing.assert_close(ours, model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("train_lora", [True, False])
def test_bfloat16_is_as_exact_as_each_prompt_alone(train_lora: bool) -> None:
    prompts, errors = random_prompts(5, groups=6), {}
    rows = np.arange(len(prompts))

    def gradient(dtype: torch.dtype, packed: bool) -> tuple[Tensor, Tensor]:
        llm, mapper = adapted("qwen2").to(dtype), make_mapper()
        for name, parameter in llm.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(train_lora and "lora_" in name)
        trained = [p for p in (llm if train_lora else mapper).parameters() if p.requires_grad]
        out = hybrid(llm, mapper)(pack(prompts, rows)) if packed else all_alone(llm, prompts, rows, mapper)
        grads = torch.autograd.grad(out.square().sum(), trained)
        return out.detach(), torch.cat([g.flatten().float() for g in grads])

    exact = gradient(torch.float32, False)
    for packed in (True, False):
        errors[packed] = [(a - b).norm() for a, b in zip(gradient(torch.bfloat16, packed), exact, strict=True)]
    assert all(ours <= 2 * theirs for ours, theirs in zip(errors[True], errors[False], strict=True))


def test_other_models_run_through_their_own_forward_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    def changed(change: str) -> Any:
        model = small_model("llama")
        layer = model.model.layers[1]
        if change == "layer":
            whole = layer.forward
            layer.forward = lambda x, *args, **kwargs: whole(x, *args, **kwargs) * 1.01
        elif change == "norm":
            norm = model.model.norm
            model.model.norm = torch.nn.Sequential(norm)
            model.model.register_forward_hook(lambda module, args, out: _doubled(out))
        else:
            layer.self_attn.projection = layer.self_attn.q_proj
            layer.self_attn.forward = _through_projection(layer.self_attn)
        return model

    prompts, rows, mapper = random_prompts(6), np.arange(5), make_mapper()
    for change, reason in (
        ("layer", "layer 1 differs by"),
        ("norm", "the final norm differs"),
        ("attribute", "it has no q_proj"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model = hybrid(changed(change), mapper)
        assert model.decoder is None and model.packed
        assert "llama runs through its own forward" in caplog.text and reason in caplog.text
        with torch.no_grad():
            got, want = model(pack(prompts, rows)), all_alone(changed(change), prompts, rows, mapper)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def _doubled(out: Any) -> Any:
    out.last_hidden_state = out.last_hidden_state * 2
    return out


def _through_projection(attention: Any) -> Any:
    """A forward that finds its query projection under another name."""
    whole, projection = attention.forward, attention.q_proj
    del attention.q_proj

    def forward(*args: Any, **kwargs: Any) -> Any:
        attention.q_proj = projection
        try:
            return whole(*args, **kwargs)
        finally:
            del attention.q_proj

    return forward


def test_a_family_it_does_not_know() -> None:
    assert Decoder.of(small_model("gpt_neox")) is None


def test_an_answer_inside_a_branch_is_refused() -> None:
    prompts = random_prompts(7, slots=False)
    batch = pack(prompts, np.arange(4))
    batch.answer[2] -= 1
    with pytest.raises(ValueError, match="expected the answer of every row at the end of its branch"):
        hybrid(small_model("llama"))(batch)


def test_the_readings_of_the_answers_keep_the_order_of_the_rows() -> None:
    prompts = random_prompts(8, groups=5, slots=False)
    rows = np.random.default_rng(3).permutation(len(prompts))
    model = hybrid(small_model("qwen3"))
    assert VOCABULARY > YES and H == model.H
    with torch.no_grad():
        one_by_one = torch.cat([model(pack(prompts, rows[i : i + 1])) for i in range(len(rows))])
        torch.testing.assert_close(model(pack(prompts, rows)), one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, H), (5, 4, 8), (1, 3)])
def test_the_norm_has_the_gradient_of_the_models_own(shape: tuple[int, ...]) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    module = Qwen3RMSNorm(shape[-1], eps=0.1).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    module.weight.copy_(torch.randn(shape[-1], generator=generator))
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    found = []
    for run in (lambda x: norm(module, x), module):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        found.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
    (ours, got), (theirs, want) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert (got - want).norm() <= 1e-6 * want.norm()
    module.requires_grad_(True)
    assert torch.autograd.grad(norm(module, x).sum(), module.weight)[0].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 23])
def test_the_mlp_without_a_graph_goes_over_a_few_rows_at_a_time(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, and with the values of the step that keeps a graph; float32 sums over bfloat16 layers too."""
    monkeypatch.setattr(frozen, "_ROWS", 7)
    seen: list[int] = []
    swiglu = frozen.ops.swiglu
    monkeypatch.setattr(frozen.ops, "swiglu", lambda gate, up: (seen.append(len(gate)), swiglu(gate, up))[1])
    layer = small_model("llama").to(dtype).requires_grad_(False).model.layers[0]
    x = torch.randn(rows, H)
    kept = x.clone().requires_grad_()
    want = mlp_residual(layer, kept)
    assert seen == [rows] and want.requires_grad and torch.equal(kept, x)
    got = mlp_residual(layer, x)
    assert got is x and seen[1:] == [len(part) for part in x.split(7)]
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    with torch.no_grad():
        torch.testing.assert_close(mlp_residual(layer, kept.clone()), got, rtol=0, atol=0)


@pytest.mark.parametrize("targets", [("gate_proj", "up_proj"), ("up_proj", "down_proj"), ("down_proj",)])
def test_gate_and_up_share_a_step_where_they_are_adapted(
    targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values, gradients and dropout masks of the modules one by one, with and without a graph."""
    together: list[int] = []
    step = models_lora.project_group
    monkeypatch.setattr(models_lora, "project_group", lambda x, *a: (together.append(len(a[0])), step(x, *a))[1])
    model = small_model("llama").double()
    generator = torch.Generator().manual_seed(2)
    layers = add_lora(model, LoraConfig(r=4, alpha=8, dropout=0.3, target_modules=targets), generator)
    for adapter in layers:
        torch.nn.init.normal_(adapter.lora_B, std=0.3, generator=generator)
    set_step_seed(model.train(), 7)
    layer = model.model.layers[1]
    x = torch.randn(9, H, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in layer.mlp.parameters() if p.requires_grad)]
    grad = torch.randn(9, H, dtype=torch.float64)
    ours, theirs = mlp_residual(layer, x), x + layer.mlp(layer.post_attention_layernorm(x))
    assert together == [2] * ("up_proj" in targets) and len(leaves) == 1 + 2 * len(targets)
    found = ([out, *torch.autograd.grad(out, leaves, grad)] for out in (ours, theirs))
    for a, b in zip(*found, strict=True):
        # Llama's own norm computes in float32 whatever it is given.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(mlp_residual(layer, x), ours.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["", "act_fn"])
def test_a_hooked_mlp_is_called_itself(name: str) -> None:
    layer = small_model("llama").model.layers[0]
    x, called = torch.randn(5, H), []
    want = x + layer.mlp(layer.post_attention_layernorm(x))
    layer.mlp.get_submodule(name).register_forward_hook(lambda *args: called.append(True))
    torch.testing.assert_close(mlp_residual(layer, x), want, rtol=1e-6, atol=1e-6)
    assert called == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_adds_to_x_itself_where_nobody_else_needs_it(dtype: torch.dtype) -> None:
    """x is float32 beside a model in bfloat16."""
    projection = torch.nn.Linear(6, 5, bias=False, dtype=dtype).requires_grad_(False)
    x, attended = torch.randn(7, 5), torch.randn(7, 6).to(dtype)
    expected, given = x + projection(attended), x.clone()
    found = add_projected(given, projection, attended, into_x=True)
    assert found.data_ptr() == given.data_ptr()
    torch.testing.assert_close(found, expected)

    hooked, biased = (copy.deepcopy(projection) for _ in range(2))
    hooked.register_forward_hook(lambda module, args, out: None)
    biased.bias = torch.nn.Parameter(torch.zeros(5, dtype=dtype), requires_grad=False)
    trained = copy.deepcopy(projection).requires_grad_()
    leaf = attended.clone().requires_grad_()
    for module, value, into_x in (
        (projection, attended, False),
        (projection, leaf, True),
        (hooked, attended, True),
        (biased, attended, True),
        (trained, attended, True),
    ):
        given = x.clone()
        torch.testing.assert_close(add_projected(given, module, value, into_x=into_x), expected)
        assert torch.equal(given, x)


def test_embeddings_are_left_as_they_were() -> None:
    llm = small_model("llama")
    decoder, (tree, branch, position) = Decoder(llm), random_layout(np.random.default_rng(0), trees=2)
    plan, x = TreePlan(tree.numpy(), branch.numpy(), per_branch=True), torch.randn(len(tree), H)
    before, rotary = x.clone(), decoder.rotary(position, x)
    with torch.no_grad():
        decoder.answers(x, rotary, plan)
        decoder.past(x, rotary, plan)
    assert torch.equal(x, before)

"""Small random language models, a tokenizer and random prompts for the tests of the hybrid model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from collm_fast.data.prompts import HISTORY, TARGET, TEXT, USER, Prompts

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY, H = 97, 32


def small_model(family: str, seed: int = 0, **options: Any) -> Any:
    """A random causal model of a family, float32, eval mode, frozen; weights large enough that attention matters."""
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
        "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM),
    }
    config_class, model_class = classes[family]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": H,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        sizes["head_dim"] = 8
    if family == "mistral":
        sizes["sliding_window"] = None
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]
    if family == "bloom":
        sizes = {"vocab_size": VOCABULARY, "hidden_size": H, "n_layer": 3, "n_head": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**(sizes | options)))
        for parameter in model.parameters():
            # Also the biases, which start at zero, and the norms, which start at one.
            parameter.data.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
        model.tie_weights()
    return model.eval().requires_grad_(False)


def small_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a few merges: ' Yes', ' No' and 'Yes' are tokens, spaces belong to words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["#Answer: Yes", "#Answer: No", "Yes No", "likes the film? Yes"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def dense_mask(tree: torch.Tensor, branch: torch.Tensor, position: torch.Tensor, window: int | None) -> torch.Tensor:
    """[T, T] bool by the definition: same tree, not later, prefix or same branch, at most `window` positions back."""
    axis = torch.arange(len(tree))
    visible = (tree[:, None] == tree[None, :]) & (axis[None, :] <= axis[:, None])
    visible &= (branch[None, :] < 0) | (branch[None, :] == branch[:, None])
    return visible if window is None else visible & (position[None, :] > position[:, None] - window)


def random_layout(rng: np.random.Generator, trees: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tree [T], branch [T], position [T] of random trees: with and without prefix, with one and with many branches."""
    tree, branch, position, row = [], [], [], 0
    for index in range(trees):
        prefix = int(rng.integers(0, 9)) if index else 0
        tree += [index] * prefix
        branch += [-1] * prefix
        position += list(range(prefix))
        for _ in range(int(rng.integers(1, 5))):
            length = int(rng.integers(1, 7))
            tree += [index] * length
            branch += [row] * length
            position += list(range(prefix, prefix + length))
            row += 1
    return torch.tensor(tree), torch.tensor(branch), torch.tensor(position)


USERS, ITEMS = 9, 11


def random_prompts(seed: int, *, groups: int = 4, tokens_per_id: int = 1, slots: bool = True) -> Prompts:
    """Prompts of a few (user, history) groups: shared text and slots, then the target, then text of their own.

    The first group begins with its user's slot, the second holds one row; some rows of a group are equal.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[tuple[int, int, int, int]]] = []  # (token, role, id, part)
    group, uid, iid = [], [], []

    def text(low: int, high: int) -> list[tuple[int, int, int, int]]:
        return [(int(t), TEXT, 0, 0) for t in rng.integers(3, VOCABULARY, rng.integers(low, high))]

    def slot(role: int, index: int) -> list[tuple[int, int, int, int]]:
        return [(0, role, index, part) for part in range(tokens_per_id)] if slots else text(1, 2)

    for number in range(groups):
        user = int(rng.integers(1, USERS))
        history = [item for h in rng.integers(1, ITEMS, rng.integers(0, 3)) for item in slot(HISTORY, int(h))]
        shared = (text(2, 8) if number else []) + slot(USER, user) + text(1, 4) + history + text(2, 5)
        for _ in range(1 if number == 1 else int(rng.integers(2, 5))):
            item = int(rng.integers(1, ITEMS))
            rows.append(shared + text(0, 3) + slot(TARGET, item) + text(1, 4) + [(5, TEXT, 0, 0)])
            group.append(number)
            uid.append(user)
            iid.append(item)
        if number == 0:
            rows.append(list(rows[-1]))
            group.append(number)
            uid.append(uid[-1])
            iid.append(iid[-1])
    columns = np.array([token for row in rows for token in row], dtype=np.int64)
    return Prompts(
        offsets=np.concatenate(([0], np.cumsum([len(row) for row in rows]))),
        token_ids=columns[:, 0].astype(np.int32),
        slot_role=columns[:, 1].astype(np.uint8),
        slot_id=columns[:, 2].astype(np.int32),
        slot_part=columns[:, 3].astype(np.uint8),
        group=np.array(group),
        uid=np.array(uid),
        iid=np.array(iid),
        label=rng.integers(0, 2, len(rows)),
        tokens_per_id=tokens_per_id,
    )

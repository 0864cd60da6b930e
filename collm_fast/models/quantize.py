"""Frozen linear layers in 8 or 4 bits: what bitsandbytes needs to be told through transformers.

LoRA layers over such a base are models/lora.py's, as over any; the model is loaded by models/llm.py. Floor F2.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn


def quantized(form: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load a model's linear layers, but not its head, in int8 or NF4.

    nf4: blocks of 64 weights, each a float32 scale times 16 levels; products in `dtype`. int8: a scale for each row of
    a weight, and activations rounded likewise, but for columns with an activation above 6: those stay as they are for
    the whole batch, so that a row's score depends a little on the rows beside it.

    Args: form: int8 or nf4. dtype: of everything else. device: where the model goes; it cannot be moved later.
    Raises: ValueError for another form, or where bitsandbytes, or accelerate which places its layers, is missing.
    Source: Dettmers et al., LLM.int8() (arXiv 2208.07339) and QLoRA (arXiv 2305.14314).
    """
    forms: dict[str, dict[str, Any]] = {
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }
    if form not in forms:
        raise ValueError(f"quantize: expected one of {', '.join(forms)} or none, got {form!r}")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"quantize: expected {package} to be installed for {form} (pip install {package}), got none"
            )
    import transformers

    # It warns in every call of every layer that float32 and bfloat16 become float16 on the way to int8.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": transformers.BitsAndBytesConfig(**forms[form]), "device_map": {"": device}}


def keep_differentiable(model: nn.Module) -> None:
    """Keep the 4-bit layers of a model in the layout that has a gradient.

    On a CPU with avx512_bf16 a layer in eval mode, as all of a frozen model are, packs its weight anew at the first
    input that requires no gradient, and from then on gives no gradient to any.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (typed as a parameter)

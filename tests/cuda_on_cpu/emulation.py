"""Compiles a `<family>_main.cpp` with g++ and its sanitizers, and runs it on tensors.

Here: the compiler's command line and the files that carry tensors in and out. Not here: what a main does with them
(`<family>_main.cpp`), the execution model (`emulator.h`), the comparison (`test_<family>.py`).

    binary = emulation.build("propagate_main.cpp")
    out = emulation.run(binary, {"x": x, "col": col}, {"out": ((n, d), torch.float32)}, num_layers=3)["out"]
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# -O1 keeps AddressSanitizer's reports exact and halves the time of -O0.
FLAGS = (
    "-std=c++20",
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
)


class EmulatorError(AssertionError):
    """The emulated program ended badly: a sanitizer's finding or a barrier that can never be released."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cuda_on_cpu_")


def has_compiler() -> bool:
    return shutil.which("g++") is not None


@functools.cache
def build(main: str, *defines: str, include: str = ".") -> Path:
    """Compiles a main of this folder once a process; defines are `NAME=VALUE`. Returns the program."""
    binary = Path(_folder().name) / f"{Path(main).stem}_{abs(hash(defines))}"
    command = [
        "g++",
        *FLAGS,
        f"-I{HERE / include}",
        f"-I{HERE}",
        f"-I{CSRC}",
        *(f"-D{define}" for define in defines),
        str(HERE / main),
    ]
    done = subprocess.run([*command, "-o", str(binary)], capture_output=True, text=True)
    if done.returncode != 0:
        raise EmulatorError(f"{main} does not compile:\n{done.stderr[-8000:]}")
    return binary


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return b"" if flat.numel() == 0 else flat.view(torch.uint8).numpy().tobytes()


def run(
    binary: Path,
    inputs: Mapping[str, Tensor | None],
    outputs: Mapping[str, tuple[Sequence[int], torch.dtype]],
    **parameters: float,
) -> dict[str, Tensor]:
    """Runs the program in a folder of its own: inputs become NAME.bin (None: no file), outputs are read back.

    Raises: EmulatorError with the sanitizer's report, or where an output has another size than promised.
    """
    with tempfile.TemporaryDirectory(prefix="emulated_") as name:
        folder = Path(name)
        for key, tensor in inputs.items():
            if tensor is not None:
                (folder / f"{key}.bin").write_bytes(_bytes(tensor))
        lines = [f"{key} {value!r}" for key, value in {**parameters}.items()]
        (folder / "params.txt").write_text("\n".join(lines) + "\n")
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        done = subprocess.run([str(binary)], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise EmulatorError(f"{binary.name} ended with {done.returncode}:\n{done.stderr[-8000:]}")
        results = {}
        for key, (shape, dtype) in outputs.items():
            raw = (folder / f"{key}.bin").read_bytes()
            flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            if flat.numel() != torch.Size(shape).numel():
                raise EmulatorError(f"{key}: expected {tuple(shape)}, got {flat.numel()} elements")
            results[key] = flat.reshape(tuple(shape))
    return results

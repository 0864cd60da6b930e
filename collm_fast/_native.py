"""Loads what was compiled and decides, once, which implementation of each op serves which device.

The rule: compiled C++/CUDA if it registered the op for the device, else Triton on CUDA, else the reference. A backend
that `COLLM_FAST_BACKEND` asks for and that is missing is an error, never a silent fallback. Schemas, checks and
autograd live in `collm_fast.ops`; `collm_fast.environment` prints what was decided here. Floor F0: imports nothing of
the package. The only module that reads the environment.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

import torch

Backend = Literal["native", "triton", "reference"]

FOLDER = Path(__file__).resolve().parent
BACKENDS = ("auto", "native", "triton", "reference")
BACKEND = os.environ.get("COLLM_FAST_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ImportError(f"COLLM_FAST_BACKEND: expected one of {', '.join(BACKENDS)}, got {BACKEND!r}")
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Every schema and every Python implementation of the package is registered through this one object.
LIBRARY = torch.library.Library("collm_fast", "FRAGMENT")

# What was decided for each op, and what is wrong with this installation, in words: "built for X, found Y, do Z".
backends: dict[str, dict[str, Backend | None]] = {}
problems: list[str] = []
_C: ModuleType | None = None


_REINSTALL = "pip install --force-reinstall --no-deps collm-fast"


def _report(what: str, built: str, found: str, do: str) -> None:
    problems.append(f"{what}: built for {built}, found {found}; do: {do}")


def cuda_version() -> str | None:
    """The CUDA of this torch, None for a CPU or ROCm build. Asks no driver and initialises nothing."""
    return torch.version.cuda


def _found_torch() -> str:
    cuda = cuda_version()
    return f"torch {torch.__version__}" + (f" built for CUDA {cuda}" if cuda else "")


def _report_other_cuda(major: str) -> None:
    cuda = f"CUDA {major}"
    do = f"install a torch for {cuda}, or rebuild with your CUDA's nvcc: COLLM_FAST_CUDA=1 {_REINSTALL}"
    _report("CUDA kernels", cuda, _found_torch(), do + " (until then Triton serves the GPU)")


def _report_failure(device: str, error: OSError) -> None:
    """Why a library did not load: nearly always another CUDA, or a torch from before the stable ABI."""
    what, text = f"{device.upper()} kernels", str(error)
    runtime = re.search(r"libcudart\.so\.(\d+)", text)
    if runtime:
        _report_other_cuda(runtime.group(1))
    elif "undefined symbol" in text:
        _report(what, f"torch >= 2.10 ({text})", _found_torch(), "pip install 'torch>=2.10'")
    else:
        _report(what, f"another system ({text})", _found_torch(), _REINSTALL)


def _load_library(device: str) -> bool:
    """Whether the device's library exists and loaded; a failure to load is reported in `problems`."""
    path = FOLDER / f"libcollm_fast_{device}.so"
    if not path.is_file():
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        _report_failure(device, error)
        return False
    return True


def _load_module() -> ModuleType | None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    try:
        return importlib.import_module("collm_fast._C")
    except ModuleNotFoundError:
        built = sorted(path.name for path in FOLDER.glob("_C.*.so"))
        if built:
            _report("_C", ", ".join(built), f"a Python that wants _C{suffix}", _REINSTALL)
    except ImportError as error:
        _report("_C", f"another system ({error})", f"_C{suffix}", _REINSTALL)
    return None


def _load() -> None:
    global _C
    if BACKEND == "reference":
        return
    _C = _load_module()
    if BACKEND == "triton":
        return
    has_cpu = _load_library("cpu")
    if not has_cpu and not problems:
        do = f"install g++ 11 or newer, then {_REINSTALL} (until then the reference serves the CPU)"
        _report("CPU kernels", "pure Python, without a C++ compiler", "no library to load", do)
    if BACKEND == "native" and (not has_cpu or _C is None):
        raise ImportError("COLLM_FAST_BACKEND=native: expected compiled kernels, got none: " + "; ".join(problems))
    found = cuda_version()
    if found is None:
        return
    built = None if _C is None else _C.build_info()["cuda"]
    if built is not None and built.split(".")[0] != found.split(".")[0]:
        # It might even load, with a second CUDA runtime beside torch's; the driver need not serve that one.
        _report_other_cuda(built.split(".")[0])
        return
    before = len(problems)
    if not _load_library("cuda") and len(problems) == before:
        do = f"install nvcc 12 or newer, then COLLM_FAST_CUDA=1 {_REINSTALL} (until then Triton serves the GPU)"
        _report("CUDA kernels", "the CPU only", _found_torch(), do)


def C() -> ModuleType | None:
    """The pybind11 module, or None where nothing was compiled or the reference was asked for: use the NumPy twin."""
    return _C


@functools.cache
def tiles() -> bool:
    """Whether the compiled CPU kernels use AMX tiles in bfloat16."""
    return _C is not None and bool(_C.build_info()["tiles"])


def _missing(name: str, device: str) -> Callable[..., NoReturn]:
    """An implementation that says why there is none: the backend that was asked for does not serve this device."""
    rule = "TRITON_INTERPRET=1 for a CPU tensor" if BACKEND == "triton" else f"a compiled kernel for {device} tensors"
    why = "".join(f"; {problem}" for problem in problems)

    def raise_missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: expected {rule} with COLLM_FAST_BACKEND={BACKEND}, got none{why}")

    return raise_missing


def _choose(device: str, key: str, name: str, has_triton: bool, *, plain: bool) -> Backend | None:
    """Which implementation serves this device; None if the backend that was asked for cannot.

    `plain`: the op has no Triton form, so plain torch serves where Triton would.
    """
    if BACKEND == "reference":
        return "reference"
    if BACKEND != "triton" and torch._C._dispatch_has_kernel_for_dispatch_key(f"collm_fast::{name}", key):
        return "native"
    if plain and (BACKEND == "triton" or (BACKEND == "native" and device == "cuda")):
        return "reference"
    if BACKEND == "native":
        return None
    if BACKEND == "triton":
        return "triton" if has_triton and (device == "cuda" or TRITON_INTERPRET) else None
    return "triton" if has_triton and device == "cuda" else "reference"


def register(name: str, *, reference: Callable[..., Any], triton: Callable[..., Any] | None = None) -> None:
    """Registers the implementation that serves `collm_fast::name` on each device where C++ did not register one.

    Args:
        name: the op, already defined in `LIBRARY`.
        reference: the plain torch implementation, with the schema's signature.
        triton: the Triton implementation; it is called only if it is chosen, so it may import triton itself. None: the
            op has no Triton form, and plain torch serves where C++ does not.
    Raises: ImportError if COLLM_FAST_BACKEND asks for a backend that this installation lacks.
    """
    has_triton = triton is not None and importlib.util.find_spec("triton") is not None
    if BACKEND == "triton" and triton is not None and not has_triton:
        raise ImportError(f"COLLM_FAST_BACKEND=triton: expected triton for {name}, got none; do: pip install triton")
    chosen: dict[str, Backend | None] = {}
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        backend = _choose(device, key, name, has_triton, plain=triton is None)
        if backend is None and device == "cpu" and BACKEND == "native":
            raise ImportError(f"COLLM_FAST_BACKEND=native: expected a compiled {name} for the CPU, got none")
        if backend == "triton":
            assert triton is not None
            LIBRARY.impl(name, triton, key)
        elif backend == "reference":
            LIBRARY.impl(name, reference, key)
        elif backend is None:
            LIBRARY.impl(name, _missing(name, device), key)
        chosen[device] = backend
    if cuda_version() is None and torch.version.hip is None:
        chosen["cuda"] = None
    backends[name] = chosen


_load()

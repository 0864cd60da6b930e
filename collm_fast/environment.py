"""What this installation is and what is wrong with it: `collm_fast.env()` and the text of `collm-fast env`.

The decisions are made in `_native.py`; here they are only described. Unlike `import collm_fast`, this may ask the GPU's
driver. Floor F2.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch

import collm_fast
from collm_fast import _native

# What CMakeLists.txt compiles for; a GPU below the first one needs Triton.
OLDEST_GPU = (8, 0)
CUDA_TARGETS = "sm_80, sm_90a and PTX for later GPUs"


class Environment(TypedDict):
    """The keys of `env()`."""

    version: str
    torch: str
    device: str
    simd: str
    ops: dict[str, dict[str, str | None]]
    problems: list[str]


def simd() -> str:
    """The CPU's vector instruction set: avx512_bf16, avx512, avx2 or scalar."""
    module = _native.C()
    if module is not None:
        return str(module.build_info()["simd"])
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512"
    return "avx2" if capability == "AVX2" else "scalar"


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda: {torch.cuda.get_device_name()} (sm_{major}{minor})"


def _version_problems(module: Any) -> list[str]:
    """The compiled files of another release of the package, for example after a `git pull` in an editable install."""
    built = None if module is None else module.build_info()["version"]
    if built is None or built == collm_fast.__version__:
        return []
    return [
        f"_C: built for collm-fast {built}, found collm-fast {collm_fast.__version__}; "
        "do: pip install --force-reinstall --no-deps collm-fast"
    ]


def _gpu_problems() -> list[str]:
    """What keeps the GPU from being used, although torch is built for one."""
    if _native.cuda_version() is None:
        return []
    if not torch.cuda.is_available():
        return [
            f"GPU: built for CUDA {_native.cuda_version()} (torch), found no usable driver or device; "
            "do: check that nvidia-smi lists a GPU (until then the CPU serves)"
        ]
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU and "native" in {chosen["cuda"] for chosen in _native.backends.values()}:
        return [
            f"GPU: built for {CUDA_TARGETS}, found sm_{capability[0]}{capability[1]}; do: set COLLM_FAST_BACKEND=triton"
        ]
    return []


def env() -> Environment:
    """Which versions, device and implementation of each op are in use, and what is wrong, in words.

    Returns: version and torch (version strings), device ("cpu", or "cuda: NAME (sm_XY)"), simd (see `simd`), ops (for
        each op {"cpu": "native" | "triton" | "reference", "cuda": the same, or None where torch has no CUDA}; None also
        where the backend that COLLM_FAST_BACKEND asks for does not serve the device), problems ("WHAT: built for X,
        found Y; do: Z").
    """
    return Environment(
        version=collm_fast.__version__,
        torch=torch.__version__,
        device=_device(),
        simd=simd(),
        ops={name: dict(chosen) for name, chosen in sorted(_native.backends.items())},
        problems=[*_native.problems, *_version_problems(_native.C()), *_gpu_problems()],
    )


def describe(info: Environment) -> str:
    """The text that `collm-fast env` prints."""
    lines = [f"{key:12}{info[key]}" for key in ("version", "torch", "device", "simd")]
    width = max((len(name) for name in info["ops"]), default=0)
    lines += ["", f"{'op':{width}}  {'cpu':10}cuda"]
    lines += [f"{name:{width}}  {op['cpu'] or '-':10}{op['cuda'] or '-'}" for name, op in info["ops"].items()]
    lines += ["", *(info["problems"] or ["no problems"])]
    return "\n".join(lines)

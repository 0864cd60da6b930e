"""The machine under a benchmark: what it is, its pinned threads, and the memory that a call needs.

Here: everything that asks the operating system or the driver. Not here: timing (`harness.py`).
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "collm_fast")


def pin(threads: int) -> None:
    """Keeps this process on `threads` cores, and torch on as many threads. Needs Linux to pin; elsewhere only torch."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise SystemExit(f"benchmark: expected at most {len(cores)} threads (cores of this process), got {threads}")
    # Threads that exist already (a pool that an import started) keep their own mask: set every one.
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores[:threads])


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return platform.processor()


def simd() -> str:
    """What torch's kernels use, and whether the processor multiplies bfloat16."""
    name = torch.backends.cpu.get_cpu_capability()
    return f"{name}+bf16" if "avx512_bf16" in _cpu_info("flags").split() else name


def commit() -> str:
    """The commit of the tree this file lies in, `-dirty` where tracked files differ, `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COLLM_FAST_COMMIT", "unknown")
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    return found


def description(device: torch.device) -> dict[str, Any]:
    """The head of a result file: device, cpu, simd, commit, versions."""
    cpu = _cpu_info("model name")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"device": name, "cpu": cpu, "simd": simd(), "commit": commit(), "versions": versions()}


def resident(key: str) -> int:
    """Bytes of this process's memory: VmRSS, what it has now, or VmHWM, the most since that mark was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def reset_mark() -> None:
    """VmHWM begins again at what there is now. Raises OSError where Linux does not let it."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int | None:
    """Memory that one call needs above what is there before it, its result included; None where it cannot be read.

    On a CPU this is the resident set's high-water mark, which also counts scratch memory of native code; pages that
    the allocator kept from earlier calls are given back first, or they would hide it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset_mark()
        before = resident("VmRSS")
        fn()
        return max(0, resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None

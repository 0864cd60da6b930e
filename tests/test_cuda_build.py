"""nvcc builds every CUDA kernel for sm_80 and sm_90a, without spills, against whatever torch is installed.

One build through CMakeLists.txt, in a folder of its own and of the CUDA library alone; no GPU is needed.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, requires

pytestmark = requires("nvcc", "compiler")
ARCHITECTURES = {"sm_80", "sm_90a"}
FAMILIES = ("propagate", "inject", "lora")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel and what ptxas said about it."""

    name: str
    arch: str
    stack: int
    spills: int
    registers: int


def parse(log: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`."""
    entry = r"Compiling entry function '(\S+)' for '(\w+)'.*?"
    usage = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return [
        Kernel(name, arch, int(stack), int(stores) + int(loads), int(registers))
        for name, arch, stack, stores, loads, registers in re.findall(entry + usage, log, re.DOTALL)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and everything that its build printed."""
    folder = tmp_path_factory.mktemp("cuda_build")
    settings = [f"-DCOLLM_FAST_TORCH={Path(torch.__file__).parent}", "-DCOLLM_FAST_CUDA=1"]
    log = run(["cmake", "-S", str(ROOT), "-B", str(folder), *settings])
    log += run(["cmake", "--build", str(folder), "--target", "collm_fast_cuda", "--parallel", "2"])
    return folder / "libcollm_fast_cuda.so", log


def run(command: list[str]) -> str:
    variables = os.environ | {"NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def kernels(built: tuple[Path, str]) -> list[Kernel]:
    return parse(built[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_built_for_both_architectures(kernels: list[Kernel], family: str) -> None:
    assert {kernel.arch for kernel in kernels if family in kernel.name} == ARCHITECTURES


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.spills] == []
    # Gathers and scatters have no local arrays at all.
    assert [kernel for kernel in kernels if kernel.stack and "inject" in kernel.name] == []


def images(library: bytes) -> set[tuple[str, int]]:
    """(ptx or code, architecture) of every image in a library's fat binaries.

    A fat binary: magic, version, header size, size; then entries of kind, header size, size, and the architecture.
    """
    found, start = set(), 0
    while (start := library.find(struct.pack("<I", 0xBA55ED50), start)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", library, start)
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, entry)
            found.add(({1: "ptx", 2: "code"}[kind], struct.unpack_from("<I", library, entry + 28)[0]))
            entry += header + size
        start += 4
    return found


def test_the_library_holds_code_and_ptx(built: tuple[Path, str]) -> None:
    """Machine code for both architectures, and PTX for GPUs to come."""
    assert images(built[0].read_bytes()) == {("code", 80), ("code", 90), ("ptx", 80)}


def test_the_cuda_library_is_of_the_stable_abi(built: tuple[Path, str]) -> None:
    audit = [Path(sys.executable).parent / "torch-abi-audit", built[0]]
    text = subprocess.run(audit, capture_output=True, text=True, check=True).stdout
    assert re.search(r"Torch ABI:\s+STABLE", text) and re.search(r"Min torch:\s+2\.10", text)

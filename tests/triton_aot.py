"""Compiles a Triton kernel ahead of time, for sm_90 unless told another, without a GPU, and says what the code needs.

Used by the Triton part of tests/ops/test_<family>.py; the kernels themselves are run in the interpreter there, see
`backends.py`. tests/conftest.py puts this folder on the path: `from triton_aot import compile_for_hopper`.

    code = compile_for_hopper(kernels.propagate.layer_kernel, {"table": "*fp32", "D": "i32"}, {"BLOCK_D": 64})
    assert code.spills == 0 and code.registers <= 128
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Code:
    """What ptxas said about one kernel."""

    registers: int
    spills: int  # bytes of spill stores and loads
    shared: int
    ptx: str


def ptxas() -> Path:
    """The assembler that Triton itself uses."""
    from triton.backends.nvidia.compiler import get_ptxas

    return Path(get_ptxas(90).path)


def compile_for_hopper(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    capability: int = 90,
) -> Code:
    """Triton's compiler for `GPUTarget("cuda", capability, 32)`, then ptxas -v on its PTX.

    Args:
        kernel: a `@triton.jit` function (not interpreted: TRITON_INTERPRET must be unset).
        signature: the type of each run-time argument, in Triton's names: *fp32, *bf16, *i64, i32, fp32.
        constants: the value of each tl.constexpr argument.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name, kind in types.items() if kind == "constexpr" and name not in constants]
    assert not missing, f"no type and no value for {missing}"
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory(prefix="triton_aot_") as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            str(ptxas()),
            "-v",
            f"-arch=sm_{capability}{'a' if capability >= 90 else ''}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    return Code(registers=registers, spills=spills, shared=compiled.metadata.shared, ptx=ptx)

"""The launch configurations of lora_linear's Triton kernels: what is looked up, its numbers, its code for sm_90."""

from __future__ import annotations

import pytest
import torch
from backends import in_child, run_with_backend
from collm_fast.kernels import lora_table
from collm_fast.kernels.lora_table import COLUMNS, DEFAULT, KERNELS, MEASURED, RANKS, Launch
from conftest import requires

from collm_fast import _native, reference
from collm_fast.ops import lora_linear

# (kernel, dtype, rank class, configuration), each once: the measured rows, and the others in the two dtypes of a run.
ENTRIES = {(kernel, dtype, rank, launch) for (_, kernel, dtype, rank, _), launch in MEASURED.items()}
ENTRIES |= {(k, dtype, rank, DEFAULT[rank]) for k in KERNELS for dtype in ("bfloat16", "float32") for rank in RANKS}


def test_every_call_has_a_configuration() -> None:
    assert set(DEFAULT) == set(RANKS) and sorted(RANKS) == list(RANKS) and sorted(COLUMNS) == list(COLUMNS)
    for kernel in KERNELS:
        for r in (1, 16, 17, 256):
            for columns in (0, 1, 1024, 1025, 4096, 10**6):
                launch = lora_table.launch_of(kernel, "float16", r, columns, 0)
                assert launch == DEFAULT[16 if r <= 16 else 256]


def test_a_measured_row_serves_its_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Launch(64, 128, 16, num_warps=8, num_stages=2)
    monkeypatch.setitem(MEASURED, (90, "outer", "bfloat16", 16, 1024), fast)
    assert lora_table.launch_of("outer", "bfloat16", 8, 576, 90) == fast
    assert lora_table.launch_of("outer", "bfloat16", 1, 1024, 90) == fast
    for change in (
        ("project", "bfloat16", 8, 576, 90),
        ("outer", "float32", 8, 576, 90),
        ("outer", "bfloat16", 17, 576, 90),
        ("outer", "bfloat16", 8, 1025, 90),
        ("outer", "bfloat16", 8, 576, 80),
        ("outer", "bfloat16", 8, 576, 0),
    ):
        assert lora_table.launch_of(*change) == DEFAULT[16 if change[2] <= 16 else 256], change


def test_rows_are_what_a_kernel_takes() -> None:
    for (capability, kernel, dtype, rank, columns), launch in MEASURED.items():
        assert capability >= 80 and kernel in KERNELS and rank in RANKS and columns in COLUMNS
        assert dtype in ("bfloat16", "float16", "float32")
        assert launch.num_warps in (1, 2, 4, 8, 16) and 1 <= launch.num_stages <= 8
    for _, _, _, launch in ENTRIES:
        # tl.dot wants powers of two and at least 16; a mask is drawn for eight columns at a time.
        assert all(n >= 16 and n & (n - 1) == 0 for n in (launch.BLOCK_M, launch.BLOCK_C, launch.RANK))


@requires("triton")
@pytest.mark.parametrize("entry", sorted(ENTRIES, key=repr), ids=str)
def test_compiles_for_hopper_without_spills(entry: tuple[str, str, int, Launch]) -> None:
    if in_child():
        return
    import triton.language as tl
    from collm_fast.kernels import lora as kernels
    from triton_aot import compile_for_hopper

    name, dtype, rank, launch = entry
    kernel, rows = getattr(kernels, f"{name}_kernel"), {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
    types = dict.fromkeys(("M", "C", "r", "v_row", "factor_j", "factor_c", "bias_column", "rows_per_part"), "i32")
    types |= {"stream": "i32", "threshold": "i32", "scale": "fp32", "seed": "*i64", "s": "*fp32", "partial": "*fp32"}
    types |= {"v": rows[dtype], "factor": "*fp32", "bias": rows[dtype]}
    types["out"] = "*fp32" if name == "project" else rows[dtype]
    sizes = {"BLOCK_M": launch.BLOCK_M, "BLOCK_C": launch.BLOCK_C, "RANK": launch.RANK}
    constants = {"DROP": True, "BIAS": True, "SUM": tl.float32, **sizes}
    names = kernel.arg_names
    code = compile_for_hopper(
        kernel,
        {n: kind for n, kind in types.items() if n in names},
        {n: value for n, value in constants.items() if n in names},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    assert code.spills == 0 and code.shared <= 227 << 10, (entry, code.registers, code.spills, code.shared)


@pytest.mark.parametrize(
    "launch",
    sorted({e[3] for e in ENTRIES} | {Launch(64, 16, 16, 8, 1), Launch(16, 128, 64, 2, 4)}, key=repr),
    ids=str,
)
def test_numbers_of_a_configuration(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, through the lookup: forward and gradients for ranks below and above a block's."""
    if _native.BACKEND != "triton":
        return
    from collm_fast.kernels import lora as kernels

    for kernel in KERNELS:
        for rank in RANKS:
            monkeypatch.setitem(MEASURED, (0, kernel, "float32", rank, COLUMNS[0]), launch)
    assert kernels.blocks(4, "outer", torch.empty(1, 1)) == vars(launch)
    for r in (5, 18):
        x, weight, bias = torch.randn(70, 37), torch.randn(19, 37) / 6, torch.randn(19)
        A, B, grad = torch.randn(r, 37) / 6, torch.randn(19, r), torch.randn(70, 19)
        results = []
        for function, dtype in ((lora_linear, torch.float32), (reference.lora_linear, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, A, B)]
            frozen = (weight.to(dtype), bias.to(dtype))
            y = function(leaves[0], *frozen, *leaves[1:], 1.5, dropout_p=0.3, seed=3, training=True)
            results.append([y, *torch.autograd.grad(y, leaves, grad.to(dtype))])
        for got, right in zip(*results, strict=True):
            assert float((got.double() - right).norm()) <= 1e-6 * float(right.norm())


@requires("triton")
def test_triton_interpreter() -> None:
    if not in_child():
        assert run_with_backend("triton", __file__, "numbers") >= 4

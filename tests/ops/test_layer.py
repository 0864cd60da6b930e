"""lightgcn_layer, the block of distributed propagation: values against float64, errors, bits; on every backend.

The same tests run again in children with the Triton kernel in the interpreter and with the reference backend.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from backends import in_child, run_with_backend
from conftest import requires
from torch import Tensor

from collm_fast import _native
from collm_fast.ops.layer import lightgcn_layer

TRITON = os.environ.get("COLLM_FAST_BACKEND") == "triton"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Block:
    """A random block of n rows over a table of M: row 0 is empty, row 1 is a hub, columns repeat."""

    def __init__(self, dtype: torch.dtype, D: int = 20, n: int = 40, M: int = 60, hub: int = 50) -> None:
        rng = np.random.default_rng(D)
        degree = rng.integers(0, 9, n)
        degree[:2] = 0, hub
        self.crow = torch.from_numpy(np.concatenate(([0], np.cumsum(degree))))
        self.col = torch.from_numpy(rng.integers(0, M, int(degree.sum())).astype(np.int32))
        self.inv_sqrt_degree = torch.from_numpy(rng.uniform(0.1, 1.0, n).astype(np.float32))
        self.x = torch.from_numpy(rng.standard_normal((n, D))).to(dtype)
        self.source = torch.from_numpy(rng.standard_normal((M, D))).to(dtype)

    def table(self, storage: torch.dtype) -> Tensor:
        """The table of layer 0 of `source`: how it holds its columns is the backend's own affair."""
        out = torch.full_like(self.source, float("nan"), dtype=storage)
        M = len(out)
        empty = torch.empty(0, dtype=torch.int32)
        lightgcn_layer(out, None, self.source, torch.zeros(M + 1, dtype=torch.int64), empty, torch.ones(M))
        return out

    def expected(self, mean: float | None) -> Tensor:
        """The layer in float64."""
        node = torch.repeat_interleave(torch.arange(len(self.x)), self.crow.diff())
        s = self.inv_sqrt_degree.double()[:, None]
        sums = torch.zeros_like(self.x, dtype=torch.float64)
        sums.index_add_(0, node, self.source.double()[self.col.long()])
        return (self.x.double() + s * sums) * (s if mean is None else mean)

    def run(self, out: Tensor, table: Tensor | None, **options: Any) -> Tensor:
        lightgcn_layer(out, table, self.x, self.crow, self.col, self.inv_sqrt_degree, **options)
        return out


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def limit(*dtypes: torch.dtype) -> float:
    return max(
        {torch.float64: 1e-14, torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[d] for d in dtypes
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 20, 64, 130])
def test_forward(dtype: torch.dtype, D: int) -> None:
    if TRITON and (dtype == torch.bfloat16 or D == 64):
        return  # Triton's interpreter is wrong for bfloat16, and slow
    block = Block(dtype, D, n=12 if TRITON else 40)
    wide = torch.promote_types(dtype, torch.float32)
    for storage in {dtype, wide}:
        table = block.table(storage)
        out = block.run(torch.full_like(block.x, float("nan")), table, mean=0.25)
        assert error(out, block.expected(0.25)) <= limit(dtype, storage)
        assert torch.equal(out, block.run(torch.empty_like(out), table, mean=0.25))
        rows = torch.tensor([1, 7, 0, 1])
        some = block.run(torch.full((4, D), float("nan"), dtype=dtype), table, mean=0.25, rows=rows)
        assert torch.equal(some, out[rows])
        # The next table, and what it is good for: a layer over it.
        following = block.run(torch.full_like(block.x, float("nan"), dtype=storage), table)
        one = Block(dtype, D, n=len(block.x))
        one.col, one.source = (one.col % len(one.x)).int(), block.expected(None).to(storage)
        out = one.run(torch.full_like(one.x, float("nan")), following, mean=0.5)
        assert error(out, one.expected(0.5)) <= 2 * limit(dtype, storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_of_a_large_hub(dtype: torch.dtype) -> None:
    if TRITON:
        return  # slow in the interpreter, and no other path
    block = Block(dtype, hub=5000)
    out = block.run(torch.empty_like(block.x), block.table(dtype), mean=1.0)
    # Nearly all of the norm is one long sum: torch makes one run of roundings of it, the kernels several.
    pieces = _native.backends["lightgcn_layer"]["cpu"] == "native"
    assert error(out, block.expected(1.0)) <= (5 if pieces else 30) * limit(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_forward_of_slots(dtype: torch.dtype) -> None:
    """A table without its rows of zeros gives what the whole one does, a hub of several pieces included."""
    block = Block(dtype, n=12, hub=30 if TRITON else 5000)
    block.source[::3] = 0
    block.source[1] = 0
    held = (block.source != 0).any(1)
    slot = torch.where(held, held.cumsum(0) - 1, -1).int()
    table = block.table(dtype)
    whole = block.run(torch.empty_like(block.x), table, mean=0.5)
    some = block.run(torch.full_like(block.x, float("nan")), table[held].contiguous(), mean=0.5, slot=slot)
    assert error(some, whole.double()) <= 5 * limit(dtype)
    nothing = block.run(torch.full_like(block.x, float("nan")), table[:0], mean=0.5, slot=torch.full_like(slot, -1))
    assert torch.equal(nothing, 0.5 * block.x)


def test_forward_without_a_table_and_of_strided_x() -> None:
    block = Block(torch.float32)
    block.x = torch.stack((block.x, block.x.neg()), dim=2)[:, :, 0]
    assert not block.x.is_contiguous()
    out = block.run(torch.empty(block.x.shape), None, mean=0.5)
    assert torch.equal(out, 0.5 * block.x)
    assert error(block.run(out, block.table(torch.float32), mean=1.0), block.expected(1.0)) <= limit(torch.float32)


def test_forward_writes_beside_others() -> None:
    """`out` may be the first rows of a longer table, whose end is received from elsewhere."""
    block = Block(torch.float32)
    longer = torch.full((len(block.x) + 2, block.x.shape[1]), 7.0)
    block.run(longer[:-2], block.table(torch.float32), mean=1.0)
    assert bool((longer[-2:] == 7.0).all()) and error(longer[:-2], block.expected(1.0)) <= limit(torch.float32)


def test_forward_of_nothing() -> None:
    for n, M, D in ((0, 0, 4), (3, 0, 4), (0, 5, 4), (3, 5, 0)):
        empty = torch.empty(0, dtype=torch.int32)
        out = torch.full((n, D), float("nan"))
        lightgcn_layer(
            out,
            torch.empty(M, D),
            torch.ones(n, D),
            torch.zeros(n + 1, dtype=torch.int64),
            empty,
            torch.ones(n),
            mean=1.0,
        )
        assert torch.equal(out, torch.ones(n, D))


def test_opcheck() -> None:
    block = Block(torch.float32)
    args = (
        torch.empty_like(block.x),
        block.table(torch.float32),
        block.x,
        block.crow,
        block.col,
        block.inv_sqrt_degree,
    )
    tests = ("test_schema", "test_faketensor")
    for mean in (0.5, None):
        torch.library.opcheck(torch.ops.collm_fast.lightgcn_layer.default, (*args, mean, None, None), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"x": torch.zeros(3)}, r"expected x of shape \[n, D\], got \[3\]"),
        (
            {"x": torch.zeros(40, 20, dtype=torch.int64)},
            "expected x in float32, bfloat16, float16 or float64, got int64",
        ),
        ({"out": torch.zeros(40, 19)}, r"expected out of shape \[40, 20\], got \[40, 19\]"),
        ({"out": torch.zeros(20, 40).T}, "expected out contiguous, got a strided one"),
        (
            {"out": torch.zeros(40, 20, dtype=torch.float64)},
            "expected out in float32, bfloat16 or float16, got float64",
        ),
        ({"table": torch.zeros(60, 19)}, r"expected table of shape \[60, 20\], got \[60, 19\]"),
        ({"table": torch.zeros(60)}, r"expected table of shape \[M, D\], got \[60\]"),
        ({"table": torch.zeros(20, 60).T}, "expected table contiguous, got a strided one"),
        ({"table": torch.zeros(60, 20).double()}, "expected table in float32, bfloat16 or float16, got float64"),
        ({"crow": torch.zeros(40, dtype=torch.int64)}, r"expected crow of shape \[41\], got \[40\]"),
        ({"crow": torch.zeros(41, dtype=torch.int32)}, "expected crow in int64, got int32"),
        ({"crow": torch.zeros(41, dtype=torch.int64)}, "expected crow to rise from 0 to nnz"),
        ({"col": torch.zeros(3, dtype=torch.int64)}, "expected col in int32, got int64"),
        ({"inv_sqrt_degree": torch.zeros(39)}, r"expected inv_sqrt_degree of shape \[40\], got \[39\]"),
        ({"inv_sqrt_degree": torch.zeros(40).double()}, "expected inv_sqrt_degree in float32, got float64"),
        ({"rows": torch.zeros(40, dtype=torch.int32)}, "expected rows in int64, got int32"),
        ({"rows": torch.full((40,), 40)}, r"expected rows in \[0, 40\), got 40 at position 0"),
        ({"slot": torch.zeros(60, dtype=torch.int64)}, "expected slot in int32, got int64"),
        ({"slot": torch.full((60,), 60, dtype=torch.int32)}, r"expected slot in \[-1, 60\), got 60 at position 0"),
        (
            {"slot": torch.zeros(60, dtype=torch.int32), "table": None},
            "expected a table where there are slots, got None",
        ),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"expected out of shape \[3, 20\], got \[40, 20\]"),
    ],
)
def test_errors(change: dict[str, Tensor], rule: str) -> None:
    block = Block(torch.float32)
    names = ("x", "crow", "col", "inv_sqrt_degree")
    args = {"out": torch.empty(40, 20), "table": torch.zeros(60, 20), **{name: getattr(block, name) for name in names}}
    with pytest.raises(ValueError, match=f"lightgcn_layer: {rule}"):
        lightgcn_layer(**(args | change))


@pytest.mark.parametrize("value", [60, -1])
def test_errors_of_columns(value: int) -> None:
    block = Block(torch.float32)
    table = block.table(torch.float32)
    block.col[3] = value
    with pytest.raises(ValueError, match=rf"lightgcn_layer: expected col in \[0, 60\), got {value} at "):
        block.run(torch.empty_like(block.x), table)


def test_errors_of_columns_over_a_table_without_rows() -> None:
    block = Block(torch.float32)
    nothing, slot = torch.empty(0, 20), torch.full((59,), -1, dtype=torch.int32)
    block.col[3] = 59
    with pytest.raises(ValueError, match=r"lightgcn_layer: expected col in \[0, 0\), got "):
        block.run(torch.empty_like(block.x), nothing)
    with pytest.raises(ValueError, match=r"lightgcn_layer: expected col in \[0, 59\), got 59 at "):
        block.run(torch.empty_like(block.x), nothing, slot=slot)


def test_errors_of_more_slots_than_columns_can_name() -> None:
    """On tensors without memory: the CPU kernel has the check too, and 8 GB to be shown."""
    block = Block(torch.float32)
    names = ("x", "crow", "col", "inv_sqrt_degree")
    args = {name: getattr(block, name).to("meta") for name in names}
    out, slot = torch.empty(40, 20, device="meta"), torch.empty(2**31, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="lightgcn_layer: expected fewer than 2\\^31 slots, got 2147483648"):
        lightgcn_layer(out, torch.empty(60, 20, device="meta"), **args, slot=slot)


# --- the other backends ------------------------------------------------------------------------------------------
@requires("triton")
def test_triton_interpreter() -> None:
    if not in_child():
        assert run_with_backend("triton", __file__, "forward or error or backend") >= 30


def test_reference_backend() -> None:
    if not in_child():
        assert run_with_backend("reference", __file__, "forward or error or backend") >= 30


def test_the_backend_is_the_one_asked_for() -> None:
    asked, served = _native.BACKEND, _native.backends["lightgcn_layer"]["cpu"]
    assert served == asked if asked != "auto" else served in ("native", "reference")


@requires("triton")
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", ["layer", "result of rows", "scale", "slots"])
def test_triton_compiles_for_hopper(stored: str, flags: str) -> None:
    if in_child():
        return
    import triton.language as tl
    from collm_fast.kernels import layer as kernels
    from triton_aot import compile_for_hopper

    kinds = {"x": "*fp32", "table": f"*{stored}", "inv_sqrt_degree": "*fp32", "col": "*i32", "mean": "fp32"}
    kinds |= {"out": "*fp32" if flags == "result of rows" else f"*{stored}"}
    kinds |= dict.fromkeys(("crow", "rows", "records"), "*i64") | {"slot": "*i32"}
    kinds |= dict.fromkeys(("n", "M", "R", "nnz", "D", "x_row", "x_column"), "i64")
    constants: dict[str, Any] = {"GATHER": flags != "scale", "BLOCK_E": 16, "BLOCK_D": 64, "SUM": tl.float32}
    constants |= dict.fromkeys(("RESULT", "ROWS"), flags == "result of rows") | {"SLOT": flags == "slots"}
    code = compile_for_hopper(kernels.block_layer_kernel, kinds, constants)
    assert code.spills == 0 and code.registers <= 128

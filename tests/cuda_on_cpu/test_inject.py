"""The CUDA kernels of the inject family, run on the host under AddressSanitizer, against the reference and the CPU."""

from __future__ import annotations

from math import gcd

import emulation
import pytest
import torch
from conftest import requires
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.ops import scatter_rows

pytestmark = requires("compiler")

VALUES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DTYPES = list(VALUES)


def storage(tensor: Tensor) -> Tensor:
    """All elements from the tensor's first to its last in memory, so that strides have their meaning."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,))


def integers(index: Tensor) -> dict[str, Tensor]:
    return {"index32" if index.dtype == torch.int32 else "index64": index}


def copied(
    table: Tensor,
    rows: Tensor,
    token_ids: Tensor | None,
    index: Tensor,
    *,
    unit: int | None = None,
    thread_order: int = 0,
) -> tuple[Tensor, Tensor]:
    """embed_inject where there are token_ids, else gather_rows of `rows`' place in `table`; (out, errors [2, 3])."""
    element, columns, inject = table.element_size(), table.shape[1], token_ids is not None
    packed = table.stride(1) == 1 and (rows.stride(1) == 1 or not inject)
    if unit is None:
        strides = [table.stride(0), columns, *([rows.stride(0)] if inject else [])]
        unit = gcd(16, *(stride * element for stride in strides)) if packed else element
    parameters = {"kernel": 0 if inject else 1, "unit": unit, "places": index.numel(), "thread_order": thread_order}
    for name, tensor in (("table", table), ("rows", rows)):
        step = unit if tensor.stride(1) == 1 else tensor.stride(1) * element
        parameters |= {f"{name}_row": tensor.stride(0) * element, f"{name}_step": step, f"{name}_count": len(tensor)}
    named = {"row_index": index} if inject else integers(index)
    results = emulation.run(
        emulation.build("inject_main.cpp"),
        {"table": storage(table), "rows": storage(rows), "token_ids": token_ids, **named},
        {"out": ((*index.shape, columns), table.dtype), "errors": ((2, 3), torch.int64)},
        units=columns * element // unit,
        **parameters,
    )
    return results["out"], results["errors"]


def summed(
    grad: Tensor, index: Tensor, num_rows: int, *, scan: bool, thread_order: int = 0, vector: bool | None = None
) -> tuple[Tensor, Tensor]:
    """scatter_rows of a [M, H] or [A, B, H] grad; (out, errors [2, 3])."""
    element, columns = grad.element_size(), grad.shape[-1]
    split, outer, inner = 1, grad.stride(0), 0
    if grad.dim() == 3:
        split, outer, inner = grad.shape[1], grad.stride(0), grad.stride(1)
    if vector is None:
        vector = grad.stride(-1) == 1 and all(n * element % 16 == 0 for n in (outer, inner, columns))
    flat, order = index.reshape(-1), None
    if not scan:
        flat, order = torch.sort(flat, stable=True)
    results = emulation.run(
        emulation.build("inject_main.cpp"),
        {"grad": storage(grad), "order": order, **integers(flat)},
        {"out": ((num_rows, columns), grad.dtype), "errors": ((2, 3), torch.int64)},
        kernel=2 if scan else 3,
        value=VALUES[grad.dtype],
        places=index.numel(),
        num_rows=num_rows,
        columns=columns,
        split=split,
        outer=outer,
        inner=inner,
        column=grad.stride(-1),
        vector=int(vector),
        thread_order=thread_order,
    )
    return results["out"], results["errors"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [1, 6, 8, 576])
def test_embed_inject(H: int, dtype: torch.dtype) -> None:
    table, rows = torch.randn(11, H).to(dtype), torch.randn(5, H).to(dtype)
    token_ids, row_index = torch.randint(0, 11, (3, 7)), torch.randint(-2, 5, (3, 7), dtype=torch.int32).clamp_min(-1)
    token_ids[row_index >= 0] = -12345
    for thread_order in (0, 1):
        out, errors = copied(table, rows, token_ids, row_index, thread_order=thread_order)
        assert torch.equal(out, reference.embed_inject(token_ids, table, rows, row_index))
        assert not errors.any()


@pytest.mark.parametrize("unit", [2, 4, 8, 16])
def test_every_unit_copies_the_same(unit: int) -> None:
    table, rows = torch.randn(9, 24).half(), torch.randn(4, 24).half()
    token_ids, row_index = torch.randint(0, 9, (20,)), torch.randint(-1, 4, (20,), dtype=torch.int32)
    out, _ = copied(table, rows, token_ids, row_index, unit=unit)
    assert torch.equal(out, reference.embed_inject(token_ids, table, rows, row_index))


def test_strided_tables() -> None:
    table, rows = torch.randn(26, 22)[::2, ::2], torch.randn(11, 6).T
    token_ids, row_index = torch.randint(0, 13, (20,)), torch.randint(-1, 6, (20,), dtype=torch.int32)
    out, _ = copied(table, rows, token_ids, row_index)
    assert torch.equal(out, reference.embed_inject(token_ids, table, rows, row_index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_gather_rows(index_dtype: torch.dtype, dtype: torch.dtype) -> None:
    table, index = torch.randn(7, 12).to(dtype), torch.randint(-1, 7, (5, 4)).to(index_dtype)
    out, errors = copied(table, table[:0], None, index)
    assert torch.equal(out, reference.gather_rows(table, index)) and not errors.any()


def test_ids_out_of_range_are_reported_and_read_nothing() -> None:
    table, rows = torch.randn(4, 8), torch.randn(2, 8)
    token_ids = torch.tensor([0, 4, 2**40, -1, 3])
    out, errors = copied(table, rows, token_ids, torch.tensor([-1, -1, 0, -1, -1], dtype=torch.int32))
    assert torch.equal(out, torch.stack((table[0], 0 * rows[0], rows[0], 0 * rows[0], table[3])))
    assert errors[0, 0] == 1 and int(errors[0, 1]) in (4, -1) and errors[0, 2] == 4 and not errors[1].any()
    out, errors = copied(table, rows, token_ids.clamp(0, 3), torch.tensor([1, 2, -2, 2**31 - 1, 0], dtype=torch.int32))
    assert torch.equal(out[[0, 4]], rows[[1, 0]]) and not out[1:4].any()
    assert errors[1, 0] == 1 and errors[1, 2] == 2 and not errors[0].any()
    out, errors = copied(table, table[:0], None, torch.tensor([-1, 3, 4, -2]))
    assert torch.equal(out[1], table[3]) and not out[[0, 2, 3]].any()
    assert errors[1, 0] == 1 and int(errors[1, 1]) in (4, -2) and errors[1, 2] == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "sorted"])
@pytest.mark.parametrize("H", [5, 16])
def test_scatter_rows(H: int, scan: bool, index_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The same bits as the CPU's kernel, whatever the order of the threads: the sums are ordered and not atomic."""
    grad, index = torch.randn(300, H).to(dtype), torch.randint(-1, 5, (300,)).to(index_dtype)
    index[index == 3] = 1  # one row without a place, one with more than a run
    truth = reference.scatter_rows(grad.double(), index, 5)
    for thread_order in (0, 1):
        out, errors = summed(grad, index, 5, scan=scan, thread_order=thread_order)
        if _native.backends["scatter_rows"]["cpu"] == "native":
            assert torch.equal(out, scatter_rows(grad, index, 5))
        limit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2)
        assert float((out.double() - truth).norm() / truth.norm()) <= limit and not errors.any()


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "sorted"])
def test_scatter_rows_of_strided_grads(scan: bool) -> None:
    base = torch.randn(4, 6, 20)
    grads = [base, base.transpose(0, 1), base[..., ::2], base[:, 1:4, 4:], base[:1, :1, :1].expand(4, 6, 20)]
    for grad in grads:
        index = torch.randint(-1, 3, grad.shape[:2])
        out, _ = summed(grad, index, 3, scan=scan)
        truth = reference.scatter_rows(grad.double(), index, 3)
        assert float((out.double() - truth).norm() / truth.norm()) <= 1e-6


def test_wide_rows_take_several_blocks() -> None:
    grad, index = torch.randn(9, 1030), torch.randint(0, 2, (9,))
    for scan in (True, False):
        out, _ = summed(grad, index, 2, scan=scan)
        truth = reference.scatter_rows(grad.double(), index, 2)
        assert float((out.double() - truth).norm() / truth.norm()) <= 1e-6
    table = torch.randn(3, 1030)
    out, _ = copied(table, table[:0], None, torch.tensor([2, -1, 0]), unit=4)
    assert torch.equal(out, torch.stack((table[2], 0 * table[1], table[0])))


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "sorted"])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_sums_guard_their_index(num_rows: int, scan: bool) -> None:
    if not scan and num_rows == 0:
        return  # the launcher never sorts for no rows
    grad, index = torch.ones(4, 8), torch.tensor([0, num_rows, -1, 0])
    out, errors = summed(grad, index, num_rows, scan=scan)
    assert errors[1].tolist()[0] == 1 and errors[1, 2] == num_rows
    if num_rows:
        assert torch.equal(out[:, 0], torch.tensor([2.0, 0.0, 0.0]))
    _, errors = summed(grad, index.clamp_max(-2), num_rows, scan=scan)
    assert errors[1].tolist() == [1, -2, num_rows]


def test_no_places_give_zeros() -> None:
    grad, index = torch.ones(0, 8), torch.zeros(0, dtype=torch.int64)
    for scan in (True, False):
        out, errors = summed(grad, index, 3, scan=scan)
        assert not out.any() and not errors.any()

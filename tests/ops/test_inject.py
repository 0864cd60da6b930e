"""embed_inject, gather_rows and scatter_rows on every backend: values, gradients, errors, determinism, compilation.

The children at the end run the same tests on Triton's interpreter and on the reference; the device code of
csrc/cuda/inject.cuh is run by tests/cuda_on_cpu/test_inject.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from backends import ROOT, in_child, run_with_backend
from conftest import requires
from torch import Tensor

from collm_fast import _native, reference
from collm_fast.ops import check_device_errors, embed_inject, gather_rows, scatter_rows

DEVICES = ["cpu", pytest.param("cuda", marks=requires("cuda"))]
pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-14}
# Name: shape of token_ids, V, H, S.
SHAPES = {
    "odd": ((3, 7), 11, 13, 5),
    "wide": ((40,), 50, 576, 6),
    "flat": ((1,), 3, 8, 1),
    "no tokens": ((0,), 5, 4, 2),
    "no batch": ((0, 6), 5, 4, 2),
    "no rows": ((4, 5), 9, 16, 0),
    "no table": ((4, 5), 0, 16, 3),
    "one column": ((6,), 4, 1, 3),
    "no columns": ((6,), 4, 0, 3),
    "three dimensions": ((2, 3, 5), 7, 33, 4),
    "scalar": ((), 7, 5, 4),
}


def case(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, V, H, S = SHAPES[name]
    token_ids = torch.randint(0, max(V, 1), shape)
    row_index = torch.randint(-2 if V else 0, S, shape, dtype=torch.int32).clamp_min(-1)
    token_ids[row_index >= 0] = -12345  # a placeholder may be anything
    table, rows = torch.randn(V, H), torch.randn(S, H)
    return token_ids.to(device), table.to(device, dtype), rows.to(device, dtype), row_index.to(device)


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def assert_sum(value: Tensor, truth: Tensor, own: Callable[[], Tensor]) -> None:
    """A sum is right to rounding in wide types, and in narrow ones at most twice as wrong as torch's own."""
    assert value.shape == truth.shape
    if value.dtype in EXACT:
        assert relative(value, truth) <= EXACT[value.dtype]
    elif truth.numel() > 0:
        assert relative(value, truth) <= 2 * max(relative(own(), truth), torch.finfo(value.dtype).eps / 4)


# --- values ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_embed_inject_forward(name: str, dtype: torch.dtype, device: str) -> None:
    inputs = case(name, dtype, device)
    out = embed_inject(*inputs)
    assert out.dtype == dtype and out.shape == (*inputs[0].shape, inputs[1].shape[1])
    assert torch.equal(out, reference.embed_inject(*inputs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gather_and_scatter_forward(name: str, index_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    _, table, rows, row_index = case(name, dtype, device)
    index = row_index.to(index_dtype)
    out = gather_rows(rows, index)
    assert out.dtype == dtype and out.shape == (*index.shape, rows.shape[1])
    wide = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    assert torch.equal(out, wide[index.long()])
    grad = torch.randn(*index.shape, table.shape[1]).to(device, dtype)
    total = scatter_rows(grad, index, rows.shape[0])
    truth = reference.scatter_rows(grad.double(), index, rows.shape[0])

    def own() -> Tensor:
        kept, flat = index.reshape(-1) >= 0, grad.reshape(-1, grad.shape[-1])
        return torch.zeros_like(total).index_add(0, index.reshape(-1)[kept].long(), flat[kept])

    assert total.dtype == dtype
    assert_sum(total, truth, own)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_forward(dtype: torch.dtype, device: str) -> None:
    token_ids, table, rows, row_index = case("odd", dtype, device)
    wide = torch.randn(26, 22).to(device, dtype)
    table, rows = wide[::2, ::2].T, torch.randn(5, 30).to(device, dtype)[:, 3:29:2]  # [11, 13] and [5, 13]
    token_ids, row_index = token_ids.T.contiguous().T, torch.cat([row_index, row_index], 1)[:, ::2]
    token_ids = token_ids.clamp_min(0)
    assert torch.equal(
        embed_inject(token_ids, table, rows, row_index), reference.embed_inject(token_ids, table, rows, row_index)
    )
    assert torch.equal(gather_rows(table, token_ids), table[token_ids])


def strided_grads(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    base = torch.randn(4, 3, 2, 10).to(device, dtype)
    return {
        "contiguous": base,
        "expanded scalar": base[:1, :1, :1, :1].expand(4, 3, 2, 10),
        "expanded row": base[:1, :1, :1].expand(4, 3, 2, 10),
        "transposed": base.permute(1, 0, 2, 3),
        "three strides": base.permute(2, 1, 0, 3),
        "every other column": base[..., ::2],
        "sliced": base[:, 1:, :, 2:],
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", strided_grads("cpu", torch.float32))
def test_strided_grad_forward(name: str, dtype: torch.dtype, device: str) -> None:
    grad = strided_grads(device, dtype)[name]
    index = torch.randint(-1, 3, grad.shape[:-1], device=device)
    assert torch.equal(scatter_rows(grad, index, 3), scatter_rows(grad.contiguous(), index, 3))
    assert_sum(
        scatter_rows(grad, index, 3).float(), reference.scatter_rows(grad.double(), index, 3).to(dtype), lambda: grad
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [3, 1000])
def test_huge_degree_forward(num_rows: int, dtype: torch.dtype, device: str) -> None:
    """One row takes nearly all places; float32 accumulation keeps what a narrow running sum would lose."""
    grad = torch.rand(5000, 5).to(device, dtype)
    index = torch.full((5000,), 1, device=device)
    index[::1000] = 2
    total, truth = scatter_rows(grad, index, num_rows), reference.scatter_rows(grad.double(), index, num_rows)
    limit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2)
    if _native.backends["scatter_rows"][device] == "reference":
        limit *= 2  # torch's index_add keeps one running sum
    assert relative(total, truth) <= limit


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_forward(device: str) -> None:
    """Enough rows and places for the sorted form of the CUDA kernel, and for several threads on a CPU."""
    grad, index = torch.randn(6000, 40, device=device), torch.randint(-1, 5000, (6000,), device=device)
    assert relative(scatter_rows(grad, index, 5000), reference.scatter_rows(grad.double(), index, 5000)) <= 1e-6
    ids = torch.randint(0, 5000, (6000,), device=device)
    table, rows = torch.randn(5000, 40, device=device), torch.randn(5000, 40, device=device)
    where = index.to(torch.int32)
    assert torch.equal(embed_inject(ids, table, rows, where), reference.embed_inject(ids, table, rows, where))
    assert torch.equal(gather_rows(table, ids), table[ids])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width_forward(dtype: torch.dtype, device: str) -> None:
    """Rows that end inside a vector of any instruction set; one row of the sums has several runs, one has none."""
    for H in (1, 2, 3, 7, 15) if in_child() else (1, 2, 3, 4, 6, 7, 8, 12, 15, 17, 31, 40, 63, 65, 96, 130, 257):
        table, index = torch.randn(5, H).to(device, dtype), torch.randint(-1, 5, (9,), device=device)
        assert torch.equal(gather_rows(table, index), torch.cat((table, 0 * table[:1]))[index])
        grad, where = torch.randn(150, H).to(device, dtype), torch.randint(-1, 3, (150,), device=device)
        where[10:] = 3
        total, truth = scatter_rows(grad, where, 5), reference.scatter_rows(grad.double(), where, 5)
        limit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
        assert relative(total, truth) <= limit and not total[4].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("H", [1024, 1025])
def test_outputs_beyond_the_caches_forward(H: int, device: str) -> None:
    """New memory and memory used before take other stores on a CPU; so do rows that are not aligned."""
    if in_child():
        return
    table, rows = torch.randn(64, H, device=device), torch.randn(7, H, device=device)
    token_ids = torch.randint(0, 64, (2600,), device=device)
    row_index = torch.randint(-40, 7, (2600,), device=device).clamp_min(-1).to(torch.int32)
    truth = reference.embed_inject(token_ids, table, rows, row_index)
    for _ in range(4):  # the allocator keeps what was freed
        assert torch.equal(embed_inject(token_ids, table, rows, row_index), truth)
    assert torch.equal(gather_rows(rows, row_index), torch.cat((rows, 0 * rows[:1]))[row_index.long()])
    grad = torch.randn(70, H, device=device)
    index = torch.randint(0, 2600, (70,), device=device)
    for _ in range(4):
        assert relative(scatter_rows(grad, index, 2600), reference.scatter_rows(grad.double(), index, 2600)) <= 1e-6


# --- gradients ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("scalar", "no columns")])
def test_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    token_ids, table, rows, row_index = case(name, dtype, device)
    table.requires_grad_()
    rows.requires_grad_()
    out = embed_inject(token_ids, table, rows, row_index)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, [table, rows], grad)
    wide = [t.detach().double().requires_grad_() for t in (table, rows)]
    truth = torch.autograd.grad(
        reference.embed_inject(token_ids, *wide, row_index), wide, grad.double(), allow_unused=True
    )
    own = torch.autograd.grad(
        reference.embed_inject(token_ids, table, rows, row_index), [table, rows], grad, allow_unused=True
    )
    for value, right, torchs in zip(got, truth, own, strict=True):
        right = torch.zeros_like(value).double() if right is None else right
        assert_sum(
            value, right, lambda torchs=torchs, value=value: torch.zeros_like(value) if torchs is None else torchs
        )


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_only_where_asked(device: str) -> None:
    token_ids, table, rows, row_index = case("odd", torch.float32, device)
    rows.requires_grad_()
    embed_inject(token_ids, table, rows, row_index).sum().backward()
    counts = torch.bincount(row_index[row_index >= 0].long(), minlength=5)
    assert torch.equal(rows.grad, counts[:, None].expand(5, 13).float())
    assert table.grad is None
    table.requires_grad_()
    out = embed_inject(token_ids, table, rows.detach(), row_index)
    (only,) = torch.autograd.grad(out.sum(), [table])
    counts = torch.bincount(token_ids[row_index < 0], minlength=11)
    assert torch.equal(only, counts[:, None].expand(11, 13).float())
    assert not embed_inject(token_ids, table.detach(), rows.detach(), row_index).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_gradcheck(device: str) -> None:
    token_ids, table, rows, row_index = case("odd", torch.float64, device)
    table.requires_grad_()
    rows.requires_grad_()
    grad = torch.randn(3, 7, 13, dtype=torch.float64, device=device, requires_grad=True)
    for fn, inputs in (
        (lambda t, r: embed_inject(token_ids, t, r, row_index), (table, rows)),
        (lambda r: gather_rows(r, row_index), (rows,)),
        (lambda g: scatter_rows(g, row_index, 5), (grad,)),
    ):
        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_public_functions_and_ops_have_the_same_gradients(device: str) -> None:
    """The public functions go around the code that torch.library generates, but not under a transform."""
    token_ids, table, rows, row_index = case("odd", torch.float32, device)

    def through(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda r: fn(token_ids, table, r, row_index).square().sum()

    op = torch.ops.collm_fast.embed_inject
    right = torch.autograd.grad(through(op)(rows.requires_grad_()), rows)[0]
    assert torch.equal(torch.autograd.grad(through(embed_inject)(rows), rows)[0], right)
    ids = token_ids.clamp_min(0)
    assert torch.equal(torch.vmap(lambda row: gather_rows(table, row))(ids), table[ids])
    with torch.no_grad():
        assert not embed_inject(token_ids, table, rows, row_index).requires_grad
    assert not gather_rows(table, ids).requires_grad


# --- the contract with torch -------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["odd", "no tokens", "no rows"])
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    token_ids, table, rows, row_index = case(name, dtype, device)
    table.requires_grad_()
    rows.requires_grad_()
    grad = torch.randn(*token_ids.shape, table.shape[1]).to(device, dtype).requires_grad_()
    ops = torch.ops.collm_fast
    torch.library.opcheck(ops.embed_inject.default, (token_ids, table, rows, row_index))
    torch.library.opcheck(ops.gather_rows.default, (rows, row_index))
    torch.library.opcheck(ops.scatter_rows.default, (grad, row_index.long(), rows.shape[0]))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_transposed_inputs(device: str) -> None:
    """The strides of a result are those of the fake, whatever the strides of the indices."""
    token_ids, table, rows, row_index = case("odd", torch.float32, device)
    token_ids, row_index = token_ids.T.contiguous().T, row_index.T.contiguous().T
    ops = torch.ops.collm_fast
    torch.library.opcheck(ops.embed_inject.default, (token_ids, table, rows, row_index))
    torch.library.opcheck(ops.gather_rows.default, (rows, row_index))
    assert embed_inject(token_ids, table, rows, row_index).is_contiguous()
    assert gather_rows(rows.T.contiguous().T, row_index).is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_dynamic_shapes(device: str) -> None:
    def step(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
        return embed_inject(token_ids, table, rows * 2, row_index).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("odd", "three dimensions", "odd"):
        token_ids, table, rows, row_index = case(name, torch.float32, device)
        rows.requires_grad_()
        got = torch.autograd.grad(compiled(token_ids, table, rows, row_index), rows)[0]
        right = torch.autograd.grad(step(token_ids, table, rows, row_index), rows)[0]
        assert torch.equal(got, right)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_inductor(device: str) -> None:
    inputs = case("odd", torch.float32, device)
    compiled = torch.compile(lambda i, t, r, w: (embed_inject(i, t, r, w), gather_rows(r, w)), fullgraph=True)
    out, rows = compiled(*inputs)
    assert torch.equal(out, embed_inject(*inputs)) and torch.equal(rows, gather_rows(*inputs[2:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_the_rows_alone(table_dtype: torch.dtype, device: str) -> None:
    token_ids, table, rows, row_index = case("odd", table_dtype, device)
    mapper = torch.nn.Linear(13, 13, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        mapped = mapper(rows.float())
        assert mapped.dtype == torch.bfloat16
        out = embed_inject(token_ids, table, mapped, row_index)
    assert out.dtype == table_dtype
    assert torch.equal(out, reference.embed_inject(token_ids, table, mapped.to(table_dtype), row_index))
    out.sum().backward()
    assert mapper.weight.grad is not None and bool(mapper.weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, device: str) -> None:
    grad, index = torch.randn(4000, 64).to(device, dtype), torch.randint(-1, 300, (4000,), device=device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(scatter_rows(grad, index, 300))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0].view(torch.uint8), other.view(torch.uint8)) for other in results[1:])


_BITS = """
import hashlib, torch
from collm_fast.ops import gather_rows, scatter_rows
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for H in (1, 7, 20, 33, 64, 200):
        grad, index = torch.randn(700, H).to(dtype), torch.randint(-1, 40, (700,))
        index[::2] = 3
        for grads in (grad, grad.T.contiguous().T):
            digest.update(scatter_rows(grads, index, 41).view(torch.uint8).numpy().tobytes())
        digest.update(gather_rows(grad[:40], index).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@requires("native")
def test_same_bits_for_any_instruction_set() -> None:
    if in_child():
        return

    def digest(simd: str) -> str:
        environment = {**os.environ, "COLLM_FAST_SIMD": simd}
        command = [sys.executable, "-c", _BITS]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert len({digest(""), digest("avx2"), digest("baseline")}) == 1


# --- errors ------------------------------------------------------------------------------------------------------
IDS, WHERE = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -1, dtype=torch.int32)
TABLE, ROWS, GRAD = torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(2, 3, 8)
BAD_IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])
INJECT_ERRORS = [
    ((IDS.int(), TABLE, ROWS, WHERE), "token_ids of dtype int64, got int32"),
    ((IDS, TABLE, ROWS, WHERE.long()), "row_index of dtype int32, got int64"),
    ((IDS, TABLE, ROWS, WHERE[:, :2]), "row_index of token_ids' shape [2, 3], got [2, 2]"),
    ((IDS, TABLE[0], ROWS, WHERE), "table of shape [V, H], got [8]"),
    ((IDS, TABLE, ROWS[0], WHERE), "rows of shape [S, H], got [8]"),
    ((IDS, TABLE, ROWS[:, :7], WHERE), "rows of the table's 8 columns, got 7"),
    ((IDS, TABLE.int(), ROWS.int(), WHERE), "table of dtype float32, bfloat16, float16 or float64, got int32"),
    ((IDS, TABLE, ROWS.bfloat16(), WHERE), "rows of the table's dtype float32, got bfloat16"),
    ((IDS, TABLE, ROWS, WHERE + 3), "row_index in [-1, 2), got 2"),
    ((IDS, TABLE, ROWS[:0], WHERE + 1), "row_index in [-1, 0), got 0"),
    ((IDS, TABLE, ROWS, WHERE - 1), "row_index in [-1, 2), got -2"),
    ((BAD_IDS, TABLE, ROWS, WHERE), "token_ids in [0, 4), got 4"),
    ((IDS - 1, TABLE, ROWS, WHERE), "token_ids in [0, 4), got -1"),
]
GATHER_ERRORS = [
    ((TABLE, IDS.float()), "index of dtype int32 or int64, got float32"),
    ((TABLE[0], IDS), "table of shape [V, H], got [8]"),
    ((TABLE.long(), IDS), "table of dtype float32, bfloat16, float16 or float64, got int64"),
    ((TABLE, BAD_IDS.int()), "index in [-1, 4), got 4"),
    ((TABLE, IDS - 2), "index in [-1, 4), got -2"),
]
SCATTER_ERRORS = [
    ((GRAD, IDS.short(), 4), "index of dtype int32 or int64, got int16"),
    ((GRAD[0], IDS, 4), "grad of index's shape [2, 3] and one more dimension, got [3, 8]"),
    ((GRAD[:, :2], IDS, 4), "grad of index's shape [2, 3] and one more dimension, got [2, 2, 8]"),
    ((GRAD.bool(), IDS, 4), "grad of dtype float32, bfloat16, float16 or float64, got bool"),
    ((GRAD, IDS, -1), "num_rows in [0, 2^31), got -1"),
    ((GRAD, IDS, 2**62), "num_rows in [0, 2^31), got 4611686018427387904"),
    ((GRAD.to(torch.complex64), IDS, 4), "grad of dtype float32, bfloat16, float16 or float64, got complex64"),
    ((GRAD.to(torch.float8_e5m2), IDS, 4), "grad of dtype float32, bfloat16, float16 or float64, got float8_e5m2"),
    ((GRAD, BAD_IDS, 4), "index in [-1, 4), got 4"),
    ((GRAD, IDS, 0), "index in [-1, 0), got 0"),
    ((GRAD, IDS - 2, 4), "index in [-1, 4), got -2"),
]
ERRORS = [
    *((embed_inject, arguments, "embed_inject: expected " + message) for arguments, message in INJECT_ERRORS),
    *((gather_rows, arguments, "gather_rows: expected " + message) for arguments, message in GATHER_ERRORS),
    *((scatter_rows, arguments, "scatter_rows: expected " + message) for arguments, message in SCATTER_ERRORS),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "arguments", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_error(op: Callable[..., Tensor], arguments: tuple[object, ...], message: str, device: str) -> None:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(ValueError) as raised:
        op(*moved)
        check_device_errors(synchronize=True)  # a GPU reports values later
    assert str(raised.value).split("\n")[0] == message


@pytest.mark.parametrize(("op", "arguments", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_fake_error(op: Callable[..., Tensor], arguments: tuple[object, ...], message: str) -> None:
    """The fake knows shapes and dtypes, and says the same; it knows no values."""
    moved = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    if " in [" in message and "num_rows" not in message:
        assert op(*moved).device.type == "meta"
        return
    with pytest.raises(ValueError) as raised:
        op(*moved)
    assert str(raised.value).split("\n")[0] == message


@requires("cuda")
@pytest.mark.parametrize("far", [2**31 - 1, -(2**31)])
def test_cuda_reads_nothing_out_of_range(far: int) -> None:
    token_ids, table, rows, row_index = case("odd", torch.float32, "cuda")
    row_index[0, 0] = far
    out = embed_inject(token_ids, table, rows, row_index)
    with pytest.raises(ValueError, match="embed_inject: expected row_index in"):
        check_device_errors(synchronize=True)
    assert not out[0, 0].any()
    row_index[0, 0] = 0
    assert torch.equal(
        embed_inject(token_ids, table, rows, row_index), reference.embed_inject(token_ids, table, rows, row_index)
    )
    check_device_errors(synchronize=True)


@requires("cuda")
def test_cuda_tensors_on_two_devices_error() -> None:
    with pytest.raises(ValueError, match="embed_inject: expected rows on table's device cuda:0, got cpu"):
        embed_inject(IDS.cuda(), TABLE.cuda(), ROWS, WHERE.cuda())


@requires("cuda")
def test_cuda_rows_beyond_32_bits() -> None:
    """Offsets that pass 2^31 elements, in the table and in the output."""
    table = torch.zeros(70_000, 32_768, dtype=torch.bfloat16, device="cuda")
    table[-1] = 1
    ids = torch.full((70_000,), 69_999, device="cuda")
    out = gather_rows(table, ids)
    assert bool((out[-1] == 1).all()) and bool((out[65_536] == 1).all())


# --- the other backends ------------------------------------------------------------------------------------------
@requires("triton")
def test_triton_in_the_interpreter() -> None:
    if in_child():
        return
    # The interpreter rounds bfloat16 sums wrongly (a copy moves bits), and needs milliseconds for each program.
    keyword = "(forward or gradients or test_error) and (not bfloat16 or embed_inject_forward)"
    assert run_with_backend("triton", __file__, keyword + " and not gradcheck and not many_rows and not 1000") > 100


def test_reference_backend() -> None:
    if in_child():
        return
    assert run_with_backend("reference", __file__, "forward or gradients or error or autocast or transposed") > 100


def test_the_backend_is_the_one_asked_for() -> None:
    served = _native.backends["embed_inject"]["cpu"]
    asked = _native.BACKEND
    assert served == (asked if asked != "auto" else served)
    assert served in ("native", "reference", "triton")


@requires("triton")
def test_triton_launches_on_the_device_of_its_tensors_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.BACKEND != "triton":
        return
    from collm_fast.kernels import inject

    guarded: list[Tensor] = []
    monkeypatch.setattr(inject, "on", lambda tensor: guarded.append(tensor) or nullcontext())
    token_ids, table, rows, row_index = case("odd", torch.float32, "cpu")
    embed_inject(token_ids, table, rows, row_index)
    gather_rows(rows, row_index)
    grad = torch.randn(3, 7, 13)
    scatter_rows(grad, row_index, 5)
    assert [tensor.data_ptr() for tensor in guarded] == [tensor.data_ptr() for tensor in (table, rows, grad)]


@requires("triton")
@pytest.mark.parametrize("name", ["embed_inject_kernel", "gather_rows_kernel", "scatter_rows_kernel"])
@pytest.mark.parametrize("bits", ["i16", "i32", "i64"])
def test_triton_compiles_for_hopper(name: str, bits: str) -> None:
    if in_child():
        return
    from collm_fast.kernels import inject
    from triton_aot import compile_for_hopper

    floats = {"i16": "bf16", "i32": "fp32", "i64": "fp64"}
    import triton.language as tl

    pointers = {"out": bits, "table": bits, "rows": bits, "token_ids": "i64", "row_index": "i32", "index": "i64"}
    pointers |= {"token_record": "i64", "row_record": "i64", "record": "i64"}
    constants = {"BLOCK_H": 1024}
    if name == "scatter_rows_kernel":
        pointers |= {"out": floats[bits], "grad": floats[bits], "order": "i64", "ordered_index": "i64", "begin": "i64"}
        constants["SUM"] = tl.float64 if bits == "i64" else tl.float32
    kernel = getattr(inject, name)
    signature = {argument: "i64" for argument in kernel.arg_names if argument not in constants}
    signature |= {argument: f"*{kind}" for argument, kind in pointers.items() if argument in signature}
    code = compile_for_hopper(kernel, signature, constants)
    assert code.spills == 0 and code.registers <= 128

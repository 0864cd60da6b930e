"""Runs the CPU kernels on memory that ends, and then begins, at a page that nobody may touch; says where one did.

Run by test_guard_pages.py, in a process of its own:

    LD_PRELOAD=guard_malloc.so python tests/ops/guarded.py

An operand lies in pages of its own and ends with the last byte before a forbidden page; what a kernel asks for, its
results and working memory, comes from guard_malloc.cpp. Each family of kernels runs in a fork of this process for each
instruction set, so a fault ends that fork alone. One line of JSON: {"lora avx2": {"cases": 96, "fault": null}, ...},
where a fault is the name of the case and what ended it. The values must be those on ordinary memory, too.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from collm_fast.graph import BipartiteGraph
from collm_fast.ops import attention as _attention  # noqa: F401  (these register ops)
from collm_fast.ops import decoder as _decoder  # noqa: F401
from collm_fast.ops import layer as _layer  # noqa: F401

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
ops = torch.ops.collm_fast
DTYPES = (torch.float32, torch.bfloat16)
SIMD = ("best", "avx512", "avx2", "baseline")
# (name, operands, the kernel's results from them); an operand that is no tensor is handed on as it is.
Case = tuple[str, list[object], Callable[..., object]]

_libc = ctypes.CDLL(None, use_errno=True)
_pages: list[mmap.mmap] = []  # as long as the process: a tensor does not own them


def fenced(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A copy at the same strides whose memory ends (or begins) at a page that nobody may touch."""
    if tensor.numel() == 0:
        return tensor
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size, page = elements * tensor.element_size(), mmap.PAGESIZE
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    _pages.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (begin, begin + page + inner):
        if _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (inner - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=elements, offset=offset)
    flat.copy_(tensor.as_strided((elements,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


# --- the kernels -------------------------------------------------------------------------------------------------
def apart(tensor: Tensor, gap: int) -> Tensor:
    """The same rows, `gap` elements apart."""
    wide = torch.zeros(tensor.shape[0], tensor.shape[1] + gap, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def lora() -> Iterator[Case]:
    sizes = [(16, 16, 8), (45, 37, 5), (100, 70, 17), (64, 96, 8), (33, 130, 64), (1, 1, 1)]
    for dtype, M, (K, N, r), p in itertools.product(DTYPES, (1, 31, 33, 257), sizes, (0.0, 0.25)):
        x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        weight, bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
        A, B = torch.randn(r, K), torch.randn(N, r)
        if p > 0:  # the other order in memory, rows that are apart, and no bias
            x, grad, weight, bias = apart(x, 7), apart(grad, 32), weight.T.contiguous().T, None
            A, B = A.to(dtype), B.to(dtype)
        seed, name = torch.tensor([5]), f"{dtype} M={M} K={K} N={N} r={r} p={p}"

        def forward(*args: object, p: float = p, seed: Tensor = seed) -> object:
            return ops.lora_linear(*args, 0.5, p, seed, 1)

        def backward(*args: object, p: float = p, seed: Tensor = seed) -> object:
            return ops.lora_linear_backward(*args, 0.5, p, seed, 1, [True, True, True])

        inputs = [x, weight, bias, A, B]
        yield f"forward {name}", inputs, forward
        yield f"backward {name}", [grad, x, weight, A, B, forward(*inputs)[1]], backward  # type: ignore[index]


def lora_group() -> Iterator[Case]:
    # N and r; the second in several products.
    shapes = ([(33, 5), (31, 0), (49, 17)], [(64, 0), (961, 8), (64, 8)], [(7, 3), (16, 16)])
    for dtype, M, shape, p in itertools.product(DTYPES, (1, 31, 257, 300), shapes, (0.0, 0.25)):
        K, count = 45, len(shape)
        x, absent = torch.randn(M, K).to(dtype), torch.zeros(())
        weights, biases = [torch.randn(N, K).to(dtype) for N, _ in shape], [absent, torch.randn(shape[1][0]).to(dtype)]
        As = [torch.randn(r, K) if r else absent for _, r in shape]
        Bs = [torch.randn(N, r) if r else absent for N, r in shape]
        grads, seeds = [torch.randn(M, N).to(dtype) for N, _ in shape], [torch.tensor([j]) for j in range(count)]
        if p > 0:  # the other order in memory, and rows that are apart
            x, grads, weights = apart(x, 7), [apart(g, 32) for g in grads], [w.T.contiguous().T for w in weights]
        biases = [*biases, *[absent] * (count - 2)]
        streams, wanted = list(range(count)), [r > 0 for _, r in shape]

        def forward(*flat: Tensor, p: float = p, n: int = count, streams: list[int] = streams) -> object:
            x, *lists = flat
            parts = [list(lists[i * n : (i + 1) * n]) for i in range(5)]
            return sum(ops.lora_linear_group(x, *parts[:4], 0.5, p, parts[4], streams), [])

        def backward(
            *flat: Tensor, p: float = p, n: int = count, streams: list[int] = streams, wanted: list[bool] = wanted
        ) -> object:
            x, *lists = flat
            grads, weights, As, Bs, ss, seeds = (list(lists[i * n : (i + 1) * n]) for i in range(6))
            rest = 0.5, p, seeds, streams, True, wanted, wanted
            dx, dAs, dBs = ops.lora_linear_group_backward(grads, x, weights, As, Bs, ss, *rest)
            return [dx, *dAs, *dBs]

        name = f"{dtype} M={M} {shape} p={p}"
        inputs = [x, *weights, *biases, *As, *Bs, *seeds]
        yield f"forward {name}", inputs, forward
        ss = forward(*inputs)[count:]  # type: ignore[index]
        yield f"backward {name}", [x, *grads, *weights, *As, *Bs, *ss, *seeds], backward


def path_attention() -> Iterator[Case]:
    from test_attention import SHAPES, TREES, operands, tables

    for dtype, shape, name in itertools.product(DTYPES, SHAPES, TREES):
        inputs, past, grad = operands(name, shape, dtype)
        given, plan = [*inputs, *(past or (None, None))], [*tables(name), 0.2, 9]
        sums = ops.path_attention(*given, *plan)[1]
        yield f"forward {name}, {shape}, {dtype}", [*given, *plan], ops.path_attention
        yield f"backward {name}, {shape}, {dtype}", [grad, *given, sums, *plan], ops.path_attention_backward


def inject() -> Iterator[Case]:
    for dtype, H, places in itertools.product(DTYPES, (1, 7, 13, 33, 64, 65, 577), (1, 31, 200)):
        ids, where = torch.randint(0, 11, (places,)), torch.randint(-1, 5, (places,), dtype=torch.int32)
        table, rows, grad = torch.randn(11, H).to(dtype), torch.randn(5, H).to(dtype), torch.randn(places, H).to(dtype)
        name = f"{dtype} H={H} places={places}"
        yield f"embed_inject {name}", [ids, table, rows, where], ops.embed_inject
        yield f"embed_inject, columns apart, {name}", [ids, table.T.contiguous().T, rows, where], ops.embed_inject
        yield f"gather_rows {name}", [rows, where.long()], ops.gather_rows
        yield f"scatter_rows {name}", [grad, where, 5], ops.scatter_rows
        yield f"scatter_rows, columns apart, {name}", [grad.T.contiguous().T, where, 5], ops.scatter_rows


def decoder() -> Iterator[Case]:
    for dtype, size in itertools.product((*DTYPES, torch.float16, torch.float64), (1, 2, 31, 33, 64, 257)):
        x, y, z = (torch.randn(5, size).to(dtype) for _ in range(3))
        name, weight = f"{dtype} size={size}", torch.randn(size).to(dtype)
        scale = ops.rms_norm(x, weight, 1e-5)[1]
        yield f"rms_norm {name}", [x, weight, 1e-5], ops.rms_norm
        yield f"rms_norm_backward {name}", [y, x, weight, scale, z], ops.rms_norm_backward
        if dtype in (torch.bfloat16, torch.float16):  # what is normed may be wider than the weight
            wide, scale = x.float(), ops.rms_norm(x.float(), weight, 1e-5)[1]
            yield f"rms_norm of float32 {name}", [wide, weight, 1e-5], ops.rms_norm
            yield f"its backward {name}", [y, wide, weight, scale, z.float()], ops.rms_norm_backward
        yield f"swiglu {name}", [x, y], ops.swiglu
        yield f"swiglu_backward {name}", [z, x, y], ops.swiglu_backward
        heads, cos, sin = (torch.randn(5, n * size).to(dtype) for n in (6, 2, 2))
        yield f"rotate_heads {name}", [heads, cos, sin], ops.rotate_heads
        grad = torch.randn(3, 5, 2 * size).to(dtype)
        yield f"rotate_heads_backward {name}", [grad, cos, sin], ops.rotate_heads_backward


def propagate() -> Iterator[Case]:
    users, items = torch.randint(0, 60, (900,)), torch.randint(0, 37, (900,))
    graphs = {
        "small": BipartiteGraph.from_interactions([0, 1, 2, 0], [0, 1, 1, 2], 4, 3),
        "dense": BipartiteGraph.from_interactions(users, items, 60, 37),
        "hub": BipartiteGraph.from_interactions(torch.arange(2100), torch.zeros(2100, dtype=torch.int64), 2100, 1),
    }
    widths = {"small": (1, 3, 8, 21, 33, 64, 130, 300), "dense": (7, 31, 129), "hub": (5,)}
    for key, graph in graphs.items():
        N, tail = graph.num_nodes, [graph.crow, graph.col, graph.inv_sqrt_degree]
        rows, seed = torch.tensor([N - 1, 0, N - 1, 2]), torch.tensor([3])
        for D, dtype, storage in itertools.product(widths[key], DTYPES, (None, torch.bfloat16)):
            x, grad = torch.randn(N, D).to(dtype), torch.randn(4, D).to(dtype)
            for given, p in ((None, 0.0), (rows, 0.0), (None, 0.3)):
                options = [3, storage, given, p, seed if p > 0 else None]
                name = f"{key} D={D} {dtype} storage={storage} rows={given is not None} p={p}"
                yield f"forward {name}", [x, *tail, *options], ops.lightgcn_propagate
                if given is not None:
                    yield f"backward {name}", [grad, *tail, *options], ops.lightgcn_propagate_backward
            out = torch.empty(N, D, dtype=storage or dtype)

            def layer(out: Tensor, *args: object) -> Tensor:
                ops.lightgcn_layer(out, *args)
                return out

            table = layer(torch.empty_like(out), None, x, *tail, None, None, None)
            for mean in (None, 0.25):
                yield f"layer {key} D={D} {dtype} mean={mean}", [out, table, x, *tail, mean, None, None], layer


def control() -> Iterator[Case]:
    """What must be caught, or the pages guard nothing: each case ends its process."""
    fault = os.environ["COLLM_FAST_TEST_FAULT"]

    def read(x: Tensor) -> None:
        ctypes.string_at(x.data_ptr() + (x.nbytes if fault == "read behind an operand" else -1), 1)

    def write(x: Tensor) -> None:
        out = torch.empty(5)
        ctypes.memset(out.data_ptr() + (out.nbytes if fault == "write behind a result" else -1), 0, 1)

    def again(x: Tensor) -> None:
        address = torch.empty(5).data_ptr()
        ctypes.string_at(address, 1)

    kinds = {"read": read, "write": write, "use": again}
    yield fault, [torch.ones(3)], kinds[fault.split()[0]]


FAULTS = (
    "read behind an operand",
    "read before an operand",
    "write behind a result",
    "write before a result",
    "use of what was given back",
)
FAMILIES = {f.__name__: f for f in (lora, lora_group, path_attention, inject, decoder, propagate)}


# --- one fork ----------------------------------------------------------------------------------------------------
def tensors(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result] if isinstance(result, Tensor) else []


def same(got: Tensor, right: Tensor) -> bool:
    """The vendor's product may choose another order of its sums for another address."""
    if got.shape != right.shape or got.dtype != right.dtype:
        return False
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(got.dtype, 1e-2)
    a, b = got.double(), right.double()
    return torch.equal(got, right) or float((a - b).norm()) <= limit * float(b.norm())


def run_cases(cases: Iterator[Case], tell: Callable[[str], None]) -> None:
    for name, operands, function in cases:
        tell(f"{name}, ordinary memory")
        right = [t.clone() for t in tensors(function(*operands))]
        for at_end in (True, False):
            place = "ends" if at_end else "begins"
            tell(f"{name}, memory that {place} at the page")
            moved = [fenced(a, at_end) if isinstance(a, Tensor) else a for a in operands]
            got = tensors(function(*moved))
            for g, r in zip(got, right, strict=True):
                if not same(g, r):
                    raise AssertionError(f"other values than on ordinary memory: {g}, expected {r}")
            del got, moved  # what the results' memory holds around them is looked at now
        tell("")


def fork(cases: Callable[[], Iterator[Case]], simd: str, fault: str = "") -> dict[str, object]:
    """Runs cases in a fork under one instruction set, which is chosen when the first kernel is called."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.environ |= {"COLLM_FAST_SIMD": "" if simd == "best" else simd, "COLLM_FAST_TEST_FAULT": fault}
        code = 1

        def tell(line: str) -> None:
            os.write(writing, (line + "\n").encode())

        try:
            torch.manual_seed(0)
            run_cases(cases(), tell)
            code = 0
        except BaseException as error:  # a fork must not go on as if it were its parent
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().split("\n")[:-1]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    end = "an exception" if status > 0 else signal.Signals(-status).name if status < 0 else ""
    named = next((line for line in reversed(lines) if line), "the start")
    # Between two cases the operands of the next one are made, by kernels too.
    where = named if lines and lines[-1] else f"what is made ready after {named}"
    return {"cases": lines.count(""), "fault": f"{end} in {where}" if end else None}


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    found = {f"{name} {simd}": fork(FAMILIES[name], simd) for name, simd in itertools.product(FAMILIES, SIMD)}
    found |= {fault: fork(control, "best", fault) for fault in FAULTS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

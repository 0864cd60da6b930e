"""What the machine can do: timed samples, fixed kernels of torch, and the floor they set for a case.

Here: `sample`, `measure_ceilings`, `gather_rate`, `Work`, `floor_seconds`. Not here: the cases (`bench_<family>.py`)
and the order in which they run (`harness.py`).
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BAG = 32  # rows summed into one by the gather ceilings


@dataclass(frozen=True)
class Table:
    """What a gather reads rows of: [rows, columns] of a dtype."""

    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Work:
    """The least any implementation must do; `floor_s` is the slowest of these at the machine's measured ceilings.

    bytes: streamed in order (read + written); flops: multiply and add count two, in the case's dtype;
    gathered: bytes of rows read in random order out of `table`.
    """

    bytes: float = 0.0
    flops: float = 0.0
    gathered: float = 0.0
    table: Table | None = None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sample(
    fn: Callable[[], object], repeats: int, device: torch.device, flush: Tensor | None = None
) -> tuple[float, float]:
    """Wall seconds and processor seconds of one call, mean of `repeats`; `flush` is overwritten before."""
    if flush is not None:
        flush.zero_()
    if device.type != "cuda":
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            fn()
        return (time.perf_counter() - start) / repeats, (time.process_time() - cpu) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    begin.record()
    for _ in range(repeats):
        fn()
    end.record()
    cpu = time.process_time() - cpu  # before the wait: the host's own work to launch
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / repeats, cpu / repeats


def best(fn: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    """Seconds of one call in the fastest of `rounds` samples: processor time on one thread, else wall time."""
    serial = device.type == "cpu" and torch.get_num_threads() == 1
    sample(fn, 1, device)
    repeats = max(1, min(100, math.ceil(1e-3 / max(sample(fn, 1, device)[0], 1e-7))))
    return max(min(sample(fn, repeats, device)[serial] for _ in range(rounds)), 1e-9)


def _on_huge_pages(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Ones in 2 MiB pages where the system grants them: fewer misses of the address translation."""
    size = shape[0] * shape[1] * dtype.itemsize
    memory = mmap.mmap(-1, -(-size // (2 << 20)) * (2 << 20))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=shape[0] * shape[1]).view(shape).fill_(1)


def gather_rate(table: Table, device: torch.device, *, quick: bool = False) -> float:
    """Bytes per second of summing 32 uniformly random rows of such a table into one, the best that torch reaches.

    The kernel is `torch.nn.functional.embedding_bag` (FBGEMM's on x86: vectorised, prefetching) with int32 indices. On
    a CPU the table lies in ordinary and in huge pages, and the faster counts: ours may use either. On a GPU, where a
    table beyond the L2 is limited by the memory, it is at least the rate of a copy of that size.
    """
    shape = (max(table.rows, 1), table.columns)
    bags = max(1, ((1 << 30 if device.type == "cuda" else 1 << 27) >> (3 if quick else 0)) // (BAG * table.row_bytes))
    index = torch.randint(0, shape[0], (bags, BAG), generator=torch.Generator().manual_seed(1)).to(device, torch.int32)

    def rate(weight: Tensor) -> float:
        rounds = 3 if quick else 9
        seconds = best(lambda: torch.nn.functional.embedding_bag(index, weight, mode="sum"), device, rounds)
        return index.numel() * table.row_bytes / seconds

    plain = torch.ones(shape, dtype=table.dtype, device=device)
    if device.type == "cuda":
        copy = 2 * plain.nbytes / best(lambda: torch.empty_like(plain).copy_(plain), device)
        return max(rate(plain), copy)
    return max(rate(plain), rate(_on_huge_pages(shape, table.dtype)))


def measure_ceilings(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """What this machine reaches in three fixed kernels of torch: copy, gather-sum by table size, GEMM.

    copy_bytes_per_s:   {bytes read + written: rate}.
    gather_bytes_per_s: {table bytes: rate}; `gather_rate` of tables of 64 float32 columns.
    gemm_flops_per_s:   {dtype: rate}; square on a GPU, [2560, 576] x [576, 576] (SmolLM2's) on a CPU.
    table_bytes_per_s:  {table: rate}; `gather_rate` of the tables of the cases, added as they run.
    """
    big = device.type == "cuda"
    sizes = (1, 8, 64) if quick else (1, 8, 64, 512)  # MiB

    def copy(mebibytes: int) -> float:
        source = torch.ones(mebibytes << 17, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source), device)

    def gather(mebibytes: int) -> float:
        return gather_rate(Table(mebibytes << 12, 64, torch.float32), device, quick=quick)

    def gemm(dtype: torch.dtype) -> float:
        m, n = (8192, 8192) if big else (2560, 576)
        a, b = torch.ones(m, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
        return 2 * m * n * n / best(lambda: a @ b, device)

    dtypes = (torch.float32, torch.bfloat16, *((torch.float16,) if big else ()))
    return {
        "copy_bytes_per_s": {str(size << 20): copy(size) for size in sizes},
        "gather_bytes_per_s": {str(size << 20): gather(size) for size in sizes},
        "gemm_flops_per_s": {dtype_name(dtype): gemm(dtype) for dtype in dtypes},
        "table_bytes_per_s": {},
    }


def _nearest(rates: Mapping[str, float], size: float) -> float:
    """The rate measured at the size nearest to this one (by ratio)."""
    return rates[min(rates, key=lambda measured: abs(math.log(int(measured) / max(size, 1.0))))]


def floor_seconds(work: Work, ceilings: Mapping[str, Any], dtype: torch.dtype) -> float | None:
    """The slowest of the case's needs at the measured ceilings; None where there are no ceilings."""
    if not ceilings:
        return None
    seconds = work.bytes / _nearest(ceilings["copy_bytes_per_s"], work.bytes)
    if work.flops:
        rates = ceilings["gemm_flops_per_s"]
        seconds = max(seconds, work.flops / rates.get(dtype_name(dtype), rates["float32"]))
    if work.table is not None:
        seconds = max(seconds, work.gathered / ceilings["table_bytes_per_s"][str(work.table)])
    return seconds

"""What the machine can do: timed samples, three fixed kernels, and the floor they set for a case.

Here: `sample`, `measure_ceilings`, `Work`, `floor_seconds`. Not here: the cases (`bench_<family>.py`) and the order in
which they run (`harness.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """The least any implementation must do; `floor_s` is the slowest of these at the machine's measured ceilings.

    bytes: streamed in order (read + written); flops: multiply and add count two, in the case's dtype;
    gathered: bytes of rows read in random order out of a table of `table` bytes.
    """

    bytes: float = 0.0
    flops: float = 0.0
    gathered: float = 0.0
    table: float = 0.0


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


def measure_ceilings(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """What this machine reaches in three fixed kernels of torch: copy, gather-sum by table size, GEMM.

    copy_bytes_per_s:   {bytes read + written: rate}.
    gather_bytes_per_s: {table bytes: rate}; embedding_bag sums 32 random float32 rows of 64 columns into one.
    gemm_flops_per_s:   {dtype: rate}; square on a GPU, [2560, 576] x [576, 576] (SmolLM2's) on a CPU.
    """
    big, rounds = device.type == "cuda", 9
    sizes = (1, 8, 64) if quick else (1, 8, 64, 512)  # MiB

    def best(fn: Callable[[], object]) -> float:
        sample(fn, 2, device)
        repeats = max(1, min(100, math.ceil(1e-3 / max(sample(fn, 1, device)[0], 1e-7))))
        return min(sample(fn, repeats, device)[0] for _ in range(rounds))

    def copy(mebibytes: int) -> float:
        source = torch.ones(mebibytes << 17, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source))

    def gather(mebibytes: int) -> float:
        table = torch.ones(mebibytes << 12, 64, device=device)
        bags = (1 << 19 if big else 1 << 14) >> (1 if quick else 0)
        generator = torch.Generator().manual_seed(1)
        index = torch.randint(0, len(table), (bags, 32), generator=generator).to(device, torch.int32)
        return 256 * index.numel() / best(lambda: torch.nn.functional.embedding_bag(index, table, mode="sum"))

    def gemm(dtype: torch.dtype) -> float:
        m, n = (8192, 8192) if big else (2560, 576)
        a, b = torch.ones(m, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
        return 2 * m * n * n / best(lambda: a @ b)

    dtypes = (torch.float32, torch.bfloat16, *((torch.float16,) if big else ()))
    return {
        "copy_bytes_per_s": {str(size << 20): copy(size) for size in sizes},
        "gather_bytes_per_s": {str(size << 20): gather(size) for size in sizes},
        "gemm_flops_per_s": {dtype_name(dtype): gemm(dtype) for dtype in dtypes},
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
    if work.gathered:
        seconds = max(seconds, work.gathered / _nearest(ceilings["gather_bytes_per_s"], work.table))
    return seconds

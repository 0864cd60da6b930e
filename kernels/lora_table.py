"""Launch configurations of the Triton kernels of lora_linear: tile sizes, warps and stages; data and its lookup.

What is measured on a GPU stands in MEASURED, written by benchmarks/tune_lora.py; everything else takes DEFAULT. The
kernels and their launchers are lora.py. A configuration decides how fast a result comes, and which of its last bits are
rounded how, never how the rows are cut into parts: the same call on the same GPU gives the same bits. Imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = ("project", "expand", "outer")
# Ranks and columns are looked up by the first of these that is not below them; larger ones by the last.
RANKS = (16, 256)
COLUMNS = (1024, 4096)


@dataclass(frozen=True)
class Launch:
    """One program takes BLOCK_M rows, BLOCK_C columns and RANK ranks of the problem, at a time."""

    BLOCK_M: int
    BLOCK_C: int
    RANK: int
    num_warps: int = 4
    num_stages: int = 3


# (capability, kernel, dtype, rank class, column class): capability 90 stands for sm_90.
Key = tuple[int, str, str, int, int]

# By rank class, for every kernel, dtype, width and GPU: tl.dot wants at least 16, and 32 ranks and more are taken 32 at
# a time, or registers spill. Chosen by what the compiler says for sm_90, not measured.
DEFAULT: dict[int, Launch] = {16: Launch(32, 64, 16), 256: Launch(16, 32, 32)}

MEASURED: dict[Key, Launch] = {
    # begin: written by benchmarks/tune_lora.py
    # No row was measured yet.
    # end
}


def class_of(size: int, classes: tuple[int, ...]) -> int:
    return next((bound for bound in classes if size <= bound), classes[-1])


def key_of(kernel: str, dtype: str, r: int, columns: int, capability: int) -> Key:
    """The row of MEASURED that would serve a call, whether there is one or not."""
    return capability, kernel, dtype, class_of(r, RANKS), class_of(columns, COLUMNS)


def launch_of(kernel: str, dtype: str, r: int, columns: int, capability: int) -> Launch:
    """The configuration of one launch.

    Args:
        kernel: project, expand or outer.
        dtype: torch's name of the type of the rows, without the prefix: bfloat16, float16, float32 or float64.
        r, columns: the rank, and the columns of the rows: K or N.
        capability: 10 major + minor of an NVIDIA GPU, 0 for any other device.
    """
    key = key_of(kernel, dtype, r, columns, capability)
    return MEASURED.get(key, DEFAULT[key[3]])

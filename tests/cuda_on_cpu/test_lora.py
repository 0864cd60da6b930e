"""The device code of csrc/cuda/lora.cuh on the host, under AddressSanitizer, against float64.

The dense products x W^T and dy W are the vendor's and are left out on both sides.
"""

from __future__ import annotations

import math

import emulation
import pytest
import torch

from collm_fast import reference

pytestmark = pytest.mark.skipif(not emulation.has_compiler(), reason="needs g++")
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.parametrize(
    ("M", "K", "N", "r", "dropout_p", "dtype", "factor_dtype", "gap"),
    [
        (1, 1, 1, 1, 0.0, torch.float32, torch.float32, 0),
        (37, 100, 61, 8, 0.05, torch.float32, torch.float32, 3),
        (19, 72, 1040, 17, 0.5, torch.float32, torch.float32, 0),
        (9, 1100, 8, 40, 0.1, torch.bfloat16, torch.float32, 0),
        (70, 64, 33, 8, 0.05, torch.bfloat16, torch.bfloat16, 4),
        (33, 24, 16, 3, 0.25, torch.float16, torch.float16, 0),
        (3, 16, 24, 256, 0.0, torch.float16, torch.float32, 0),
    ],
)
def test_low_rank_parts(
    M: int, K: int, N: int, r: int, dropout_p: float, dtype: torch.dtype, factor_dtype: torch.dtype, gap: int
) -> None:
    generator = torch.Generator().manual_seed(M + K)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    # Rows with a gap between them; the last row ends where the buffer ends.
    x = draw(M, K + gap).to(dtype)
    grad, bias = draw(M, N).to(dtype), draw(N).to(dtype)
    lora_A, lora_B = (draw(r, K) / math.sqrt(K)).to(factor_dtype), draw(N, r).to(factor_dtype)
    seed, stream, scaling = torch.tensor([-(2**61) - 12345]), 7, 1.75
    flat = x.reshape(-1)[: M * (K + gap) - gap]
    run = lambda order: emulation.run(  # noqa: E731
        emulation.build("lora_main.cpp"),
        {"x": flat, "grad": grad, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "seed": seed},
        {
            "s": ((M, r), torch.float32),
            "y": ((M, N), dtype),
            "dx": ((M, K), dtype),
            "dA": ((r, K), factor_dtype),
            "dB": ((N, r), factor_dtype),
        },
        mode=0,
        order=order,
        dtype=CODES[dtype],
        factor_dtype=CODES[factor_dtype],
        M=M,
        K=K,
        N=N,
        r=r,
        x_stride=K + gap,
        rows_per_part=16,
        scaling=scaling,
        dropout_p=dropout_p,
        stream=stream,
    )
    got = run(0)
    mask = reference.dropout_mask(seed, M, K, dropout_p, stream)
    dropped, g, A, B = mask * x[:, :K].double(), grad.double(), lora_A.double(), lora_B.double()
    ds = scaling * g @ B
    expected = {
        "s": dropped @ A.T,
        "y": bias.double() + scaling * (dropped @ A.T @ B.T),
        "dx": mask * (ds @ A),
        "dA": ds.T @ dropped,
        "dB": scaling * g.T @ (dropped @ A.T),
    }
    for name, value in expected.items():
        bound = ROUNDING[got[name].dtype]
        assert error(got[name], value) <= bound, name
    assert ((got["dx"] == 0) >= (mask == 0)).all()
    # A missing barrier would show when the threads run in the opposite order.
    for name, value in run(1).items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize(
    ("M", "K", "ranks", "split", "dropout_p", "dtype", "factor_dtype", "gap"),
    [
        (1, 1, (1,), 1, 0.0, torch.float32, torch.float32, 0),
        (37, 100, (8, 3), 2, 0.05, torch.float32, torch.float32, 3),
        (21, 1100, (8, 8, 8), 1, 0.3, torch.bfloat16, torch.float32, 0),
        (18, 72, (17, 1, 40, 8), 3, 0.5, torch.float32, torch.float32, 0),
        (9, 61, (2, 256, 5), 2, 0.1, torch.bfloat16, torch.bfloat16, 4),
    ],
)
def test_group(
    M: int,
    K: int,
    ranks: tuple[int, ...],
    split: int,
    dropout_p: float,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    gap: int,
) -> None:
    """s of several projections in one launch, each with its own mask; dx as their sum, in one launch or two."""
    generator = torch.Generator().manual_seed(M + K)
    x = torch.randn(M, K + gap, generator=generator).to(dtype)
    factors = [(torch.randn(r, K, generator=generator) / math.sqrt(K)).to(factor_dtype) for r in ranks]
    seed = torch.arange(len(ranks)) - 2**61
    inputs = {"x": x.reshape(-1)[: M * (K + gap) - gap], "seed": seed}
    inputs |= {f"lora_A{n}": factor for n, factor in enumerate(factors)}
    outputs = {f"s{n}": ((M, r), torch.float32) for n, r in enumerate(ranks)} | {"dx": ((M, K), dtype)}
    numbers = {f"r{n}": r for n, r in enumerate(ranks)} | {"count": len(ranks), "split": split}
    run = lambda order: emulation.run(  # noqa: E731
        emulation.build("lora_main.cpp"),
        inputs,
        outputs,
        mode=3,
        order=order,
        dtype=CODES[dtype],
        factor_dtype=CODES[factor_dtype],
        M=M,
        K=K,
        x_stride=K + gap,
        dropout_p=dropout_p,
        **numbers,
    )
    got, dx = run(0), torch.zeros(M, K, dtype=torch.float64)
    for n, factor in enumerate(factors):
        mask = reference.dropout_mask(seed[n], M, K, dropout_p, 2 * n + 1)
        s = mask * x[:, :K].double() @ factor.double().T
        assert error(got[f"s{n}"], s) <= 1e-6
        dx += (mask > 0) * (s @ factor.double())
    # Two launches round twice.
    assert error(got["dx"], dx) <= 1.5 * ROUNDING[dtype]
    for name, value in run(1).items():
        assert torch.equal(value, got[name]), name

"""One random stream everywhere: the same seed gives the same bits in NumPy, torch, C++, CUDA device code and Triton."""

from __future__ import annotations

import sys
from pathlib import Path

import backends
import numpy as np
import pytest
import torch
from conftest import requires

from collm_fast import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_on_cpu"))

# The known answers of Random123 1.14 (kat_vectors, philox4x32 10): key, counter, words.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, -1, 2**62 + 987654321, -(2**63)]
CASES = [(3, 8, 0.05, 0), (17, 61, 0.5, 1), (5, 256, 0.999, 2**32 - 1), (2, 1, 1 / 65536, 7)]


def philox_numpy(key: tuple[int, int], counter: np.ndarray) -> np.ndarray:
    """[..., 4] uint64 counters -> [..., 4] words; written from the paper, apart from reference.py."""
    c, k = [counter[..., i].astype(np.uint64) for i in range(4)], [np.uint64(key[0]), np.uint64(key[1])]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(right >> np.uint64(32)) ^ c[1] ^ k[0], right & low, (left >> np.uint64(32)) ^ c[3] ^ k[1], left & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=-1)


def mask_numpy(seed: int, M: int, K: int, p: float, stream: int, first_row: int = 0) -> np.ndarray:
    """[M, K] bool, element by element."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    row, column = np.meshgrid(np.arange(M, dtype=np.uint64) + np.uint64(first_row), np.arange(K), indexing="ij")
    counter = np.stack(
        [column // 8, row & np.uint64(0xFFFFFFFF), row >> np.uint64(32), np.full_like(row, stream)], axis=-1
    ).astype(np.uint64)
    words = philox_numpy(key, counter)
    word = np.take_along_axis(words, (column % 8 // 2)[..., None], axis=-1)[..., 0]
    half = np.where(column % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))
    return half >= round(p * 65536)


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(philox_numpy(key, np.array(counter, dtype=np.uint64)).tolist()) == words
    seed = key[0] | key[1] << 32
    seed = seed - 2**64 if seed >= 2**63 else seed
    got = reference.philox(seed, *(torch.tensor(c) for c in counter))
    assert tuple(got.tolist()) == words


@pytest.mark.parametrize(("M", "K", "p", "stream"), CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_reference_mask(seed: int, M: int, K: int, p: float, stream: int) -> None:
    got = reference.dropout_mask(seed, M, K, p, stream)
    keep = mask_numpy(seed, M, K, p, stream)
    assert np.array_equal(got.numpy() > 0, keep)
    assert got.max() <= 65536 / (65536 - round(p * 65536))


@pytest.mark.parametrize(("M", "K", "p", "stream"), CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_op_mask(seed: int, M: int, K: int, p: float, stream: int) -> None:
    """The mask of forward (s is dropout(1) for A = I) and of backward (dx is the mask for W = 0, A = B = 1)."""
    x, eye = torch.ones(M, K, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    zero, ones = torch.zeros(1, K, dtype=torch.float64), torch.ones(1, K, dtype=torch.float64)
    one, s = torch.ones(1, 1, dtype=torch.float64), torch.zeros(M, 1, dtype=torch.float64)
    tensor = torch.tensor([seed])
    expected = torch.from_numpy(mask_numpy(seed, M, K, p, stream)).double() * (65536 / (65536 - round(p * 65536)))
    _, got = torch.ops.collm_fast.lora_linear(x, zero, None, eye, torch.ones(1, K).double(), 1.0, p, tensor, stream)
    assert torch.equal(got, expected)
    dx, _, _ = torch.ops.collm_fast.lora_linear_backward(
        torch.ones(M, 1).double(), x, zero, ones, one, s, 1.0, p, tensor, stream, [True, False, False]
    )
    assert torch.equal(dx, expected)


def test_op_mask_of_a_wide_row() -> None:
    M, K, p, stream, seed = 3, 1300, 0.3, 5, -77
    ones, one = torch.ones(1, K), torch.ones(1, 1)
    dx, _, _ = torch.ops.collm_fast.lora_linear_backward(
        torch.ones(M, 1), torch.empty(0), torch.zeros(1, K), ones, one, torch.empty(0), 1.0, p, torch.tensor([seed]),
        stream, [True, False, False],
    )  # fmt: skip
    assert np.array_equal(dx.numpy() > 0, mask_numpy(seed, M, K, p, stream))


def test_mask_has_the_rate_and_the_mean_it_promises() -> None:
    mask = reference.dropout_mask(3, 1000, 1000, 0.05)
    assert abs(float((mask == 0).double().mean()) - 0.05) < 1e-3
    assert abs(float(mask.mean()) - 1) < 1e-3
    assert not torch.equal(mask[:, :8], reference.dropout_mask(4, 1000, 8, 0.05))
    assert not torch.equal(mask[:, :8], reference.dropout_mask(3, 1000, 8, 0.05, stream=1))


@requires("compiler")
def test_device_code_words_and_masks() -> None:
    import emulation

    binary = emulation.build("lora_main.cpp")
    rows = torch.tensor([[*key, *counter] for key, counter, _ in KNOWN], dtype=torch.int64)
    counters = torch.from_numpy(rows.numpy().astype(np.uint32).view(np.int32))
    got = emulation.run(binary, {"counters": counters}, {"words": ((len(KNOWN), 4), torch.int32)}, mode=2)["words"]
    assert [tuple(row) for row in got.numpy().view(np.uint32).tolist()] == [words for _, _, words in KNOWN]
    for seed in SEEDS:
        for first_row in (0, 2**33 + 5):
            M, K, p, stream = 9, 43, 0.3, 2**31 + 3
            inputs = {"seed": torch.tensor([seed])}
            outputs = {"mask": ((M, K), torch.uint8)}
            numbers = {"M": M, "K": K, "dropout_p": p, "stream": stream, "first_row": first_row}
            mask = emulation.run(binary, inputs, outputs, mode=1, **numbers)["mask"]
            assert np.array_equal(mask.numpy() > 0, mask_numpy(seed, M, K, p, stream, first_row))


if backends.in_child():

    def test_triton_mask() -> None:
        from collm_fast.kernels import lora as kernels

        for seed in SEEDS:
            for first_row in (0, 2**33 + 5):
                M, K, p, stream = 9, 43, 0.3, 2**31 + 3
                out = torch.full((M, K), -1, dtype=torch.int8)
                kernels.mask_kernel[(2, 3)](
                    out, torch.tensor([seed]), M, K, first_row, stream, round(p * 65536), BLOCK_M=8, BLOCK_C=16
                )
                assert np.array_equal(out.numpy() == 1, mask_numpy(seed, M, K, p, stream, first_row))

else:

    @requires("triton")
    def test_triton_interpreter() -> None:
        assert backends.run_with_backend("triton", __file__, "triton_mask or op_mask") >= 20

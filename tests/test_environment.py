"""`collm_fast.env()`: its keys, its text, and the problems that only a GPU or another release would show."""

from __future__ import annotations

import types

import pytest
import torch

import collm_fast
from collm_fast import _native, environment

OPS = {"lightgcn_propagate", "embed_inject", "gather_rows", "scatter_rows", "lora_linear"}


def test_keys_and_values() -> None:
    info = collm_fast.env()
    assert set(info) == {"version", "torch", "device", "simd", "ops", "problems"}
    assert info["version"] == collm_fast.__version__ and info["torch"] == torch.__version__
    assert info["simd"] in ("avx512_bf16", "avx512", "avx2", "scalar")
    assert set(info["ops"]) >= OPS
    for op in info["ops"].values():
        assert set(op) == {"cpu", "cuda"} and op["cpu"] in ("native", "triton", "reference")
        assert op["cuda"] in ("native", "triton", "reference", None)
    assert all(isinstance(problem, str) for problem in info["problems"])


def test_text_names_every_op_and_problem() -> None:
    info = collm_fast.env()
    info["problems"] = ["GPU: built for X, found Y; do: Z"]
    text = environment.describe(info)
    assert all(name in text for name in info["ops"])
    assert text.endswith("GPU: built for X, found Y; do: Z")
    info["problems"] = []
    assert environment.describe(info).endswith("no problems")


@pytest.mark.parametrize(
    ("capability", "bf16", "expected"),
    [
        ("AVX512", True, "avx512_bf16"),
        ("AVX512", False, "avx512"),
        ("AVX2", False, "avx2"),
        ("DEFAULT", False, "scalar"),
    ],
)
def test_simd_without_a_compiled_module(
    monkeypatch: pytest.MonkeyPatch, capability: str, bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert environment.simd() == expected


def test_a_module_of_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(build_info=lambda: {"version": "0.0.1", "simd": "avx2"})
    monkeypatch.setattr(_native, "_C", module)
    problems = collm_fast.env()["problems"]
    assert any(problem.startswith("_C: built for collm-fast 0.0.1, found collm-fast") for problem in problems)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch built for CUDA on a machine with a GPU, as far as this module asks."""
    monkeypatch.setattr(_native, "cuda_version", lambda: "13.0")
    monkeypatch.setattr(_native, "backends", {"embed_inject": {"cpu": "native", "cuda": "native"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


def test_device_names_the_gpu(gpu: pytest.MonkeyPatch) -> None:
    info = collm_fast.env()
    assert info["device"] == "cuda: Some GPU (sm_90)"
    assert not [problem for problem in info["problems"] if problem.startswith("GPU")]


def test_a_gpu_without_a_driver(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    info = collm_fast.env()
    assert info["device"] == "cpu"
    assert any(problem.startswith("GPU: built for CUDA 13.0 (torch), found no usable") for problem in info["problems"])


def test_a_gpu_older_than_the_kernels(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert any("found sm_75; do: set COLLM_FAST_BACKEND=triton" in problem for problem in collm_fast.env()["problems"])

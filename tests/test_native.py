"""Which implementation serves an op, and what an installation says that lacks one.

Every choice that is made at import runs in a process of its own. `bare` is the package without anything compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, requires

from collm_fast import _native

SHOW = "import json, collm_fast; print(json.dumps(collm_fast.env()))"


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("COLLM_FAST_", "TRITON_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | variables, cwd="/", capture_output=True, text=True, timeout=300)


def output(code: str, **variables: str) -> str:
    done = python(code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(**variables: str) -> dict:
    return json.loads(output(SHOW, **variables))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The package as an install without a compiler leaves it."""
    shutil.copytree(ROOT / "collm_fast", tmp_path / "collm_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "collm_fast" / "kernels")
    # An editable install would lend its compiled files to the copy.
    forget = "sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']"
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{forget}\n")
    return tmp_path


@requires("native")
def test_auto_uses_what_was_compiled() -> None:
    info = shown()
    assert {op["cpu"] for op in info["ops"].values()} == {"native"}
    assert {op["cuda"] for op in info["ops"].values()} <= {None, "native", "triton"}
    assert not [problem for problem in info["problems"] if "CPU" in problem or "_C" in problem]


@requires("native")
def test_native_is_served() -> None:
    assert {op["cpu"] for op in shown(COLLM_FAST_BACKEND="native")["ops"].values()} == {"native"}


def test_reference_loads_nothing_compiled() -> None:
    assert {op["cpu"] for op in shown(COLLM_FAST_BACKEND="reference")["ops"].values()} == {"reference"}
    code = "import torch; from collm_fast import _native, ops; print(_native.C(), torch.ops.loaded_libraries)"
    assert output(code, COLLM_FAST_BACKEND="reference").strip() == "None set()"


@requires("triton")
def test_triton_serves_the_cpu_only_in_its_interpreter() -> None:
    interpreted = shown(COLLM_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    assert {op["cpu"] for op in interpreted["ops"].values()} <= {"triton", "reference"}
    assert interpreted["ops"]["embed_inject"]["cpu"] == "triton"
    assert {op["cpu"] for op in shown(COLLM_FAST_BACKEND="triton")["ops"].values()} <= {None, "reference"}


def test_an_unknown_backend_is_an_error() -> None:
    done = python("import collm_fast", COLLM_FAST_BACKEND="cuda")
    assert done.returncode != 0
    assert "COLLM_FAST_BACKEND: expected one of auto, native, triton, reference, got 'cuda'" in done.stderr


def test_without_a_compiler_the_reference_serves_and_says_why(bare: Path) -> None:
    info = shown(PYTHONPATH=str(bare))
    assert {op["cpu"] for op in info["ops"].values()} == {"reference"}
    (problem,) = [problem for problem in info["problems"] if problem.startswith("CPU kernels")]
    assert "built for pure Python, without a C++ compiler, found no library to load; do: install g++" in problem
    assert info["simd"] in ("avx512_bf16", "avx512", "avx2", "scalar")


def test_without_a_compiler_native_is_an_error(bare: Path) -> None:
    done = python("import collm_fast", PYTHONPATH=str(bare), COLLM_FAST_BACKEND="native")
    assert done.returncode != 0
    assert "COLLM_FAST_BACKEND=native: expected compiled kernels, got none: CPU kernels: built for" in done.stderr


def test_files_of_another_system_are_named(bare: Path) -> None:
    suffix = _native.importlib.machinery.EXTENSION_SUFFIXES[0]
    (bare / "collm_fast" / f"_C{suffix}").write_bytes(b"not a library")
    (bare / "collm_fast" / "libcollm_fast_cpu.so").write_bytes(b"not a library")
    problems = shown(PYTHONPATH=str(bare))["problems"]
    assert any(problem.startswith("_C: built for another system") for problem in problems)
    assert any(problem.startswith("CPU kernels: built for another system") for problem in problems)
    assert all("; do: pip install" in problem for problem in problems if not problem.startswith("GPU"))


def test_a_module_of_another_python_is_named(bare: Path) -> None:
    (bare / "collm_fast" / "_C.cpython-27-x86_64-linux-gnu.so").write_bytes(b"")
    problems = shown(PYTHONPATH=str(bare))["problems"]
    assert any("_C: built for _C.cpython-27-x86_64-linux-gnu.so, found a Python that wants _C." in p for p in problems)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(_native, "problems", [])
    return _native.problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("libcudart.so.12: cannot open shared object file", "built for CUDA 12, found torch"),
        ("undefined symbol: torch_parallel_for", "built for torch >= 2.10 (undefined symbol"),
        ("libfoo.so: cannot open shared object file", "built for another system (libfoo.so"),
    ],
)
def test_a_library_that_does_not_load_is_explained(problems: list[str], text: str, expected: str) -> None:
    _native._report_failure("cuda", OSError(text))
    assert problems[0].startswith(f"CUDA kernels: {expected}") and "; do: " in problems[0]


def test_a_broken_library_is_reported(problems: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "FOLDER", tmp_path)
    assert not _native._load_library("cpu") and problems == []
    (tmp_path / "libcollm_fast_cpu.so").write_bytes(b"not a library")
    assert not _native._load_library("cpu")
    assert problems[0].startswith("CPU kernels: built for another system (")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("no"), "_C: built for _C.cpython-27.so, found a Python that wants _C."),
        (ImportError("wrong ELF class"), "_C: built for another system (wrong ELF class), found _C."),
    ],
)
def test_a_module_that_does_not_load_is_reported(
    problems: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: ImportError, expected: str
) -> None:
    def fail(name: str) -> None:
        raise error

    (tmp_path / "_C.cpython-27.so").write_bytes(b"")
    monkeypatch.setattr(_native, "FOLDER", tmp_path)
    monkeypatch.setattr(_native.importlib, "import_module", fail)
    assert _native._load_module() is None
    assert problems[0].startswith(expected)


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (None, "CUDA kernels: built for the CPU only, found torch {} built for CUDA 13.0; do: install nvcc"),
        (
            "12.8.90",
            "CUDA kernels: built for CUDA 12, found torch {} built for CUDA 13.0; do: install a torch for CUDA 12",
        ),
    ],
)
def test_a_cuda_torch_without_its_kernels_is_told(
    problems: list[str], monkeypatch: pytest.MonkeyPatch, built: str | None, expected: str
) -> None:
    module = types.SimpleNamespace(build_info=lambda: {"cuda": built})
    monkeypatch.setattr(_native, "cuda_version", lambda: "13.0")
    monkeypatch.setattr(_native, "BACKEND", "auto")
    monkeypatch.setattr(_native, "_load_module", lambda: module)
    monkeypatch.setattr(_native, "_load_library", lambda device: device == "cpu")
    monkeypatch.setattr(_native, "_C", None)
    _native._load()
    (problem,) = problems
    assert problem.startswith(expected.format(torch.__version__))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op that nothing compiled serves."""
    monkeypatch.setattr(_native, "backends", {})
    name = f"probe_{len(_PROBES)}"
    _PROBES.append(name)
    _native.LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    yield name


_PROBES: list[str] = []


def call(name: str) -> torch.Tensor:
    return getattr(torch.ops.collm_fast, name)(torch.zeros(2))


def test_the_reference_serves_what_nothing_else_does(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "BACKEND", "auto")
    _native.register(probe, reference=lambda x: x + 1)
    assert _native.backends[probe]["cpu"] == "reference"
    assert torch.equal(call(probe), torch.ones(2))


@requires("triton")
@pytest.mark.parametrize(("interpret", "cpu"), [(True, "triton"), (False, None)])
def test_triton_or_an_error(probe: str, monkeypatch: pytest.MonkeyPatch, interpret: bool, cpu: str | None) -> None:
    monkeypatch.setattr(_native, "BACKEND", "triton")
    monkeypatch.setattr(_native, "TRITON_INTERPRET", interpret)
    monkeypatch.setattr(_native, "cuda_version", lambda: "13.0")
    _native.register(probe, reference=lambda x: x + 1, triton=lambda x: x + 2)
    assert _native.backends[probe] == {"cpu": cpu, "cuda": "triton"}
    if interpret:
        assert torch.equal(call(probe), torch.full((2,), 2.0))
    else:
        with pytest.raises(NotImplementedError, match=f"{probe}: expected TRITON_INTERPRET=1 for a CPU tensor"):
            call(probe)


@requires("triton")
def test_triton_serves_a_gpu_that_nothing_compiled_serves(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "BACKEND", "auto")
    monkeypatch.setattr(_native, "cuda_version", lambda: "13.0")
    _native.register(probe, reference=lambda x: x + 1, triton=lambda x: x + 2)
    assert _native.backends[probe] == {"cpu": "reference", "cuda": "triton"}


def test_missing_backends_are_errors(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "BACKEND", "native")
    with pytest.raises(ImportError, match=f"COLLM_FAST_BACKEND=native: expected a compiled {probe} for the CPU"):
        _native.register(probe, reference=lambda x: x)
    monkeypatch.setattr(_native, "BACKEND", "triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="COLLM_FAST_BACKEND=triton: expected triton for"):
        _native.register(probe, reference=lambda x: x, triton=lambda x: x)


def test_an_op_without_a_triton_form_is_served_by_plain_torch(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "BACKEND", "triton")
    _native.register(probe, reference=lambda x: x)
    assert _native.backends[probe]["cpu"] == "reference"


@requires("native")
def test_build_info() -> None:
    info = _native.C().build_info()  # type: ignore[union-attr]
    assert set(info) == {"version", "torch", "cuda", "compiler", "simd", "tiles"}

"""The wheel and the sdist: what they hold, that the wheel runs outside the tree, what importing costs.

The wheel is built once, without CUDA (test_cuda_build.py builds that) and without optimisation, which takes half of the
time, and unpacked into a folder that comes first on the path, as an installation beside other packages would.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, requires

import collm_fast

SUBPACKAGES = ("data", "io", "kernels", "models", "models/cf", "ops", "training")


def run(command: list[str], cwd: Path | str, **variables: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("COLLM_FAST_", "TRITON_", "COV_"))}
    done = subprocess.run(command, cwd=cwd, env=clean | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy_source(folder: Path) -> Path:
    """The files that git would carry, so that a build leaves the working tree alone."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("collm_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, folder / path.name)
    return folder


def build(kind: str, source: Path, out: Path, **variables: str) -> Path:
    """Calls the build backend as pip does without isolation."""
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    out.mkdir()
    return out / run([sys.executable, "-c", code, str(out)], source, **variables).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel") / "dist"
    unoptimised = {"CMAKE_BUILD_TYPE": "None", "CXXFLAGS": "-DNDEBUG"}
    return build("wheel", source, out, COLLM_FAST_CUDA="0", COLLM_FAST_REQUIRE_NATIVE="1", **unoptimised)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands before every other one on the path and holds the unpacked wheel."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    forget = "sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']"
    (folder / "sitecustomize.py").write_text(f"import sys\n{forget}\n")
    return folder


@requires("compiler")
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {"collm_fast/py.typed", "collm_fast/libcollm_fast_cpu.so"}
    assert any(re.fullmatch(r"collm_fast/_C\..*\.so", name) for name in names)
    assert names >= {f"collm_fast/{part}/__init__.py" for part in SUBPACKAGES}
    assert {name.split("/")[0] for name in names} == {"collm_fast", f"collm_fast-{collm_fast.__version__}.dist-info"}
    assert not [name for name in names if "test" in name or name.endswith((".cpp", ".cu", ".h", ".pyc"))]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "collm_fast").rglob("*.py")}
    modules |= {f"collm_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


@requires("compiler")
def test_wheel_is_of_this_platform_and_asks_for_no_newest_torch(wheel: Path) -> None:
    assert f"cp{sys.version_info[0]}{sys.version_info[1]}" in wheel.name and wheel.name.endswith("_x86_64.whl")
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "Requires-Dist: torch>=2.10\n" in text
    asked = re.findall(r"^Requires-Dist: ([^;\n]+)", text, re.MULTILINE)
    assert len(asked) > 5 and not [requirement for requirement in asked if re.search("==|<|~=", requirement)]
    assert "License-Expression: Apache-2.0" in text


@requires("compiler")
def test_wheel_runs_outside_the_tree(site: Path, tmp_path: Path) -> None:
    code = """
import collm_fast, torch
from collm_fast import ops
from collm_fast.environment import env
graph = collm_fast.BipartiteGraph.from_interactions([0, 1, 1], [0, 0, 1], 2, 2)
x = torch.eye(4)
assert torch.allclose(ops.lightgcn_propagate(x, graph, 2), collm_fast.reference.lightgcn_propagate(x, graph, 2))
assert {op["cpu"] for op in env()["ops"].values()} == {"native"}, env()
import collm_fast.kernels
print(collm_fast.__file__, collm_fast.kernels.__file__)
"""
    shown = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)).split()
    assert all(path.startswith(str(site)) for path in shown)


@requires("compiler")
def test_cpu_library_is_of_the_stable_abi(site: Path) -> None:
    audit = Path(sys.executable).parent / "torch-abi-audit"
    text = run([str(audit), str(site / "collm_fast" / "libcollm_fast_cpu.so")], "/")
    assert re.search(r"Torch ABI:\s+STABLE", text) and re.search(r"Min torch:\s+2\.10", text)


@requires("compiler")
def test_libraries_name_no_folder_of_the_build(site: Path, source: Path) -> None:
    for path in (site / "collm_fast").glob("*.so"):
        image = path.read_bytes()
        assert str(source).encode() not in image and str(ROOT).encode() not in image, path.name


def test_without_a_compiler_the_wheel_is_pure_python(source: Path, tmp_path: Path) -> None:
    pure = build("wheel", source, tmp_path / "dist", COLLM_FAST_NATIVE="0")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]


@pytest.mark.parametrize(("required", "code"), [("0", 0), ("1", 1)])
def test_no_compiler_is_said_and_an_error_where_native_is_required(
    source: Path, tmp_path: Path, required: str, code: int
) -> None:
    variables = {"PATH": str(tmp_path), "CXX": "", "COLLM_FAST_REQUIRE_NATIVE": required}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=source, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == code
    assert "no C++ compiler found" in done.stderr


def test_sdist_holds_all_that_a_build_needs(source: Path, tmp_path: Path) -> None:
    archive = build("sdist", source, tmp_path / "dist")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    needed = {"setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "constraints.txt", "collm_fast/py.typed"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")}
    assert needed <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "build/")) or name.endswith(".so")]


IMPORT = """
import sys, time
import numpy, torch
start = time.process_time()
import collm_fast
spent = time.process_time() - start
heavy = {"transformers", "peft", "triton", "pyarrow", "matplotlib", "tensorboard", "scipy", "sklearn", "pandas"}
print(spent, torch.cuda.is_initialized(), sorted(heavy & set(sys.modules)))
"""


def test_import_is_quick_and_touches_no_gpu() -> None:
    shown = [run([sys.executable, "-c", IMPORT], "/").split(maxsplit=2) for _ in range(2)]
    assert min(float(spent) for spent, _, _ in shown) < 0.5
    assert {initialised for _, initialised, _ in shown} == {"False"}
    assert {heavy.strip() for _, _, heavy in shown} == {"[]"}


def test_names_that_come_later_exist() -> None:
    for name in collm_fast.__all__:
        assert getattr(collm_fast, name) is not None
        assert name in dir(collm_fast)
    with pytest.raises(AttributeError, match="module 'collm_fast' has no attribute 'nothing'"):
        _ = collm_fast.nothing

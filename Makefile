# make demo   a virtual environment of its own, then a small model learns to reason by GRPO (CPU, a few minutes)
# make test   the same environment, then every check: ruff, mypy, clang-format, pytest

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SEED   ?= 0
OUT    ?= runs/demo
# The CPU build for machines without an NVIDIA GPU; with one, the build that the package index gives.
CPU_TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# What the package is built from; the rest of an editable install follows the sources by itself.
BUILD := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint format clean

demo: $(VENV)/.train
	$(BIN)/grpo-fast train --out $(OUT) --seed $(SEED)

test: $(VENV)/.test lint
	$(BIN)/grpo-fast info # says whether the CUDA extension is built
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

# A CPU build that the machine already has comes first, so that nothing is fetched for it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null; then $(BIN)/pip install -q torch; else \
	  $(BIN)/pip install -q --no-index --no-deps "$(CPU_TORCH)" 2>/dev/null || \
	  $(BIN)/pip install -q --index-url $(CPU_INDEX) "$(CPU_TORCH)"; fi
	touch $@

$(VENV)/.train: $(VENV)/.torch $(BUILD)
	$(BIN)/pip install -q -e ".[train]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILD)
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info grpo_fast/_C.*.so

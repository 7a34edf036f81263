# The verbs. Each makes the environment it needs, once; the second call starts at once and needs no network.
#   make serve [MODEL=demo:qwen3] [ARGS="--port 9000"]     make bench [MODEL=...] [ARGS="--tests decode"]
#   make test  [ARGS="tests/test_llm.py -x"]               make check
PYTHON ?= python3
VENV ?= .venv
MODEL ?= demo:qwen3
ARGS ?=
BIN := $(VENV)/bin

.PHONY: help serve test check bench
help:
	@sed -n '1,3s/^# *//p' Makefile

serve: $(VENV)/.user
	$(BIN)/nanodeploy serve $(MODEL) $(ARGS)

# A process per core, but one where they would share a GPU. One thread per process: the models are tiny, and some tests
# run several servers side by side.
test: JOBS ?= $(if $(shell command -v nvidia-smi),0,auto)
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	-@$(BIN)/python -m bench.gate --changed

# A model that the machine can carry, unless MODEL says otherwise.
bench: MODEL = $(if $(shell command -v nvidia-smi),demo:random-qwen3-8b,demo:qwen3)
bench: $(VENV)/.dev
	$(BIN)/python -m bench.offline $(MODEL) $(ARGS)

# torch first: the system's own where it is new enough (a GPU image has the build that fits its driver; a venv's torch
# cannot be shared with another venv), else from PyPI.
# A CPU build of torch brings no Triton, and the kernels are proved in Triton 3.6's interpreter.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nanodeploy needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@if $(PYTHON) -c 'from importlib.metadata import version as v; import sys; sys.exit(sys.prefix != sys.base_prefix or [int(n) for n in v("torch").split(".")[:2]] < [2, 10])' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install torch==2.13.0; fi
	@if [ "$$(uname -s)" = Linux ] && $(BIN)/python -c 'import torch, sys; sys.exit(bool(torch.version.cuda))'; \
	then $(BIN)/python -m pip install triton==3.6.0; fi
	@touch $@

$(VENV)/.user: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $(VENV)/.user $@

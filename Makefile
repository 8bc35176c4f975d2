# Two commands to know: `make demo` and `make test`. `make help` lists the rest.
#
# The first call makes .venv and installs into it; later calls reuse it until pyproject.toml changes.
#   make PYTHON=python3.12 test            another Python (3.10 or newer)
#   make TORCH='torch==2.11.0' test        another torch; any arguments of `pip install`
#   make VENV= gpu-test                    no environment of its own: $(PYTHON) as it is, with what it can import

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Installed without its requirements, which do not go together with those of a current transformers. Not for Python 3.10.
TORCHTITAN ?= 'torchtitan==0.3.0; python_version >= "3.11"' spmd_types==0.2.3 tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
# GPU tests in parallel compile faster and share one GPU's memory.
GPU_JOBS ?= 1
DEMO ?=
TESTS ?= tests
PERF ?= main --what kernels
# Only our kernels, whose names all begin like this: torch's own reductions trip racecheck.
SANITIZER ?= compute-sanitizer --error-exitcode 1 --kernel-name kns=kernel_cutlass
# Python's CUDA bindings ask the driver for functions that it does not have, and go on without.
MEMCHECK ?= --report-api-errors no
TOOLS ?= memcheck synccheck racecheck
# Small tests that launch every kernel: all GPU tests under one tool would take hours.
SANITIZE ?= two_runs or one_k_step or odd_number_of_m or halves_apart or dtypes_and_biases or ties_zeros or \
  another_layout or public_function or without_slots or writes_nothing_else or few_rows

GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ifeq ($(VENV),)
READY :=
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
READY := $(VENV)/.ready
PY := $(VENV)/bin/python
endif

# One thread per worker: the workers already use every core.
PYTEST := $(PY) -m pytest
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS)
GPU_TEST := $(if $(filter-out 1,$(GPU_JOBS)),env OMP_NUM_THREADS=1 $(PYTEST) -n $(GPU_JOBS),$(PYTEST)) -m gpu $(TESTS)

.PHONY: help demo test check lint types compile gpu-test sanitize perf report clean
.DEFAULT_GOAL := help

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## train a small MoE language model twice, top-K and token rounding; DEMO='--help' lists options
	$(PY) -m sonicmoe $(DEMO)

test: $(READY)  ## every test that this machine can run
ifeq ($(GPU),)
	$(PARALLEL) $(TESTS)
else
	$(PARALLEL) -m "not gpu" $(TESTS)
	$(GPU_TEST)
endif

check: lint types compile test  ## before every commit, with or without a GPU: lint, types, cross-compilation, tests

lint: $(READY)  ## ruff: rules and format; tables as the ledger says
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m perf.report --check

types: $(READY)  ## mypy on host code
	$(PY) -m mypy

compile: $(READY)  ## cross-compile every kernel for sm_90a and compare its resources with the record
	$(PY) -m sonicmoe.jit.aot

gpu-test: $(READY)  ## the tests that need a Hopper GPU
	$(GPU_TEST)

sanitize: $(READY)  ## small GPU tests under compute-sanitizer's TOOLS, without torch's caching of memory
	for tool in $(TOOLS); do \
	  options=; [ $$tool = memcheck ] && options="$(MEMCHECK)"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $$options $(GPU_TEST) -k "$(SANITIZE)" || exit 1; \
	done

perf: $(READY)  ## measure on this GPU, PERF='7b --what both' say what; then tables and plots
	$(PY) -m perf.run $(PERF)
	$(PY) -m perf.report

report: $(READY)  ## tables and plots from the ledger
	$(PY) -m perf.report

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis out

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("sonicmoe needs Python 3.10 or newer; make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install $(TORCH)
	$(PY) -m pip install --editable '.[dev]'
	$(PY) -m pip install --no-deps $(TORCHTITAN)
	@touch $@

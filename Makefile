# Every target works from a fresh clone; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup lock upgrade demo test test-full test-lowest check lines up bench-train bench-serve gpu-day

# The first interpreter that can make an environment and for which every dependency has a wheel: CPython 3.11 to 3.14.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.14 python3.11,$(shell $(name) -c \
	'import ensurepip, venv, sys, sysconfig; (3, 11) <= sys.version_info < (3, 15) and \
	not sysconfig.get_config_var("Py_GIL_DISABLED") and print("$(name)")' 2>/dev/null)))
BASE := smollm2-135m-instruct
BIN := .venv/bin
# Set-up is done again when what it installs has changed.
STAMP := .venv/.setup-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c 1-16)
LOCK := uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header --no-annotate \
	--no-emit-index-url --no-emit-package torch

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the versions of constraints.txt, and fetch the small base model.
	@$(BIN)/luthier bases fetch $(BASE)

$(STAMP):
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  if [ -z "$(PYTHON)" ]; then \
	    echo "Python 3.11 to 3.14 with its venv package is missing. Type: sudo apt install python3-venv" >&2; exit 1; fi; \
	  echo "Making .venv with $(PYTHON), $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; fi
	@start=$$SECONDS; echo "Installing packages into .venv (minutes on the first run; a torch there is kept) ..."; \
	  $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt \
	    --editable '.[torch,cpu,local,dev,bench]' >.venv/setup.log 2>&1 \
	    || { tail -n 20 .venv/setup.log >&2; echo "The whole output is in .venv/setup.log" >&2; exit 1; }; \
	  echo "Installing packages into .venv: done in $$((SECONDS - start)) s"
	@echo "Compiling kernels (once; about a minute)"
	@$(BIN)/python -m luthier_cpu
	@rm -f .venv/.setup-* && touch $@

lock: setup ## Write constraints.txt from pyproject.toml, keeping the versions that it has where they still fit.
	$(BIN)/$(LOCK) --output-file constraints.txt pyproject.toml
	@# torch is the user's choice of a build (CPU or CUDA), and so is what only its CUDA build needs.
	@sed -i.bak -E '/^(nvidia|cuda|triton)/d' constraints.txt && rm constraints.txt.bak

upgrade: setup ## Take the newest versions that pyproject.toml allows into constraints.txt, install and test them.
	rm constraints.txt
	@touch constraints.txt && $(MAKE) --no-print-directory lock
	@$(MAKE) --no-print-directory test

test-lowest: setup ## Run the unit tests with the lowest versions that pyproject.toml allows, in .venv-lowest.
	@if [ ! -x .venv-lowest/bin/python ]; then $(PYTHON) -m venv .venv-lowest; fi
	$(BIN)/$(LOCK) --resolution lowest-direct --output-file .venv-lowest/constraints.txt pyproject.toml
	@sed -i.bak -E '/^(nvidia|cuda|triton)/d' .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint .venv-lowest/constraints.txt --editable '.[torch,cpu,local,dev,bench]'
	.venv-lowest/bin/python -m pytest tests/unit tests/integration/test_api_jobs.py tests/integration/test_job_life.py \
	  -m "not full and not gpu"

demo: ## Set up, train the bundled data on the small base, and compare it with the base.
	@echo "Luthier demo: set up, start, train, compare, stop."
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -m examples.demo

test: setup ## Run the tests (15 to 18 minutes on two cores, after set-up).
	@# Two processes of one thread each: threads that wait for one another on shared cores cost minutes.
	@# Hundreds of Python processes start, and each compiles all modules where bytecode is not kept.
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full and not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-full: setup test-lowest ## Run all tests: soaks, thousands of cases, lowest versions, an accelerator if there is one.
	$(BIN)/python -m pytest

check: setup ## Check format, lint, types, imports, docstrings, spelling, Dockerfile.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	if [ -f Dockerfile ]; then $(BIN)/hadolint Dockerfile; fi

lines: ## Count the lines of the product, of the tests and of what the inference server imports.
	@$(BIN)/python -m pytest -s tests/architecture/test_sizes.py | grep -o 'product lines.*\|imports of.*'

up: setup ## Run the service on this machine until Ctrl-C.
	@exec $(BIN)/luthier up

bench-train: setup ## Measure training beside TRL, LLaMA-Factory, Trainer+PEFT and adapters (hours; ARGS=--help).
	$(BIN)/python -m benchmarks.train $(ARGS)

bench-serve: setup ## Measure serving beside vLLM, PEFT, transformers and llama.cpp (hours; ARGS=--help).
	$(BIN)/python -m benchmarks.serve $(ARGS)

gpu-day: setup ## Check, train and serve an 8B shape on one GPU in ten minutes; small on a CPU (ARGS=--help).
	$(BIN)/python -m benchmarks.gpu_day $(ARGS)

# Every target works from a fresh clone; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full check up bench-train bench-serve bench-gpu

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
BASE := smollm2-135m-instruct
BIN := .venv/bin
# Set-up is done again when what it installs has changed.
STAMP := .venv/.setup-$(shell cat pyproject.toml models.toml | sha256sum | cut -c 1-16)

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything installed, and fetch the small base model.
	@$(BIN)/luthier bases fetch $(BASE)

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Python 3.11 or newer is missing. Type: sudo apt install python3 python3-venv" >&2; exit 1; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "Python's venv package is missing. Type: sudo apt install python3-venv" >&2; exit 1; }; \
	  echo "Making .venv with $$($(PYTHON) --version) …"; $(PYTHON) -m venv .venv; fi
	@start=$$SECONDS; echo "Installing packages into .venv (minutes on the first run; a torch there is kept) …"; \
	  $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[torch,local,dev]' \
	    | sed -u -e '/^Requirement already satisfied/d' -e 's/^\(.\{118\}\).*/\1/' -e 's/^/  /'; \
	  echo "Installing packages into .venv: done in $$((SECONDS - start)) s"
	@echo "Compiling kernels (once; about a minute)"
	@$(BIN)/python -m luthier.modeling.kernels
	@rm -f .venv/.setup-* && touch $@

demo: ## Set up, train the bundled data on the small base, and compare it with the base.
	@echo "Luthier demo: set up, start, train, compare, stop."
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -m examples.demo

test: setup ## Run the tests (at most 15 minutes).
	$(BIN)/python -m pytest -m "not full and not gpu"

test-full: setup ## Run all tests: soaks, thousands of cases, an accelerator where there is one.
	$(BIN)/python -m pytest

check: setup ## Check format, lint, types, imports, docstrings, spelling, Dockerfile.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	if [ -f Dockerfile ]; then $(BIN)/hadolint Dockerfile; fi

up: setup ## Run the service on this machine until Ctrl-C.
	@exec $(BIN)/luthier up

bench-train: setup ## Measure training beside TRL, LLaMA-Factory, Trainer+PEFT and adapters (hours; ARGS=--help).
	$(BIN)/python -m benchmarks.train $(ARGS)

bench-serve: setup ## Measure serving beside vLLM, PEFT, transformers and llama.cpp (hours; ARGS=--help).
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-gpu: setup ## Measure training on CUDA beside Unsloth, TRL and Trainer (10 minutes at most).
	$(BIN)/python -m benchmarks.gpu $(ARGS)

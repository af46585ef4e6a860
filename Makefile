# Everything a person does with a checkout. `make run` and `make test` need Python >= 3.11 and a C++ compiler, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.DEFAULT_GOAL := help
.PHONY: help run test lint format test-slow test-peers bench cria clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One stamp a step: nothing is installed twice, and a change to the sources installs them again.
$(VENV)/python.stamp:
	$(PYTHON) -c 'import sys; sys.exit("Puna needs Python 3.11 or newer; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/core.stamp: $(VENV)/python.stamp $(SOURCES)
	@echo 'Installing Puna (compiling its kernels takes half a minute on two cores) ...' >&2
	$(BIN)/python -m pip install --quiet --group build
	$(BIN)/python -m pip install --quiet --no-build-isolation .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/python.stamp pyproject.toml
	@echo 'Installing what the tests need (PyTorch, transformers, ...) ...' >&2
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

run: $(VENV)/core.stamp ## install Puna here and have its own little model write a story
	$(BIN)/puna run cria "Once upon a time" --seed 7

test: $(VENV)/core.stamp $(VENV)/dev.stamp lint ## run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/core.stamp $(VENV)/dev.stamp ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## let ruff put the layout right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(VENV)/core.stamp $(VENV)/dev.stamp ## the long suites: all 10,000 strings a tokenizer, larger fuzzing
	$(BIN)/python -m pytest -m slow

test-peers: $(VENV)/core.stamp $(VENV)/dev.stamp ## have another engine (CTranslate2) run what Puna converted
	$(BIN)/python -m pip install --quiet --group peers
	$(BIN)/python -m pytest -m peers

CRIA_TRAIN ?= $(error say which stories to train on: CRIA_TRAIN="files" CRIA_HELD_OUT=file, see recipes/cria/README.md)
cria: $(VENV)/core.stamp $(VENV)/dev.stamp ## make the embedded model anew: CRIA_TRAIN="files" CRIA_HELD_OUT=file (an hour on two cores)
	$(BIN)/python recipes/cria/prepare.py --train $(CRIA_TRAIN) --held-out $(CRIA_HELD_OUT)
	$(BIN)/python recipes/cria/train.py
	$(BIN)/python recipes/cria/export.py
	$(BIN)/python recipes/cria/evaluate.py

bench: $(VENV)/core.stamp $(VENV)/dev.stamp ## measure beside transformers, and start-up, size, memory (18 GB of disk, ten minutes)
	$(BIN)/python bench/decoder.py --record
	$(BIN)/python bench/startup.py --record
	$(BIN)/python bench/memory.py --record
	$(BIN)/python bench/report.py

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Everything a person does with a checkout. `make run` and `make test` need Python >= 3.11 and a C++ compiler, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.DEFAULT_GOAL := help
.PHONY: help run test lint format test-slow test-peers test-sanitize test-arm test-clients page test-page wheel bench bench-gguf cria clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One stamp a step: nothing is installed twice, and a change to the sources installs them again.
$(VENV)/python.stamp:
	$(PYTHON) -c 'import sys; sys.exit("Puna needs Python 3.11 or newer; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/core.stamp: $(VENV)/python.stamp $(SOURCES)
	@echo 'Installing Puna (compiling its kernels takes most of a minute on two cores) ...' >&2
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

test-peers: $(VENV)/core.stamp $(VENV)/dev.stamp ## have other engines (CTranslate2, llama.cpp) run what Puna converted
	$(BIN)/python -m pip install --quiet --group peers
	$(BIN)/python -m pytest -m peers

test-sanitize: $(VENV)/core.stamp $(VENV)/dev.stamp ## the kernels under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m pip install --quiet --group build
	$(BIN)/python -m pytest -m sanitize

test-arm: $(VENV)/core.stamp $(VENV)/dev.stamp ## the kernels as Clang compiles them, and on an emulated Arm
	$(BIN)/python -m pip install --quiet --group build --group arm
	$(BIN)/python -m pytest -m arm

test-clients: $(VENV)/core.stamp $(VENV)/dev.stamp ## other people's clients against a running server, an environment each (9 GB of disk)
	$(BIN)/python -m pytest -m clients

# The page that the server shows at /. What is built is committed, so that nobody needs Node who does not change it.
page: ## build the chat page into the package (Node >= 20.19)
	cd page && npm ci && npm run build

test-page: ## build the chat page again and compare, then test it, in Chromium too (CHROMIUM=path)
	cd page && npm ci && npm run build -- --outDir ../build/page
	diff -r build/page src/puna/server/page
	cd page && npm test && npm run test:browser

wheel: $(VENV)/python.stamp ## a wheel for this machine in dist/ (`cibuildwheel` makes those for others, see pyproject.toml)
	$(BIN)/python -m pip install --quiet --group wheel
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	mkdir -p dist
	if [ "$$(uname)" = Linux ]; then PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	else cp build/wheel/*.whl dist/; fi

CRIA_TRAIN ?= $(error say which stories to train on: CRIA_TRAIN="files" CRIA_HELD_OUT=file, see recipes/cria/README.md)
cria: $(VENV)/core.stamp $(VENV)/dev.stamp ## make the embedded model anew: CRIA_TRAIN="files" CRIA_HELD_OUT=file (an hour on two cores)
	$(BIN)/python recipes/cria/prepare.py --train $(CRIA_TRAIN) --held-out $(CRIA_HELD_OUT)
	$(BIN)/python recipes/cria/train.py
	$(BIN)/python recipes/cria/export.py
	$(BIN)/python recipes/cria/evaluate.py

# The peers have an environment of their own: what one of them asks for does not fit beside Puna.
$(VENV)-bench/python.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)-bench/bin/python -m pip install --quiet --group bench
	@touch $@

GGUF_BENCH = $(BIN)/python bench/gguf.py --record --peer-python $(VENV)-bench/bin/python
bench-gguf: $(VENV)/core.stamp $(VENV)/dev.stamp $(VENV)-bench/python.stamp ## measure GGUF beside llama.cpp and OpenVINO (15 GB of disk, an hour)
	$(GGUF_BENCH) --shape llama3.2:1b --type Q4_K_M --against llama.cpp,openvino,ctranslate2 --full
	$(GGUF_BENCH) --shape llama3.2:1b --type Q8_0 --against llama.cpp,openvino,ctranslate2 --full
	$(GGUF_BENCH) --shape llama3.2:1b --type Q4_0 --against llama.cpp --only decode,cold_start,peak_memory
	$(GGUF_BENCH) --shape stories15M --type F32 --against llama.cpp --only decode
	$(GGUF_BENCH) --shape stories15M --type Q8_0 --against llama.cpp --only decode
	$(BIN)/python bench/report.py

bench: $(VENV)/core.stamp $(VENV)/dev.stamp ## measure beside transformers, and start-up, size, memory (18 GB of disk, ten minutes)
	$(BIN)/python bench/decoder.py --record
	$(BIN)/python bench/startup.py --record
	$(BIN)/python bench/memory.py --record
	$(BIN)/python bench/report.py

clean: ## remove the environment and what was built
	rm -rf $(VENV) $(VENV)-bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

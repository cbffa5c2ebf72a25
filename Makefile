# Every target sets up .venv itself when it is missing or pyproject.toml has changed.
#
#   make demo ARGS="--max_minutes 25"      make test ARGS="-k weights"
#
# torch comes first and alone, so that pip takes one build of it and keeps it. On a machine without a GPU the smaller
# CPU build is:  make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow quality format bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED) ## create .venv and install drorl into it, editable

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "drorl needs Python >= 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo,dev]'
	@touch $@

demo: $(INSTALLED) ## build the data and the model, train with DRO, compare on held-out questions
	$(BIN)/python recipes/nq.py --config recipes/configs/nq_demo.yaml $(ARGS)

test: $(INSTALLED) ## the default suite: CPU, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-slow: $(INSTALLED) ## the long tests: CPU, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu and not network and not vllm" $(ARGS)

quality: $(INSTALLED) ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check drorl recipes

format: $(INSTALLED) ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## time a step against stock TRL and against its floor
	$(BIN)/python benchmarks/step.py --quick $(ARGS)

clean: ## remove .venv and caches; outputs/ and the data cache stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

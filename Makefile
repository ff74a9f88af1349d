# Every target sets up .venv by itself, once for each change of pyproject.toml or constraints.txt.
PYTHON ?= python3
STAMP := .venv/.installed
BIN := .venv/bin
WORKERS := -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench docs clean

help: ## say what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf 'make %-9s %s\n' "$$name" "$$text"; done

$(STAMP): pyproject.toml constraints.txt
	@echo 'setting up .venv: about 2 GB, some minutes, only once'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,clients,datasets,jxl,tag]' --constraint constraints.txt
	touch $(STAMP)

demo: $(STAMP) ## train on the embedded model and show what it learned, in minutes
	$(BIN)/lorasmith demo

test: $(STAMP) ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-all: $(STAMP) ## all tests
	$(BIN)/python -m pytest $(WORKERS)

lint: $(STAMP) ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP) ## run every program in benchmarks/
	@for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python "$$program" || exit 1; done

docs: $(STAMP) ## write docs/options.md and docs/schema/ anew from the options
	$(BIN)/python tools/docs.py

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

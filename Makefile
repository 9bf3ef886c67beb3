# Every target does its own set-up in .venv; the stamp makes the second run install nothing.
PYTHON ?= python3
SEEDS ?= 1
BENCH ?= fast_weights
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
BENCH_STAMP := .venv/.installed-bench
DOCS_STAMP := .venv/.installed-docs
RELIABILITY_STAMP := .venv/.installed-reliability

.DEFAULT_GOAL := help
.PHONY: help install run test coverage check bench reliability docs clean

help:
	@echo "make run [SEEDS=3]  meta-train the quickstart model, then stream English it has never read"
	@echo "make test [ARGS=..] run the whole test suite"
	@echo "make coverage       the suite, and which lines and branches it leaves out; fails below 90 %"
	@echo "make check          lint, formatting, types, import rules"
	@echo "make bench [BENCH=..] speed and memory: fast_weights (beside a peer), rules (every preset), mnm, slots, engines (inner loops), distributed (processes)"
	@echo "make reliability    kill -9, full disks, damaged files, …: how many faults were tried, and how many survived"
	@echo "make docs           the documentation as a site, site/index.html"
	@echo "make install        set up .venv and nothing else"
	@echo "make clean          remove .venv and caches (runs/ stays)"

# torch comes first and alone, so that no other package's requirement chooses its build.
$(STAMP): Makefile pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metamem needs Python 3.11 or newer; found %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@echo "Setting up .venv; this takes a few minutes the first time."
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet torch==2.13.0 -c constraints.txt
	$(PIP) install --quiet -c constraints.txt -e ".[data,few-shot,hf,optuna,tensorboard,dev]"
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[bench]"
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

$(RELIABILITY_STAMP): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[ray,wandb]"
	@touch $@

install: $(STAMP)

run: $(STAMP)
	$(BIN)/python experiments/quickstart.py --seeds $(SEEDS) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto $(ARGS)

coverage: $(STAMP)
	COVERAGE_FILE=$(CURDIR)/.coverage $(BIN)/python -m pytest -n auto --cov --cov-report=term-missing:skip-covered $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(BENCH_STAMP)
	$(BIN)/python experiments/benchmarks/$(BENCH).py $(ARGS)

reliability: $(RELIABILITY_STAMP)
	$(BIN)/python experiments/reliability.py $(ARGS)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html is built; its search needs a server: $(BIN)/python -m http.server -d site"

clean:
	rm -rf .venv .coverage* .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist site

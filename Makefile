# Every target makes what it needs (.venv, pinned packages, this package in editable form) and nothing twice.
# `make PYTHON=python3.12 ...` chooses the interpreter of a new .venv; `make lowest PYTHONS="3.10 3.13"` those tried.

BIN := .venv/bin
# Workers of the tests: one a core, four at most.
WORKERS ?= auto
# Idle threads give their core away: on a busy machine this is several times faster.
export OMP_WAIT_POLICY := passive

.PHONY: help ready demo test check types lowest lab docs look quarto bench attack book clean

help:
	@echo "make demo    train a small Bayesian network on digits, with and without orbit expansion; results in output/demo"
	@echo "make test    everything that can fail: notebooks, tests, style, documentation"
	@echo "make check   style, types, documentation, and whether the forms of the book agree; within a minute"
	@echo "make lowest  the tests with the lowest versions of settings.ini, on every Python that is here"
	@echo "make lab     JupyterLab on the notebooks"
	@echo "make book    run every chapter, export the package, write README.md"
	@echo "make docs    the book as a web site in _docs (needs Quarto)"
	@echo "make look    the pages of that site in a headless Chromium: widths, colours, links, pictures, formulas"
	@echo "make bench   the benchmarks"
	@echo "make attack  what can break files, records, processes and threads: ten thousand tries a kind (hours)"
	@echo "make clean   remove what can be made again, except .venv and output"

ready:
	@PYTHON="$(PYTHON)" sh tools/environment.sh

demo: ready
	$(BIN)/symbnn compare --output output/demo

# Tests that start processes mostly wait for them: they come last, four at a time on however many cores.
PYTEST := $(BIN)/python -m pytest --maxprocesses=4 --dist=worksteal
test: ready
	@failed=0; \
	$(PYTEST) --numprocesses=$(WORKERS) -m "not slow and not processes" || failed=1; \
	$(PYTEST) --numprocesses=4 -m "processes and not slow" || failed=1; \
	exit $$failed

CHECKS := style documentation api in_step face extras project types
check: ready
	$(PYTEST) --numprocesses=$(WORKERS) $(CHECKS:%=tests/house/test_%.py)

types: ready
	$(BIN)/python -m pyright

lowest: ready
	$(BIN)/python tools/lowest.py $(PYTHONS)

# Jupyter refuses to start for root, who is the only user of most containers.
USER_ID := $(shell id -u)
lab: ready
	$(BIN)/jupyter lab $(if $(filter 0,$(USER_ID)),--allow-root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

book: ready
	$(BIN)/python tools/book.py all

quarto:
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: install it from https://quarto.org/docs/get-started/ and run make docs again." >&2; exit 1; }

docs: quarto ready
	$(BIN)/python tools/book.py site
	cd _proc && quarto render --no-cache
	rm -rf _docs && mv _proc/_docs _docs
	@echo "The site is in _docs: open _docs/index.html"

look: ready
	$(BIN)/python tools/browser.py

attack: ready
	$(BIN)/python tools/attack.py $(ATTACK)

bench: ready
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/information.py
	$(BIN)/python benchmarks/plans.py

clean:
	rm -rf _docs _proc nbdev.yml .quarto build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .last_checked
	find symbnn tests tools benchmarks nbs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

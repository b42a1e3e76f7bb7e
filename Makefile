# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first if it is not there.

SHELL := /bin/bash
PYTHON ?= python3.11 python3.12 python3
PY := .venv/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
STAMP := .venv/.lathe-installed
ROOMS := engine models data checkpoint_tools examples

# `make setup TORCH=2.11.0` installs another torch than the tested one (2.11 to 2.13 are accepted).
ifdef TORCH
.PHONY: $(STAMP)
else
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
endif

.PHONY: help setup demo test test-slow check lines clean

help:
	@echo "make setup   create .venv and install Lathe in it (TORCH=2.11.0 for another torch)"
	@echo "make demo    prepare, train on two processes, average, export and evaluate a small model"
	@echo "make test    make check, then a test of every promise (under 15 minutes on two cores)"
	@echo "make test-slow  the rest: whole matrices, many kills"
	@echo "make check   ruff and mypy"
	@echo "make lines   files and lines of each folder, and their sums"
	@echo "make clean   remove caches and build outputs; runs/ and .venv stay"

setup: $(STAMP)

demo: setup
	@$(PY) examples/demo/run.py

test: check
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m slow

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(ROOMS)

# The counting needs a Python and nothing that is installed.
lines: | $(PY)
	@$(PY) benchmarks/lines.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(ROOMS) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A name on PATH proves nothing (pyenv's shims fail when run), so each candidate is asked for its version.
$(PY):
	@for python in $(PYTHON); do \
		$$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || continue; \
		echo "setup: creating .venv with $$($$python --version)"; \
		exec $$python -m venv --clear .venv; \
	done; \
	echo "error: Lathe needs Python 3.11 or 3.12 with the venv module, and none of '$(PYTHON)' is one;" \
		"install it, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1

# torch comes first: it is the largest by far, and megatron-core may be built against it.
$(STAMP): setup.py constraints.txt | $(PY)
	@case "$(TORCH)" in 2.11|2.11.*|2.12|2.12.*|2.13|2.13.*) ;; \
		*) echo "error: TORCH=$(TORCH) is not among the accepted versions, 2.11 to 2.13" >&2; exit 1;; esac
	@sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > .venv/constraints.txt
	@echo "setup: installing torch $(TORCH), then Lathe and what it needs (a few minutes the first time)"
	@$(PIP) install -c .venv/constraints.txt torch
	@$(PIP) install -c .venv/constraints.txt -e '.[dev]'
	@touch $@
	@echo "setup: done"

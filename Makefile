# make run: train on the text that Python carries, a few minutes on a laptop; make test: everything that CI checks;
# make fuzz: many more damaged and hostile files than the tests try, for hours.
# Both set up .venv by themselves; only Python >= 3.11, git and make must be there. What was compiled once is kept in .cache.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test fuzz clean

run: $(VENV)/installed-run
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax $(BIN)/python -m experiments.run --estimator sfe --dataset docs --bytes 3000000 --out runs/first --overwrite $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -n 2 $(ARGS)

fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.hostile.fuzz $(ARGS)

$(VENV)/installed-run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/installed-run

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .cache build *.egg-info

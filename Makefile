# make run: train on the text that Python carries, a few minutes on a laptop; make test: everything that CI checks;
# make fuzz: many more damaged and hostile files than the tests try, commands killed at random moments and full disks, for hours.
# make lock: the hashes of everything that constraints.txt names; make audit: whether any of it has known vulnerabilities.
# Both set up .venv by themselves; only Python >= 3.11, git and make must be there. What was compiled once is kept in .cache.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
LOCK := requirements-locked.txt

.PHONY: run test fuzz lock audit clean

run: $(VENV)/installed-run
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax $(BIN)/python -m experiments.run --estimator sfe --dataset docs --bytes 3000000 --out runs/first --overwrite $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -n 2 $(ARGS)

lock: $(VENV)/installed-maintain
	echo '# Every file of the versions in constraints.txt by its SHA-256; written by `make lock`. pip install --require-hashes -r' > $(LOCK)
	$(BIN)/uv pip compile pyproject.toml --extra test --constraint constraints.txt --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header >> $(LOCK)

audit: $(VENV)/installed-maintain
	$(BIN)/pip-audit --requirement $(LOCK) --no-deps --disable-pip

fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.hostile.fuzz $(ARGS)
	$(BIN)/python -m tests.hostile.kills
	$(BIN)/python -m tests.hostile.full_disk

$(VENV)/installed-run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/installed-run

$(VENV)/installed-maintain: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv pip-audit
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .cache build *.egg-info

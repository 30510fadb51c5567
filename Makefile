# make run: train on the text that Python carries, a few minutes on a laptop; make test: everything that CI checks;
# make docs: the site of the documentation, in site/;
# make fuzz: many more damaged and hostile files than the tests try, commands killed at random moments and full disks, for hours.
# make lock: the hashes of everything that constraints.txt names; make audit: whether any of it has known vulnerabilities.
# Both set up .venv by themselves; only Python 3.11 to 3.13, git and make must be there. What was compiled once is kept in .cache.
# make test PYTHON=python3.13 CONSTRAINTS=: with another Python, and the newest versions that pip finds, in .venv-3.13-newest.

PYTHON ?= python3
# A file of exact versions; nothing for the newest that pyproject.toml allows.
CONSTRAINTS := constraints.txt
VERSION = $(or $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'),$(error PYTHON=$(PYTHON) is no Python that starts))
# Environments of another Python or other versions are their own.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))$(if $(CONSTRAINTS),$(patsubst %,-%,$(basename $(notdir $(filter-out constraints.txt,$(CONSTRAINTS))))),-newest)
BIN := $(VENV)/bin
ARGS ?=
LOCK := requirements-locked.txt
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALL = $(PIP) $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# The extras that tests use. Where one has no build for this Python, the others are installed all the same.
EXTRAS := docs parquet zstd bpe lab words eval tensorboard explore

.PHONY: run test docs fuzz lock audit clean

run: $(VENV)/installed-run
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax $(BIN)/python -m experiments.run --estimator sfe --dataset docs --bytes 3000000 --out runs/first --overwrite $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -n 2 $(ARGS)

docs: $(VENV)/installed-docs
	$(BIN)/python -m zensical build --clean --strict
	$(BIN)/python -m documentation.check_site site

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

$(VENV)/installed-run: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) --editable '.[test]' || { $(INSTALL) --editable '.[tools]' && for extra in $(EXTRAS); do \
		$(INSTALL) --editable ".[$$extra]" || \
			echo "The extra $$extra cannot be installed for $(PYTHON) (see pip's error): the tests that need it will skip, and say so."; \
	done; }
	touch $@ $(VENV)/installed-run

$(VENV)/installed-docs: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) --editable '.[docs]'
	touch $@

$(VENV)/installed-maintain: pyproject.toml | $(BIN)/python
	$(PIP) uv pip-audit
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf .venv .venv-* .cache build *.egg-info

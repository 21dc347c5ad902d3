# make demo, make test, make check and make bench set up .venv themselves; only Python 3.10+, pip and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-install test-cluster test-integration check bench clean

demo: $(VENV)/.installed
	$(BIN)/nnunet-ext demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-install: $(VENV)/.installed
	$(BIN)/python -m pytest -m install

test-cluster: $(VENV)/.installed
	$(BIN)/python -m pytest -m cluster --log-cli-level=INFO --log-cli-format='%(asctime)s %(message)s' --log-cli-date-format=%H:%M:%S

# DATA: a folder that holds Dataset004_Hippocampus, Dataset015_BraTS or both; without it phantoms alone
test-integration: $(VENV)/.installed
	$(BIN)/python -m tests.integration $(if $(DATA),--data "$(DATA)") $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/reversible.py --output docs/benchmarks

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'nnunet-ext needs Python >= 3.10, found ' + sys.version.split()[0] + '; call make PYTHON=python3.x')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[test,check]"
	touch $@

clean:
	rm -rf $(VENV) demo-output

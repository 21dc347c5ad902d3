# make demo, make test, make check and make bench set up .venv themselves; only Python 3.10+, pip and make are needed.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-install test-cluster test-fuzz check bench clean

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

# Random plans and data sets, the same ones for the same SEED.
test-fuzz: $(VENV)/.installed
	$(BIN)/python -m pytest tests/fuzz -m '' -n 2 --hypothesis-profile=fuzz --hypothesis-seed=$(SEED)

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

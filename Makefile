# make demo, make test, make check and make bench set up .venv themselves; only Python 3.10+, pip and make are needed.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-install test-versions test-cluster test-faults test-fuzz test-integration check check-security lock bench clean

demo: $(VENV)/.installed
	$(BIN)/nnunet-ext demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-install: $(VENV)/.installed
	$(BIN)/python -m pytest -m install

# goes on where it ended; ARGS="--only newest --keep" makes one environment and keeps it
test-versions: $(VENV)/.installed
	$(BIN)/python -m tests.install.versions $(ARGS)

test-cluster: $(VENV)/.installed
	$(BIN)/python -m pytest -m cluster --log-cli-level=INFO --log-cli-format='%(asctime)s %(message)s' --log-cli-date-format=%H:%M:%S

# Kills, full disks, signals and damaged checkpoints, drawn from SEED; summary in faults-output/.
test-faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults --seed $(SEED) --output faults-output

# Random plans and data sets, the same ones for the same SEED.
test-fuzz: $(VENV)/.installed
	$(BIN)/python -m pytest tests/fuzz -m '' -n 2 --hypothesis-profile=fuzz --hypothesis-seed=$(SEED)

# DATA: a folder that holds Dataset004_Hippocampus, Dataset015_BraTS or both; without it phantoms alone
test-integration: $(VENV)/.installed
	$(BIN)/python -m tests.integration $(if $(DATA),--data "$(DATA)") $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# not part of `check`: what is known of a package changes from day to day
check-security: $(VENV)/.installed
	$(BIN)/python -m tests.install.audit

# keeps the versions that tests/lock.txt has, as far as pyproject.toml allows them; UPGRADE=--upgrade takes the newest
lock:
	uv --version || { echo "make lock needs uv: pip install uv"; exit 1; }
	uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-emit-package pip $(UPGRADE) \
		--custom-compile-command "make lock" --extra test --extra check pyproject.toml -o tests/lock.txt

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/reversible.py --output docs/benchmarks

$(VENV)/.installed: pyproject.toml tests/lock.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'nnunet-ext needs Python >= 3.10, found ' + sys.version.split()[0] + '; call make PYTHON=python3.x')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[test,check]" -c tests/lock.txt
	touch $@

clean:
	rm -rf $(VENV) demo-output

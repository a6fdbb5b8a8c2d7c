# make demo | make test: both set everything up first. PYTHON=python3.12 chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo-out
export HF_HUB_OFFLINE = 1

.PHONY: help setup demo test test-slow lint benchmarks clean

help:
	@echo "make demo       label 200 samples end to end on this machine (SPEECH=DIR NOISE=DIR RIR=DIR: on your audio)"
	@echo "make test       the tests;  make test-slow: the long fault and memory campaigns"
	@echo "make lint       ruff and mypy;  make benchmarks: measured ratios"

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@# Without its dependencies: it asks for torchaudio, and only its weights file is used.
	$(BIN)/python -m pip install --quiet --no-deps distillmos==0.9.1
	@touch $@

demo: setup
	$(BIN)/python jobs/demo.py --out "$(OUT)" $(if $(SPEECH),--speech "$(SPEECH)") \
		$(if $(NOISE),--noise "$(NOISE)") $(if $(RIR),--rir "$(RIR)")

test: setup
	$(BIN)/python -m pytest -q

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: setup
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info platform/*.egg-info demo-out

# make demo | make test: both set everything up first. PYTHON=python3.12 chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo-out
LOCKED ?= requirements.lock
export HF_HUB_OFFLINE = 1

.PHONY: help setup demo quick test test-slow lint docs benchmarks lock clean

help:
	@echo "make demo       label 200 samples, train a student and compare it on a page (SPEECH=DIR NOISE=DIR RIR=DIR: on your audio)"
	@echo "make test       the tests;  make quick: those that start no Ray and no server;  make test-slow: the long fault and memory campaigns"
	@echo "make lint       ruff, spelling, mypy and the docs;  make docs: the pages of docs/ as a site in site/;  make benchmarks: measured ratios"
	@echo "make lock       requirements.lock, which the nodes of a cluster install, from what .venv has"

setup: .venv/.installed

.venv/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[dev]"
	@# Without its dependencies: it asks for torchaudio, and only its weights file is used.
	$(BIN)/python -m pip install --quiet --no-deps distillmos==0.9.1
	@# Without its dependencies too: the network that recipe paper calls Demucs (CC BY-NC 4.0), for its tests.
	$(BIN)/python -m pip install --quiet --no-deps denoiser==0.1.5
	@# And DNSMOS, the head of XLS-R (MIT) and the speaker encoder (Apache-2.0), whose packages are not imported either.
	$(BIN)/python -m pip install --quiet --no-deps speechmos==0.0.1.1 xls-r-sqa==0.1.0 resemblyzer==0.1.4
	@# Built from source; without a C compiler its tests are skipped.
	$(BIN)/python -m pip install --quiet --constraint requirements.lock pesq==0.0.4 || true
	@touch $@

demo: setup
	$(BIN)/python jobs/demo.py --out "$(OUT)" $(if $(SPEECH),--speech "$(SPEECH)") \
		$(if $(NOISE),--noise "$(NOISE)") $(if $(RIR),--rir "$(RIR)")

test: setup
	@# Two Rays side by side slow each other down: one process runs the tests that start one, another the rest.
	@mkdir -p .pytest_cache
	@$(BIN)/python -m pytest -q --durations=30 -m "not slow and not ray" > .pytest_cache/without-ray.txt 2>&1 & others=$$!; \
	$(BIN)/python -m pytest -q --durations=30 -m "ray and not slow"; failed=$$?; \
	wait $$others || failed=1; cat .pytest_cache/without-ray.txt; exit $$failed

quick: setup
	$(BIN)/python -m pytest -q -m "not slow and not ray and not server" --numprocesses 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: setup
	$(BIN)/mkdocs build --strict

benchmarks: setup
	@# What the released model needs beside torch; score.py compares with it.
	$(BIN)/python -m pip install --quiet --no-deps xls-r-sqa==0.1.0
	@# By hand: distillation.py and pruning_criteria.py, which take long, and real recordings, and what on_gpu.sh runs.
	for script in $(filter-out $(patsubst %,benchmarks/%.py,distillation pruning_criteria on_gpu gpu_job figures),$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Walks from the dependencies in pyproject.toml through the metadata of what is installed in .venv.
define LOCK
import sys, tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

direct = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]

def closure(platform):
    found, lines = set(), [(line, "") for line in direct]
    for line, extra in lines:  # grows while it is read
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": extra, **platform}):
            continue
        for pair in {(canonicalize_name(need.name), of) for of in ("", *need.extras)} - found:
            try:
                lines += [(needed, pair[1]) for needed in requires(pair[0]) or ()]
            except PackageNotFoundError:  # for another platform: it cannot be pinned from here
                continue
            found.add(pair)
    return {name for name, _ in found}

linux = closure({"sys_platform": "linux", "platform_system": "Linux"})
windows = closure({"sys_platform": "win32", "platform_system": "Windows"})
python = ".".join(map(str, sys.version_info[:2]))
print(f"""# What every node of a cluster installs: the run-time dependencies in pyproject.toml and all that they need, at the
# versions that the tests ran with. Made by `make lock` from the metadata of the packages in .venv; not edited by hand.
# Python {python}. torch is pinned without its build: an index of CPU wheels gives the CPU build, PyPI the CUDA build,
# whose own metadata pins the nvidia-* packages.
# A second command installs the wheel with the teacher's weights, which asks for torchaudio without need:
#   pip install --no-deps distillmos=={version("distillmos")}""")
for name in sorted(linux):
    print(name, "==", version(name).split("+")[0], "" if name in windows else ' ; sys_platform != "win32"', sep="")
endef
export LOCK

# For newer versions: pip install --upgrade what should change into .venv, make test, make lock.
lock:
	$(BIN)/python -c "$$LOCK" > $(LOCKED).new
	mv $(LOCKED).new $(LOCKED)

clean:
	rm -rf .venv build dist site *.egg-info platform/*.egg-info demo-out

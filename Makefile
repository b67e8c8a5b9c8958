# run · test · check · bench · lab: each sets up .venv first if it is missing or older than the dependency lists.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
# The CPU build of torch where pip offers one; on a machine with an NVIDIA GPU the default build. Or choose: make TORCH=torch==2.13.0
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch==2.13.0 || echo torch==2.13.0+cpu)
PROFILE ?= quick
# waiting threads leave the cores to other processes; a value set by the user has priority
export OMP_WAIT_POLICY ?= PASSIVE
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints.txt

.PHONY: help run test check bench bench-gpu lab setup lock clean

run: $(READY)
	$(BIN)/python run_all.py --profile $(PROFILE)

help:
	@echo "make run     run a profile, quick by default: PROFILE=laptop for every part of every study"
	@echo "make check   lint, types, and the tests of what changed: at most a minute and a half"
	@echo "make test    lint, types, and all tests: about ten minutes on two cores"
	@echo "make bench   every performance goal, measured"
	@echo "make bench-gpu  published sizes on a GPU, eight minutes, with the torch that is there: nothing is installed"
	@echo "make lab     JupyterLab with the notebooks"

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m tests.changed

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

# a server with a GPU has a torch of its own, and often no network: its Python runs this from the checkout
bench-gpu:
	PYTHONPATH=lib HF_HUB_OFFLINE=1 $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m overparam.cli.bench_gpu

lab: $(READY)
	$(BIN)/python -m ipykernel install --prefix $(VENV) --name python3 --display-name "Python 3 (overparam)"
	$(BIN)/jupyter lab notebooks

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "overparam needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	@echo "setting up $(VENV): a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)" 2>/dev/null || { echo "pip offers no $(TORCH) here: taking the default build of torch"; $(PIP) torch; }
	@$(PIP) --editable ".[dev]"
	@touch $@

lock: $(READY)
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(pip|setuptools)==' | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > constraints.new
	@mv constraints.new constraints.txt && touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build lib/*.egg-info

# The few words a person needs. Only Python 3.11+ and make are expected.
PYTHON ?= python3
BIN := .venv/bin
# Where there is no NVIDIA GPU, the CPU build of torch and not gigabytes of CUDA.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints/cpu.txt)

.PHONY: setup quickstart check test quality docs

setup: .venv/ready

.venv/ready: pyproject.toml constraints/cpu.txt scavenger-recipes.pth
	@echo 'setting up .venv: about two minutes and 2 GB'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/accelerate launch recipes/quickstart.yaml

# Two workers of one thread each: on two cores faster than one worker of two threads.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Before every commit: what needs less than a second each.
check: setup quality
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not gpu'

quality: setup
	$(BIN)/ruff check .

# The documentation, into site/; a broken link is an error.
docs: setup
	$(BIN)/mkdocs build --strict

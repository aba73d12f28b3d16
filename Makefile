# The two commands a new user needs: make demo, make test. Both make .venv if it is not there.

PYTHON ?= python3
BIN := .venv/bin
# Where make bench saves its times, and finds those to compare with.
BENCH_STORAGE ?= .benchmarks
DATA := $(wildcard ../shared/data)
ifneq ($(DATA),)
export BENCH_DATA ?= $(abspath $(DATA))
endif

.PHONY: help venv demo test check bench chaos gpu-check cluster-test clean

help:
	@echo "make demo   compare MAML, FOMAML, ANIL and Reptile on the built-in data, about 5 minutes"
	@echo "make test   the checks and the tests"
	@echo "make check  ruff and mypy alone"
	@echo "make bench  the speed benchmarks"
	@echo "make chaos  all faults of processes and disks, counted in docs/reliability.md"
	@echo "make venv   the environment alone, in .venv"
	@echo "make cluster-test  Ray and Slurm's stand-ins, whose packages it installs; several minutes"

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; set PYTHON=") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python -m bench run --algos maml,fomaml,anil,reptile --shots 1,5 --episodes 200 --out results/demo

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest --numprocesses auto

bench: venv
	$(BIN)/python -m pytest tests/performance/bench_costs.py --benchmark-only \
		--benchmark-storage=file://$(abspath $(BENCH_STORAGE)) --benchmark-autosave \
		--benchmark-compare --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name

chaos: venv
	$(BIN)/python -m pytest tests/chaos --whole --timeout 3600 --counts-to docs/reliability.md

gpu-check: venv
	$(BIN)/python -m pytest -m gpu -rs
	$(BIN)/python -m bench run --algos maml,fomaml,anil,reptile --iterations 50 --out results/gpu-check

cluster-test: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray,slurm]'
	$(BIN)/python -m pytest -rs tests/clusters/ray_cluster.py tests/clusters/slurm_cluster.py

clean:
	rm -rf .venv build *.egg-info

# The two commands a new user needs: make demo, make test. Both make .venv if it is not there.

PYTHON ?= python3
BIN := .venv/bin
# Where make bench saves its times, and finds those to compare with.
BENCH_STORAGE ?= .benchmarks
# For make fuzz, each reader.
SECONDS ?= 60
# The Python of the peers' environment.
PEERS_PYTHON ?= python3.11
DATA := $(wildcard ../shared/data)
ifneq ($(DATA),)
export BENCH_DATA ?= $(abspath $(DATA))
endif

.PHONY: help venv demo test check bench peers bench-peers soak many-cells chaos fuzz properties \
	gpu-check cluster-test clean

help:
	@echo "make demo         compare MAML, FOMAML, ANIL and Reptile on the built-in data, about 5 minutes"
	@echo "make test         the checks and the tests"
	@echo "make check        ruff and mypy alone"
	@echo "make bench        the speed benchmarks; after make peers, bench-peers too"
	@echo "make peers        other libraries (TorchOpt, learn2learn, JAX), in .venv-peers"
	@echo "make bench-peers  they beside the engines: half an hour, with nothing beside it"
	@echo "make gpu-check    what needs a GPU: its tests, and a short run on it"
	@echo "make soak         20,000 meta-iterations, and what grows meanwhile"
	@echo "make many-cells   how long a run of 5,000 cells takes to read"
	@echo "make chaos        all faults of processes and disks, counted in docs/reliability.md"
	@echo "make fuzz         fuzz the readers for SECONDS each (60); figures to docs/reliability.md"
	@echo "make properties   the property tests with 1,000 examples each"
	@echo "make venv         the environment alone, in .venv"
	@echo "make cluster-test Ray and Slurm's stand-ins, whose packages it installs; several minutes"
	@echo "make clean        what the others made, results apart"

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
	if [ -e .venv-peers/ready ]; then $(MAKE) bench-peers; fi

peers: .venv-peers/ready

.venv-peers/ready: tests/performance/peers/constraints.txt tests/performance/peers/install.sh
	tests/performance/peers/install.sh .venv-peers $(PEERS_PYTHON)
	touch $@

# On a quiet machine: PEERS_OPTIONS="--settings omniglot --seconds 10" for less of it.
bench-peers: venv
	mkdir -p $(BENCH_STORAGE)
	$(BIN)/python -m tests.performance.peers --out $(BENCH_STORAGE)/peers.json $(PEERS_OPTIONS)

soak: venv
	nice -n 5 $(BIN)/python -m tests.performance.soak --engine batched --iterations 20000
	nice -n 5 $(BIN)/python -m tests.performance.soak --engine higher --iterations 20000

# Folders of synthetic results, 300 MB, that are kept for the next time.
many-cells: venv
	$(BIN)/python -m tests.performance.many_cells build/many-cells/wide --shape wide
	$(BIN)/python -m tests.performance.many_cells build/many-cells/swept --shape swept

chaos: venv
	$(BIN)/python -m pytest tests/chaos --whole --timeout 3600 --counts-to docs/reliability.md

fuzz: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	nice -n 5 $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

properties: venv
	BENCH_PROPERTIES=long $(BIN)/python -m pytest --numprocesses auto --timeout 7200 \
		tests/bench/test_any_command.py tests/bench/test_hostile.py tests/datasets/test_episodes.py

gpu-check: venv
	$(BIN)/python -m pytest -m gpu -rs
	$(BIN)/python -m bench run --algos maml,fomaml,anil,reptile --iterations 50 --out results/gpu-check

cluster-test: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray,slurm]'
	$(BIN)/python -m pytest -rs tests/clusters/ray_cluster.py tests/clusters/slurm_cluster.py

clean:
	rm -rf .venv .venv-peers build *.egg-info

# The two commands a new user needs: make demo, make test. Both make .venv if it is not there.

PYTHON ?= python3
BIN := .venv/bin
# Where make bench saves its times, and finds those to compare with.
BENCH_STORAGE ?= .benchmarks
# The Python of the peers' environment.
PEERS_PYTHON ?= python3.11
DATA := $(wildcard ../shared/data)
ifneq ($(DATA),)
export BENCH_DATA ?= $(abspath $(DATA))
endif

.PHONY: help venv demo test check bench peers bench-peers gpu-check clean

help:
	@echo "make demo   compare MAML, FOMAML, ANIL and Reptile on the built-in data, about 5 minutes"
	@echo "make test   the checks and the tests"
	@echo "make check  ruff and mypy alone"
	@echo "make bench  the speed benchmarks; after make peers, other libraries beside the engines too"
	@echo "make venv   the environment alone, in .venv"

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

gpu-check: venv
	$(BIN)/python -m pytest -m gpu -rs
	$(BIN)/python -m bench run --algos maml,fomaml,anil,reptile --iterations 50 --out results/gpu-check

clean:
	rm -rf .venv .venv-peers build *.egg-info

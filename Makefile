# Every check has a fixer: lint/fix, verify/proto, lock. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
PROTOS := $(wildcard protos/tokenmesh/v1/*.proto)
STUBS  := tokenmesh/v1

.DEFAULT_GOAL := help

.PHONY: help setup demo up test test-unit test-gpu browser lint types fix proto dashboards verify lock bench bench-mesh \
  bench-tknp bench-kv bench-codecs bench-telemetry bench-gpu bench-multigpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-15s %s\n", $$1, $$2}'

setup: $(DEV) ## install everything into .venv

# torch comes first and alone, so that its CPU build can be chosen; the lock is complete, hence --no-deps: resolving
# again would bring builds that do not match that torch. pip compiles 24,000 modules on one core; this is done on all.
$(READY): requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # some files are templates, or for other Pythons
	touch $@

# What checks, tests and benchmarks need besides.
$(DEV): $(READY) requirements/dev.lock
	$(BIN)/pip install --quiet --no-deps -r requirements/dev.lock
	touch $@

demo: $(READY) ## bring a mesh up, ask it three questions, take it down
	$(BIN)/tokenmesh demo -c examples/mesh.yaml

up: $(READY) ## bring a mesh up and watch it until Ctrl-C
	$(BIN)/tokenmesh up -c examples/mesh.yaml

test: $(DEV) ## all tests; starts one mesh
	$(BIN)/pytest tests

test-unit: $(DEV) ## tests that start no engine
	$(BIN)/pytest tests/unit

browser: ## what tests of the live page need besides node and chromium; without it they are skipped
	cd tests/page && npm ci

lint: $(DEV) ## style, spelling, layering, protos, containers, manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/python deploy/check_manifests.py

types: $(DEV) ## mypy, strict
	$(BIN)/mypy

fix: $(DEV) ## what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/codespell --write-changes
	$(BIN)/buf format --write protos

proto: $(DEV) ## regenerate the stubs
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

dashboards: $(DEV) ## write Grafana dashboards and Prometheus rules again
	$(BIN)/python deploy/make_dashboards.py deploy

verify: $(DEV) ## the committed stubs, dashboards and rules are those of their sources
	rm -rf build/verify && mkdir -p build/verify
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=build/verify --pyi_out=build/verify \
	  --grpc_python_out=build/verify $(PROTOS)
	touch build/verify/tokenmesh/v1/__init__.py
	diff -r -x __pycache__ build/verify/tokenmesh/v1 $(STUBS) || (echo "run 'make proto'" && false)
	$(BIN)/python deploy/make_dashboards.py build/verify/deploy
	diff -r build/verify/deploy/grafana deploy/grafana && \
	  diff build/verify/deploy/prometheus/rules.yaml deploy/prometheus/rules.yaml || \
	  (echo "run 'make dashboards'" && false)
	@if command -v promtool >/dev/null; then promtool check config deploy/prometheus/prometheus.yaml; \
	  else echo "NOT CHECKED: promtool (Debian: prometheus) is not installed, so queries were not parsed"; fi

LOCK = uv pip compile --quiet --override overrides.txt --python-version 3.11 --no-header --no-annotate \
  --no-emit-find-links --no-emit-package torch

lock: ## resolve requirements/*.in again (needs uv)
	cd requirements && $(LOCK) cpu.in -o cpu.lock && $(LOCK) dev.in -c cpu.lock -o dev.full
	cd requirements && grep -vxFf cpu.lock dev.full > dev.lock; rm dev.full

bench: bench-mesh bench-tknp bench-kv bench-codecs bench-telemetry ## all benchmarks of this machine

bench-telemetry: $(DEV) ## spans on against off, paired; JSON and plot in build/bench
	$(BIN)/python -m benchmarks.telemetry

bench-mesh: $(DEV) ## the mesh against a plain engine, paired; JSON and plot in build/bench
	$(BIN)/python -m benchmarks.mesh

bench-tknp: $(DEV) ## two ranks against one, and the exchange alone; JSON and plot in build/bench
	$(BIN)/python -m benchmarks.tknp

bench-kv: $(DEV) ## KV to its owner against UCX alone, NIXL and a socket; JSON and plot in build/bench
	$(BIN)/python -m benchmarks.kv

bench-codecs: $(DEV) ## KV codecs on real KV: ratio and speed; JSON in build/bench
	$(BIN)/python -m benchmarks.codecs

# On a machine with a GPU, in whatever environment has vLLM for it: this checkout is used as it is.
bench-gpu: ## a root with ranks on its own GPU against plain vLLM; JSON in build/bench
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

bench-multigpu: ## token parallelism over all GPUs of this host against tensor parallelism and replicas; JSON in build/bench
	PYTHONPATH=. $(PYTHON) -m benchmarks.multigpu

test-gpu: ## tests that need a GPU
	PYTHONPATH=. $(PYTHON) -m pytest tests/gpu

clean: ## remove what was built, keep the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

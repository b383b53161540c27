# make demo          set up, convert the small checkpoint that ships with the repository, generate text
# make test          set up, run the tests
# make test-server   llama.cpp's own server tests, with tsconv serve and with llama-server alone
# make wheel         wheels in dist/, which install without a compiler on machines like this one
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -q
NATIVE := $(shell find native -type f)
C_CODE := $(filter %.c %.h %.cpp %.cu %.cuh,$(NATIVE))
DEMO   := build/demo

.PHONY: setup wheel demo test test-server test-vulkan test-asan test-arm test-x86 lint format bench bench-quick bench-stream bench-gpu bench-tools bench-kernels clean

setup: $(VENV)/.installed

# llama-cpp-python is compiled once for this CPU and compiler and its wheel kept for other checkouts.
COMPAT := $(CURDIR)/native/compat/amx_tile_config.h
WHEEL_KEY := $(shell (c++ --version; grep -m1 flags /proc/cpuinfo; cat $(COMPAT)) 2>/dev/null | sha256sum | cut -c1-12)
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tsconv
WHEELS := $(CACHE)/wheels-$(WHEEL_KEY)
LLAMA := $(shell sed -n 's/^ *"\(llama-cpp-python==.*\)",$$/\1/p' pyproject.toml)
# llama-server and the rest of llama.cpp's programs are compiled once too. LLAMA_CPP_SOURCE names the unpacked source
# distribution of llama-cpp-python where it cannot be downloaded.
PROGRAMS_KEY := $(WHEEL_KEY)-$(shell (cat native/programs/*; command -v npm) | sha256sum | cut -c1-8)
PROGRAMS := $(CACHE)/programs-$(PROGRAMS_KEY)
# And so are its backends for GPUs: make setup CUDA=1, HIP=1 or VULKAN=1 adds one for good, CUDA=0 takes it away.
GPU_KEY := $(WHEEL_KEY)-$(shell cat native/programs/* native/compat/vulkan/* | sha256sum | cut -c1-8)
GPU_CHOSEN := $(shell cat $(VENV)/.gpu 2>/dev/null)
gpu_choice = $(if $(filter 1,$($(1))),$(2),$(if $(filter 0,$($(1))),,$(filter $(2),$(GPU_CHOSEN))))
GPU := $(strip $(call gpu_choice,CUDA,cuda) $(call gpu_choice,HIP,hip) $(call gpu_choice,VULKAN,vulkan))
gpu_module = $(CACHE)/$(1)-$(GPU_KEY)/bin/libggml-$(1).so
GPU_MODULES := $(foreach name,$(GPU),$(call gpu_module,$(name)))
# What computes FFNs on a CUDA GPU takes two minutes to compile: only where one is, or llama.cpp's backend for one.
CUDA_MODULE := $(if $(filter cuda,$(GPU))$(wildcard /dev/nvidiactl /dev/dxg),AUTO,OFF)
PROGRAM_FOLDERS := $(subst $() ,;,$(strip $(PROGRAMS)/bin $(patsubst %/,%,$(dir $(GPU_MODULES)))))

# The build tools and llama-cpp-python come first: the native library is compiled against the very ggml it will run in.
$(VENV)/.dependencies: pyproject.toml constraints.txt $(COMPAT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt scikit-build-core cmake ninja
	ls $(WHEELS)/llama_cpp_python-*.whl >/dev/null 2>&1 || { \
	    echo "compiling $(LLAMA): this takes some minutes, once" && \
	    CXXFLAGS="-include $(COMPAT)" $(PIP) wheel --no-cache-dir --no-deps --no-binary llama-cpp-python -w $(WHEELS) $(LLAMA); }
	$(PIP) install -c constraints.txt --find-links $(WHEELS) --only-binary llama-cpp-python llama-cpp-python
	touch $@

# Without the programs everything works but `tsconv serve` and `tsconv tools`, which say so.
$(PROGRAMS)/bin/llama-server: | $(VENV)/.dependencies
	mkdir -p build
	@echo "compiling llama.cpp's programs: this takes some minutes, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" native/programs/build $(PROGRAMS) > build/programs.log 2>&1 || \
	    echo "llama.cpp's programs were not built: see build/programs.log"

# What each needs beside a C++ compiler. Debian: libvulkan-dev glslc spirv-headers; NVIDIA's CUDA toolkit; AMD's ROCm.
define gpu_rule
$(call gpu_module,$(1)): | $(VENV)/.dependencies
	mkdir -p build
	@echo "compiling llama.cpp's backend for $(1): this takes 5 minutes, for CUDA 30 or more, once"
	PATH="$(CURDIR)/$(BIN):$$$$PATH" native/programs/build $(CACHE)/$(1)-$(GPU_KEY) $(1) > build/gpu-$(1).log 2>&1 || { \
	    grep -i -m 3 error build/gpu-$(1).log; \
	    echo "llama.cpp's backend for $(1) was not built: see build/gpu-$(1).log, and docs/gpu.md for what it needs"; \
	    exit 1; }
endef
$(foreach name,cuda hip vulkan,$(eval $(call gpu_rule,$(name))))

# The chosen ones; touched when they change.
ifneq ($(GPU),$(strip $(GPU_CHOSEN)))
.PHONY: $(VENV)/.gpu
endif
$(VENV)/.gpu: | $(VENV)/.dependencies $(GPU_MODULES)
	echo "$(GPU)" > $@

$(VENV)/.installed: $(VENV)/.dependencies $(VENV)/.gpu $(NATIVE) $(PROGRAMS)/bin/llama-server
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation \
	    -C "cmake.define.TSFFN_PROGRAMS=$(PROGRAM_FOLDERS)" -C "cmake.define.TSFFN_CUDA=$(CUDA_MODULE)" -e ".[dev]"
	touch $@

# Wheels of tsconv, llama.cpp's programs included, and of llama-cpp-python: both are compiled for this processor.
wheel: setup
	rm -rf dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-deps --no-build-isolation \
	    -C "cmake.define.TSFFN_PROGRAMS=$(PROGRAM_FOLDERS)" -C build-dir=build/wheel -w dist .
	cp $(WHEELS)/llama_cpp_python-*.whl dist

demo: setup
	mkdir -p $(DEMO)
	$(BIN)/tsconv convert checkpoints/tiny-turbosparse-mistral --outtype q4_0 --outfile $(DEMO)/tiny-turbosparse-mistral-q4_0.gguf --force
	$(BIN)/tsconv run -m $(DEMO)/tiny-turbosparse-mistral-q4_0.gguf -p "And it came to pass" -n 96 --temp 0.7 --seed 1

# As many tests at once as there are CPUs, within what they need of memory.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# llama.cpp's own server tests, with tsconv serve and with llama-server alone: the same must pass. 5 to 9 minutes.
test-server: setup
	$(PIP) install -c constraints.txt -r tests/llama_server/requirements.txt
	$(BIN)/python tests/llama_server/run.py $(PYTEST)

# Attention on llama.cpp's Vulkan backend, which needs no GPU where Mesa's lavapipe computes on the CPU:
# apt-get install libvulkan-dev glslc spirv-headers mesa-vulkan-drivers
ifeq ($(and $(shell command -v glslc),$(wildcard /usr/include/vulkan/vulkan.hpp)),)
test-vulkan:
	@echo "skipped: needs Vulkan's headers and a driver: apt-get install libvulkan-dev glslc spirv-headers mesa-vulkan-drivers"
else
test-vulkan: setup $(call gpu_module,vulkan)
	TSCONV_TEST_VULKAN=$(call gpu_module,vulkan) GGML_VK_VISIBLE_DEVICES=0 $(BIN)/python -m pytest tests/e2e/test_vulkan.py
endif

# The native library and its tests under AddressSanitizer and UndefinedBehaviorSanitizer.
test-asan: setup
	native/tests/run_sanitized $(BIN)/python build/asan

# The kernels and the FFN for 64-bit ARM, under qemu: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
test-arm: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" native/tests/run_qemu build/arm

# The kernels of every x86 tier, AVX-512 and AMX included, on any processor: apt-get install libsimde-dev
test-x86: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" native/tests/run_emulated build/emulated

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_CODE)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_CODE)

# Speed beside dense baselines: 10 minutes on two cores with 24 GiB, generating the models included; quick: 2 minutes.
# After that, llama-server with several clients.
# More options in BENCH: BENCH="--compare build/bench-old.json" for the change since the time before,
# BENCH="--baseline dense-drelu", BENCH="-t 1,2".
bench: setup
	mkdir -p build
	test ! -e build/bench.json || mv build/bench.json build/bench-old.json
	$(BIN)/tsconv bench --suite full --save build/bench.json $(BENCH)
	$(BIN)/tsconv bench --clients 1,2,4,8 -r 2 --save build/bench-clients.json

bench-quick: setup
	mkdir -p build
	$(BIN)/tsconv bench --suite quick --save build/bench-quick.json $(BENCH)
	$(BIN)/tsconv bench --clients 1,4 -r 2 --layers 4 --save build/bench-clients-quick.json

# A model larger than memory: 7B Q4_0 (4.4 GB) in memory control groups, beside llama.cpp; needs the right to make them.
bench-stream: setup
	mkdir -p build
	$(BIN)/python -m tsconv.bench.stream --save build/bench-stream.json $(BENCH)

# What a GPU computes: whether it is right, then how fast it is, beside the CPU alone and llama.cpp on the same GPU. After
# eight minutes nothing new begins, and what is left out is named. Skipped without a GPU.
bench-gpu: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S native -B build/tests -G Ninja -DTSFFN_TESTS=ON >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/tests --target test_cuda
	$(BIN)/python -m tsconv.bench.gpu_suite --kernels build/tests/tests/cuda/test_cuda --save build/bench-gpu.json $(BENCH)

# What conversion, profiling and perplexity cost.
bench-tools: setup
	$(BIN)/python -m tsconv.bench.convert
	$(BIN)/python -m tsconv.bench.profile
	$(BIN)/python -m tsconv.bench.evaluate

# Row kernels alone, on every ISA tier of this machine. BENCH_KERNELS="--threads 1 --isa avx2" and such: see --help.
bench-kernels: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S native -B build/bench -G Ninja -DTSFFN_KERNELS_ONLY=ON -DTSFFN_BENCH=ON >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/bench
	build/bench/bench/bench_kernels $(BENCH_KERNELS)

clean:
	rm -rf build $(VENV) .mypy_cache .pytest_cache .ruff_cache

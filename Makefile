# Every target works on a machine that has Python >= 3.10, make and a C++17 compiler; the rest is
# installed into $(VENV). A second call of a target does only what changed.
#
#   make demo        build, then prune, convert and measure a real model   (DEMO_ARGS=--quick: short form)
#   make test        all tests: pytest (TEST_ARGS=...) and the C++ programs
#   make simt        the CUDA sources on the emulator that runs them without a GPU
#   make bench       the quick benchmark and its table                     (BENCH_ARGS=--all-shapes: full)
#   make test-aarch64  the C++ programs for 64-bit Arm, cross-compiled and emulated
#   make tensorrt    the TensorRT plugins and their tests, without TensorRT (TENSORRT_INCLUDE_DIR=its headers)
#   make cuda-report compiles the CUDA kernels for every GPU; registers, spills, instructions: docs/cuda_kernels.md
#   make regimes     every regime against the fastest dense path           (REGIMES_ARGS=--peers: sparse engines too)
#   make gpu-bench   builds for this machine's GPU, tests it, measures it  (OUT=DIR, GPU_ARGS=quick: short form)
#   make conv-layers convolutions of known networks, against the same     (CONV_ARGS=...)
#   make pruning     what pruning costs: every method, on two models; hours  (PRUNING_ARGS=...)
#   make models      whole models against every engine                     (MODELS_ARGS=...)
#   make peers-env   what --peers needs: engines with a Python of their own (PEERS_PYTHON: a Python 3.11)
#   make lint        ruff, mypy, clang-format, import-linter, and the rules they cannot express
#   make sanitize    C++ tests under ASan+UBSan and under TSan
#   make docs        HTML documentation in docs/_build/html, warnings as errors
#   make dev         editable build with every extra
#   make wheel       wheel in dist/, with code for every GPU; fails where it would not run on Ubuntu 22.04
#   make sdist       source distribution in dist/
#   make cross-aarch64  the C++ library with CUDA for Jetsons, cross-compiled and tried in the emulator: dist/*.tar.gz
#   make wheel-aarch64  the wheel for 64-bit Arm, cross-compiled (PYTHON: which version of Python it is for)
#   make clean       removes build outputs, keeps $(VENV)

SHELL  := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-python test-cpp simt test-aarch64 tensorrt cuda-report bench regimes conv-layers pruning gpu-bench models peers-env lint format sanitize docs dev wheel sdist aarch64-tools cross-aarch64 wheel-aarch64 clean

PYTHON    ?= python3
VENV      ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
REGIMES_ARGS ?=
CONV_ARGS ?=
PRUNING_ARGS ?=
GPU_ARGS   ?=
OUT        ?= build/gpu
MODELS_ARGS ?=
# GPUs that development builds compile for: native, a list such as "80;90", or all (minutes). Wheels get all.
CUDA_ARCHITECTURES ?= 80
WHEEL_ARCHITECTURES ?= all
PEERS_PYTHON ?= python3.11
# Folders of NvInferRuntime.h: of the oldest TensorRT to serve, and of a newer one whose programs shall call the same
# library. Another Python that has pytest and tensorrt or tensorrt_lean loads the library into its registry, too.
TENSORRT_INCLUDE_DIR ?=
TENSORRT_INCLUDE_DIR_NEWER ?=
TENSORRT_PYTHON ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# CMake and Ninja of the environment come first where they had to be installed.
export PATH := $(abspath $(BIN)):$(PATH)
# Every pip call, isolated builds included.
export PIP_CONSTRAINT := $(abspath constraints.txt)

NATIVE := CMakeLists.txt $(wildcard cmake/*.cmake) $(shell find csrc -type f)

# ---- environment ----------------------------------------------------------------------------------

$(VENV)/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparsekit needs Python >= 3.10; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'scikit-build-core>=0.10' 'pybind11>=2.13'
	@version=$$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p'); \
	printf '%s\n' 3.25 "$${version:-0}" | sort -VC || $(PIP) install --quiet cmake
	@command -v ninja >/dev/null || $(PIP) install --quiet ninja
	touch $@

CUDA_FOR = --config-settings='cmake.define.SPARSEKIT_CUDA_ARCHITECTURES=$(1)'

# $(VENV)/.extra-<name>: the package, editable, with one of its extras. Rebuilds what changed.
$(VENV)/.extra-%: $(VENV)/.tools pyproject.toml $(NATIVE)
	$(PIP) install --quiet --no-build-isolation $(call CUDA_FOR,$(CUDA_ARCHITECTURES)) --editable '.[$*]'
	touch $@

dev: $(VENV)/.extra-dev

# ---- running it -----------------------------------------------------------------------------------

demo: $(VENV)/.extra-demo
	$(BIN)/sparsekit demo $(DEMO_ARGS)

bench: $(VENV)/.extra-bench
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json $(BENCH_ARGS)
	$(BIN)/python -m bench.report build/bench.json --out bench/results

regimes: $(VENV)/.extra-bench
	$(BIN)/python -m bench.regimes $(REGIMES_ARGS)

conv-layers: $(VENV)/.extra-bench
	$(BIN)/python -m bench.conv_layers $(CONV_ARGS)

pruning: $(VENV)/.extra-models
	$(BIN)/python -m bench.pruning digits $(PRUNING_ARGS)
	$(BIN)/python -m bench.pruning minilm $(PRUNING_ARGS)
	$(BIN)/python -m bench.pruning pareto
	$(BIN)/python -m bench.pruning report

# With the torch, CUDA compiler and tools that are there: nothing is installed but the package.
gpu-bench:
	PYTHON=$(PYTHON) bench/gpu.sh $(OUT) $(GPU_ARGS)

models: $(VENV)/.extra-models
	$(BIN)/python -m bench.models $(MODELS_ARGS)

# Their numpy, protobuf and Python are not ours; the constraints are for torch.
peers-env: $(VENV)/peers/deepsparse/.done $(VENV)/peers/xnnpack/.done

$(VENV)/peers/deepsparse/.done: PACKAGES = --only-binary deepsparse deepsparse==1.8.0 'numpy<2'
$(VENV)/peers/xnnpack/.done: PACKAGES = ai-edge-litert
$(VENV)/peers/%/.done: $(VENV)/.tools
	$(PEERS_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet $(PACKAGES)
	touch $@

# ---- checking it ----------------------------------------------------------------------------------

test: test-cpp test-python

test-python: $(VENV)/.extra-test
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(TEST_ARGS)

CTEST = cmake --build build/$(1) && ctest --test-dir build/$(1) --output-on-failure --parallel 2
CONFIGURE = cmake -G Ninja -S . -B build/$(1) -DSPARSEKIT_BUILD_TESTS=ON -DSPARSEKIT_WERROR=ON \
  '-DSPARSEKIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)'

test-cpp: $(VENV)/.tools
	$(call CONFIGURE,cpp)
	$(call CTEST,cpp)

simt: $(VENV)/.tools
	$(call CONFIGURE,cpp)
	$(call CTEST,cpp) -R simt

# Once with every feature that the emulator has and once as a CPU without bf16. The first run compares
# every kernel with its reference, those for NEON too; the second one looks at the choice among them.
test-aarch64: $(VENV)/.tools aarch64-tools
	$(call CONFIGURE,aarch64) --toolchain cmake/aarch64-linux-gnu.cmake
	$(call CTEST,aarch64)
	SPARSEKIT_ISA=neon ctest --test-dir build/aarch64 --output-on-failure --parallel 2 -R 'test_(errors|example|registry|threads)'

AARCH64_PACKAGES = g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
aarch64-tools:
	@for program in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$program >/dev/null || \
	  { echo "$$program is missing; on Debian or Ubuntu: apt-get install --no-install-recommends $(AARCH64_PACKAGES)"; exit 1; }; done

# TSan: where threads meet. test_threads has every kernel of test_matmul, which would take another minute.
THREADED_TESTS = test_conv2d test_preferences test_registry test_threads
empty :=
space := $(empty) $(empty)
sanitize: $(VENV)/.tools
	$(call CONFIGURE,asan) -DCMAKE_BUILD_TYPE=RelWithDebInfo '-DSPARSEKIT_SANITIZE=address;undefined'
	$(call CTEST,asan)
	$(call CONFIGURE,tsan) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSPARSEKIT_SANITIZE=thread
	cmake --build build/tsan --target $(THREADED_TESTS)
	ctest --test-dir build/tsan --output-on-failure --parallel 2 -R '^($(subst $(space),|,$(THREADED_TESTS)))$$'

# Exported models go through the plugins where the environment has what exports them: make test-python or make dev.
EXPORTER = $(firstword $(wildcard $(VENV)/.extra-test $(VENV)/.extra-dev))
tensorrt: $(VENV)/.tools $(EXPORTER)
	$(call CONFIGURE,tensorrt) -DSPARSEKIT_TENSORRT=ON '-DTENSORRT_INCLUDE_DIR=$(TENSORRT_INCLUDE_DIR)' \
	  '-DTENSORRT_INCLUDE_DIR_NEWER=$(TENSORRT_INCLUDE_DIR_NEWER)'
	cmake --build build/tensorrt --target tests/plugin/all
	ctest --test-dir build/tensorrt --output-on-failure --parallel 2 -R '^tensorrt_'
ifneq ($(EXPORTER),)
	SPARSEKIT_TENSORRT_TESTS=$(abspath build/tensorrt/tests/plugin) \
	  SPARSEKIT_TENSORRT_LIBRARY=$(abspath build/tensorrt/libsparsekit_tensorrt.so) \
	  $(BIN)/python -m pytest tests/export/test_tensorrt_exported.py tests/export/test_tensorrt_registry.py
else
	@echo 'exported models and the registry of TensorRT were not tried: make test-python installs what that needs'
endif
ifneq ($(TENSORRT_PYTHON),)
	SPARSEKIT_TENSORRT_LIBRARY=$(abspath build/tensorrt/libsparsekit_tensorrt.so) \
	  $(TENSORRT_PYTHON) -m pytest --noconftest tests/export/test_tensorrt_registry.py
endif

# One architecture of each kind that has code of its own. Objects only: nothing else of the library is compiled.
CUDA_REPORT_ARCHITECTURES ?= 80;87;90a;110;120
CUDA_OBJECTS = $(patsubst %,CMakeFiles/sparsekit.dir/%.o,$(wildcard csrc/cuda/*.cu))
cuda-report: $(VENV)/.cuda-tools
	cmake -G Ninja -S . -B build/cuda -DSPARSEKIT_CUDA=ON '-DSPARSEKIT_CUDA_ARCHITECTURES=$(CUDA_REPORT_ARCHITECTURES)'
	ninja -C build/cuda $(CUDA_OBJECTS)
	$(BIN)/python -m bench.cuda_report $(addprefix build/cuda/,$(CUDA_OBJECTS)) --out docs/cuda_kernels.md

$(VENV)/.cuda-tools: $(VENV)/.tools
	$(PIP) install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

CPP_FILES = $(shell git ls-files 'docs/examples/*.cc' 'csrc/*.cc' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cc' 'tests/*.h' 'tests/*.cu' 'tests/*.cuh')

lint: $(VENV)/.extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	@! grep -rnE '#include *[<"](torch|ATen|c10)/' csrc || { echo 'csrc/ must not include torch headers'; exit 1; }
	@! grep -rnE '(import|from) .*\b_C\b' python --include='*.py' --exclude=_native.py || { echo 'only _native.py may import _C'; exit 1; }
	@! grep -rnE 'torch\.library\.|from torch\.library' python --include='*.py' --exclude=_ops.py || { echo 'only _ops.py may use torch.library'; exit 1; }

format: $(VENV)/.extra-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

docs: $(VENV)/.extra-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# ---- shipping it ----------------------------------------------------------------------------------

# WHEEL_CHECK=--here: a system newer than Ubuntu 22.04 builds for itself.
WHEEL_CHECK ?=
wheel: $(VENV)/.tools
	rm -rf dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation $(call CUDA_FOR,$(WHEEL_ARCHITECTURES)) --wheel-dir dist .
	$(BIN)/python .ci/check_wheel.py $(WHEEL_CHECK) dist/*.whl

sdist: $(VENV)/.tools
	rm -f dist/sparsekit_kernels-*.tar.gz
	$(PIP) install --quiet build
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .

# A compiler for x86-64 that makes code for Arm, and the runtime for Arm.
build/aarch64-toolkit/.done: .ci/aarch64_cuda.sh | $(VENV)/.tools
	PYTHON=$(abspath $(BIN))/python .ci/aarch64_cuda.sh $(@D)
	touch $@

# Orin and Thor. Wheels get all.
JETSON_ARCHITECTURES ?= 87;110
AARCH64_NVCC = $(abspath build/aarch64-toolkit/bin/nvcc)
AARCH64_TREE = sparsekit-$(shell sed -n 's/.*sparsekit VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)-linux-aarch64

# No driver, no GPU: the tests are of what the library says and does then. `make test-aarch64` runs every kernel,
# and what emulates a GPU runs on the machine itself.
cross-aarch64: $(VENV)/.tools aarch64-tools build/aarch64-toolkit/.done
	$(call CONFIGURE,aarch64-cuda) --toolchain cmake/aarch64-linux-gnu.cmake -DSPARSEKIT_CUDA=ON \
	  '-DSPARSEKIT_CUDA_ARCHITECTURES=$(JETSON_ARCHITECTURES)' -DCMAKE_CUDA_COMPILER=$(AARCH64_NVCC) \
	  $(if $(TENSORRT_INCLUDE_DIR),-DSPARSEKIT_TENSORRT=ON -DTENSORRT_INCLUDE_DIR=$(TENSORRT_INCLUDE_DIR))
	$(call CTEST,aarch64-cuda) -E '(simt|emulated|stand_in|test_(matmul|conv2d|fuzz|threads))'
	rm -rf build/$(AARCH64_TREE)
	cmake --install build/aarch64-cuda --prefix build/$(AARCH64_TREE)
	cp LICENSE build/$(AARCH64_TREE)/
	$(BIN)/python .ci/check_wheel.py build/aarch64-cuda/tests/cpp/test_example \
	  $$(find build/$(AARCH64_TREE) -name '*.so')
	mkdir -p dist
	tar -C build -czf dist/$(AARCH64_TREE).tar.gz $(AARCH64_TREE)

# The headers of Python are those of this machine's: both are 64-bit little-endian Linux, and what differs in
# pyconfig.h (assembler for x87 and the like) is for building Python itself.
wheel-aarch64: $(VENV)/.tools aarch64-tools build/aarch64-toolkit/.done
	rm -f dist/*aarch64.whl
	suffix=.cpython-$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])')-aarch64-linux-gnu.so; \
	_PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX=$$suffix \
	$(PIP) wheel --quiet --no-deps --no-build-isolation $(call CUDA_FOR,all) --wheel-dir dist \
	  '--config-settings=cmake.args=--toolchain;$(abspath cmake/aarch64-linux-gnu.cmake)' \
	  --config-settings=cmake.define.PYTHON_MODULE_EXTENSION=$$suffix \
	  --config-settings=cmake.define.pybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  --config-settings=cmake.define.SPARSEKIT_CUDA=ON \
	  --config-settings=cmake.define.CMAKE_CUDA_COMPILER=$(AARCH64_NVCC) \
	  $(if $(TENSORRT_INCLUDE_DIR),--config-settings=cmake.define.SPARSEKIT_TENSORRT=ON \
	    --config-settings=cmake.define.TENSORRT_INCLUDE_DIR=$(TENSORRT_INCLUDE_DIR)) .
	$(BIN)/python .ci/check_wheel.py dist/*aarch64.whl

clean:
	rm -rf build dist docs/_build
	rm -f $(VENV)/.extra-*

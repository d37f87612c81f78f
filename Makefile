# One verb each. Everything happens in .venv, which the first verb makes.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
# what torch 2.13 pins; a CPU build of torch brings none
TRITON ?= triton==3.7.1
# the oldest Triton we promise, whose interpreter needs an older numpy: a folder put first on the path
OLD    := .triton36
RUN    := .venv/bin/python
STAMP  := .venv/installed
LINUX  := $(filter Linux,$(shell uname -s))

.PHONY: demo test check lint bench native native-strict native-sanitized soak

$(STAMP): pyproject.toml CMakeLists.txt kernels/native/CMakeLists.txt $(wildcard kernels/native/src/* kernels/native/include/*)
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -q $(TORCH)
	$(if $(LINUX),$(RUN) -m pip install -q $(TRITON))
	$(RUN) -m pip install -q -e '.[dev]'
	touch $@

$(OLD)/installed:
	$(RUN) -m pip install -q --no-deps --target $(OLD) triton==3.6.0 numpy==2.3.5
	touch $@

# every test this machine can run, in every lane it has
test: $(STAMP) $(if $(LINUX),$(OLD)/installed)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not interpreter and not slow"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "slow and not interpreter"
ifneq ($(LINUX),)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -q -n 2 -m interpreter
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLD) TRITON_INTERPRET=1 $(RUN) -m pytest -q -n 2 -m "interpreter and not slow" --one-in 3
	PYTHONPATH=$(OLD) $(RUN) -m pytest -q tests/proof -m "not interpreter" -k "spill or instruction"
	PYTHONPATH=$(OLD) $(RUN) -m pytest -q tests/unet_kernels -m "not interpreter" -k "compiled_code and (float16 and channels_last or derivative or uint8-3)"
	PYTHONPATH=$(OLD) $(RUN) -m pytest -q tests/unet_kernels/test_dweight.py tests/unet_kernels/test_conv3x3_dx.py -m "not interpreter and not slow" -k compiled_code
endif

# style, types, contracts
lint: $(STAMP)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	PYTHONPATH=.:kernels .venv/bin/lint-imports

# before every commit; under three minutes, two tests at a time with a thread each
check: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not gpu and not slow and not interpreter"

bench: $(STAMP)
	$(RUN) -m pytest benchmarks --benchmark-only -q

# two hundred random kills of a prediction and of a training, where `make test` has thirty
soak: $(STAMP)
	UNET_FAST_SOAK=200 $(RUN) -m pytest -q tests/unet_fast/test_interruption.py tests/unet_fast/test_checkpoints.py

# the native libraries with warnings as errors, and their own tests; CUDA where there is an nvcc; then the C++ once more,
# watched by the address and undefined-behaviour sanitizers
native: native-strict native-sanitized

native-strict:
	cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DUNET_STRICT=ON
	cmake --build build/native --parallel 2
	ctest --test-dir build/native --output-on-failure

native-sanitized:
	cmake -S . -B build/native-sanitized -DCMAKE_BUILD_TYPE=RelWithDebInfo -DUNET_STRICT=ON -DUNET_SANITIZE=ON -DUNET_CUDA=OFF
	cmake --build build/native-sanitized --parallel 2
	ctest --test-dir build/native-sanitized --output-on-failure

# the whole job on a bare machine: synthetic touching cells, two nets, predictions, scores, pictures in demo/
demo: $(STAMP)
	.venv/bin/unet-fast demo --out demo

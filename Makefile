# `make demo` and `make test` do all the set-up they need on a machine with Python 3.9+ and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BUILT  := pyproject.toml CMakeLists.txt $(shell find cpp src -type f)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt
ARGS   ?=

.PHONY: demo test bench cuda-evidence test-gpu bench-gpu gpu-check instructions lint wheel-check clean

demo: $(VENV)/demo.stamp   ## predict sepsis; ARGS="--data DIR" for real records
	$(BIN)/gatewise demo $(ARGS)

test: $(VENV)/test.stamp   ## all tests; ARGS="-k name" for some
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

bench: $(VENV)/bench.stamp ## measure against other libraries, write benchmarks/results; ARGS="--sets grid --arch avx2"
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr --benchmark-group-by=group $(ARGS)
	$(BIN)/python benchmarks/report.py

cuda-evidence: $(VENV)/bench.stamp  ## what nvcc makes of the CUDA kernels, and what cards' limits make of that; needs nvcc
	$(BIN)/python benchmarks/cuda_evidence.py
	$(BIN)/python benchmarks/cuda_plan.py
	$(BIN)/python benchmarks/report.py

test-gpu: gpu-check        ## the CUDA kernels on the GPU that is here, against the CPU's and float64; ARGS="-k lstm"
	$(MAKE) $(VENV)/gpu.stamp
	$(BIN)/python -m pytest -W default tests/gpu.py $(ARGS)

bench-gpu: gpu-check       ## their speed against cuDNN and cuBLAS, into one CSV that names the card; ARGS="large"
	$(MAKE) $(VENV)/gpu.stamp
	$(BIN)/python benchmarks/cuda_speed.py $(ARGS)

gpu-check:
	@nvidia-smi >/dev/null 2>&1 || { echo "there is no NVIDIA driver here: nvidia-smi does not run" >&2; exit 1; }

instructions: $(VENV)/test.stamp  ## instructions of the kernels against a baseline; ARGS=--update makes a new one
	$(BIN)/python benchmarks/instructions.py $(ARGS)

lint: $(VENV)/lint.stamp   ## style and types
	$(BIN)/ruff check python tests benchmarks
	$(BIN)/ruff format --check python tests benchmarks
	$(BIN)/clang-format --dry-run --Werror $(shell find cpp src tests benchmarks -name '*.[ch]pp' -o -name '*.cu')
	$(BIN)/mypy

wheel-check:               ## the wheel works where there is nothing but NumPy
	rm -rf build/wheel-check
	$(PYTHON) -m venv build/wheel-check
	build/wheel-check/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel-check .
	build/wheel-check/bin/python -m pip install --quiet --disable-pip-version-check build/wheel-check/*.whl
	cd build/wheel-check && bin/python -m pip list --format=freeze && bin/gatewise info && bin/gatewise check --quick

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)

# One stamp a set of extras; a change to anything compiled builds and installs again.
$(VENV)/%.stamp: $(BUILT) tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$*]'
	touch $@

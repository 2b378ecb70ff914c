# The front door: each target sets up what it needs in .venv/ and build/, and does nothing twice. How things are built stands
# in CMakeLists.txt and pyproject.toml; what `make test` runs stands in tests/run.py.
#
#   make demo                     PYTHON=python3.12 and TORCH=2.12.0 choose another Python and another torch

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
SOURCES := CMakeLists.txt pyproject.toml LICENSE $(wildcard README.md) $(shell find cmake csrc shim python -type f -not -name '*.pyc')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo deploy test test-long compare bench lint clean

help:
	@echo 'make demo       train a two-task network on handwritten digits, with and without F-MTL'
	@echo 'make deploy     train in Python, fine-tune in C++ without Python, and compare'
	@echo 'make compare    time the C step against the same algorithm in plain PyTorch'
	@echo 'make bench      time kernels, solvers and steps beside the machine and other libraries; ARGS=--quick for a minute'
	@echo 'make test       every check of a submission: linters, C and C++ tests, sanitizers, Python tests'
	@echo 'make test-long  the slow ones too: thread sanitizer, valgrind, long property tests'
	@echo 'make lint       the linters alone'
	@echo 'make clean      remove .venv/ and build/'
	@echo 'Settings: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV)'

demo: $(STAMPS)/examples
	$(PY) examples/demo.py

# cmake: the one that is here, else from the package index into .venv/.
deploy: $(STAMPS)/examples
	@command -v cmake > /dev/null || $(PIP) install --quiet cmake
	$(PY) examples/deploy/train.py runs/deploy
	PATH="$$PATH:$(VENV)/bin" cmake -S examples/deploy -B build/deploy -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import flatmtl, torch; print(flatmtl.cmake_prefix_path, torch.utils.cmake_prefix_path, sep=";")')"
	PATH="$$PATH:$(VENV)/bin" cmake --build build/deploy
	build/deploy/finetune runs/deploy
	$(PY) examples/deploy/check.py runs/deploy

compare: $(STAMPS)/cli
	$(PY) -m flatmtl compare $(ARGS)

bench: $(STAMPS)/bench
	$(PY) -m flatmtl bench $(ARGS)

test: $(STAMPS)/test $(STAMPS)/lint
	$(PY) tests/run.py

test-long: $(STAMPS)/test $(STAMPS)/lint
	$(PY) tests/run.py --long

lint: $(STAMPS)/test $(STAMPS)/lint
	$(PY) tests/run.py lint

clean:
	rm -rf '$(VENV)' build

# A virtual environment, once what cannot be installed from here is known to be there.
$(STAMPS)/venv:
	@command -v '$(PYTHON)' > /dev/null || { echo 'No $(PYTHON) here. On Debian and Ubuntu:  sudo apt-get install python3 python3-venv' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo '$(PYTHON) is older than Python 3.10. Name a newer one:  make PYTHON=python3.12 ...' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2> /dev/null \
	  || { echo 'The venv module of $(PYTHON) is missing. On Debian and Ubuntu:  sudo apt-get install python3-venv' >&2; exit 1; }
	@for tool in cc c++; do command -v $$tool > /dev/null \
	  || { echo "No C/C++ compiler ($$tool). On Debian and Ubuntu:  sudo apt-get install build-essential" >&2; exit 1; }; done
	'$(PYTHON)' -m venv '$(VENV)'
	@mkdir -p '$(STAMPS)' && touch '$@'

# From the indexes that pip is set up for, else from PyTorch's own.
CPU_TORCH := torch==$(firstword $(subst +, ,$(TORCH)))+$(or $(word 2,$(subst +, ,$(TORCH))),cpu)

# torch first and pinned, and held there: left to itself pip takes the newest, which on Linux is several GB of CUDA.
$(STAMPS)/torch-$(TORCH): $(STAMPS)/venv
	@rm -f '$(STAMPS)'/torch-* '$(STAMPS)/package'
	$(PIP) install --quiet '$(CPU_TORCH)' 2> /dev/null \
	  || $(PIP) install --quiet '$(CPU_TORCH)' --extra-index-url https://download.pytorch.org/whl/cpu \
	  || { echo 'No CPU-only torch $(TORCH) to be had: taking the default build, on Linux several GB.'; \
	       $(PIP) install 'torch==$(TORCH)'; }
	@echo 'torch==$(TORCH)' > '$(VENV)/constraints.txt' && touch '$@'

# As a user installs it: built in isolation, from a wheel. build/wheel keeps the object files.
$(STAMPS)/package: $(STAMPS)/torch-$(TORCH) $(SOURCES)
	@rm -rf build/dist
	SKBUILD_BUILD_DIR=build/wheel $(PIP) wheel --quiet --no-deps --wheel-dir build/dist .
	$(PIP) install --quiet --no-deps --force-reinstall build/dist/*.whl
	@touch '$@'

# The package's extras.
EXTRAS := $(STAMPS)/bench $(STAMPS)/cli $(STAMPS)/examples $(STAMPS)/test $(STAMPS)/lint
$(EXTRAS): $(STAMPS)/%: $(STAMPS)/.%-installed $(STAMPS)/package
	@touch '$@'

# LibMTL alone: it requires torchvision, in whose newer versions it cannot be imported whole; its weightings need torch and numpy.
ALONE_bench := LibMTL==1.1.5
ALONE_test := LibMTL==1.1.5

$(EXTRAS:$(STAMPS)/%=$(STAMPS)/.%-installed): $(STAMPS)/.%-installed: pyproject.toml Makefile | $(STAMPS)/package
	$(PIP) install --quiet --constraint '$(VENV)/constraints.txt' "$$(echo $(CURDIR)/build/dist/*.whl)[$*]"
	$(if $(ALONE_$*),$(PIP) install --quiet --no-deps $(ALONE_$*))
	@touch '$@'

# make quickstart   install and convert the embedded teacher: the whole main job, about 5 minutes on 2 cores
# make test         install with the development tools and run the tests
# make test-oldest  the lowest transformers that pyproject.toml allows: what touches its interface
# make test-kernels in an environment of its own: other projects' fused kernels against ours, on the CPU
# make test-doors   in an environment of its own: llama.cpp, bitsandbytes and torchao on exported students
# make lint         format check, lint and types
# make docs         build the documentation's site into build/site, warnings as errors
# make install      the virtual environment alone
#
# PYTHON=python3.12 chooses another interpreter, ARGS="…" adds arguments: make test ARGS="-k transfer"

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
KERNELS ?= $(VENV)-kernels
OLDEST ?= $(VENV)-oldest
DOORS  ?= $(VENV)-doors
LLAMA_CPP_PYTHON = 0.3.36
PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test test-slow test-oldest test-kernels test-doors lint format docs clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 10

# The stamps make a second `make` start at once; a change of the pins or of the dependencies installs again.
install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed. Install Python 3.11, or name yours: make $(MAKECMDGOALS) PYTHON=python3" >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/relinear quickstart $(ARGS)

test: install install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: install install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow and not gpu" $(ARGS)

# An environment that sees the packages of $(VENV) behind a transformers of its own.
$(OLDEST)/.installed: pyproject.toml $(VENV)/.installed-dev
	$(BIN)/python -m venv --without-pip $(OLDEST)
	$(BIN)/python -m pip --python $(OLDEST)/bin/python install --quiet --disable-pip-version-check --no-deps \
		"$$(sed -n 's/^ *"\(transformers\)>=\([0-9.]*\),.*/\1==\2/p' pyproject.toml)"
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" >"$$($(OLDEST)/bin/python $(PURELIB))/outer.pth"
	@touch $@

OLDEST_TESTS := $(addprefix tests/integration/test_,student.py families.py export.py kept.py hybrid.py attention.py swa.py draft.py)

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 $(OLDEST_TESTS) $(ARGS)

# fla and Triton on a machine without a GPU break stock models, so they never share an environment with the others.
# mamba-ssm comes without its CUDA code; where its source cannot be had, its tests are skipped with that reason.
$(KERNELS)/.installed: pyproject.toml constraints-kernels.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed. Name yours: make $(MAKECMDGOALS) PYTHON=python3" >&2; exit 3; }
	$(PYTHON) -m venv $(KERNELS)
	$(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-kernels.txt \
		-e '.[gpu]' triton einops pytest pytest-xdist setuptools wheel packaging ninja
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(KERNELS)/bin/python -m pip install --quiet \
		--disable-pip-version-check -c constraints-kernels.txt --no-build-isolation --no-deps mamba-ssm \
		|| echo "mamba-ssm could not be installed: its tests will be skipped" >&2
	@touch $@

test-kernels: $(KERNELS)/.installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(KERNELS)/bin/python -m pytest -n 2 -m kernels -rs tests/kernels $(ARGS)

# What else runs or shrinks a student. It sees the packages of $(VENV) behind its own; torchao talks on stderr wherever
# it is installed, so it never shares an environment with the other tests. llama.cpp's converter is in no wheel: it comes
# with llama-cpp-python's source, which is not built.
$(DOORS)/.installed: constraints-doors.txt $(VENV)/.installed-dev
	$(BIN)/python -m venv --without-pip $(DOORS)
	$(BIN)/python -m pip --python $(DOORS)/bin/python install --quiet --disable-pip-version-check --no-deps \
		-r constraints-doors.txt
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" >"$$($(DOORS)/bin/python $(PURELIB))/outer.pth"
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest $(DOORS)/source llama-cpp-python==$(LLAMA_CPP_PYTHON)
	mkdir -p $(DOORS)/llama.cpp
	tar xzf $(DOORS)/source/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C $(DOORS)/llama.cpp --strip-components=3 \
		--wildcards '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' \
		'*/vendor/llama.cpp/gguf-py' '*/vendor/llama.cpp/LICENSE'
	rm -r $(DOORS)/source
	@touch $@

test-doors: $(DOORS)/.installed
	OMP_NUM_THREADS=1 LLAMA_CPP=$(DOORS)/llama.cpp $(DOORS)/bin/python -m pytest -n 2 -m doors -rs tests/doors $(ARGS)

lint: install install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: install install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Not --quiet: it would hide warnings from --strict. The variable silences a notice about mkdocs-material itself.
docs: install install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "Read it: build/site/index.html"

clean:
	rm -rf $(VENV) $(KERNELS) $(OLDEST) $(DOORS) build dist *.egg-info .pytest_cache .ruff_cache

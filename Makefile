# make quickstart   installs into .venv and trains configs/quickstart.py
# make test         installs what tests need and runs the default suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: quickstart test slow aot aot_slow gpu_compile lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.train --config=configs/quickstart.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist=loadfile $(PYTEST_ARGS)

# The long rest; SLOW_SHARD=k/n runs the k-th of n parts.
slow: $(VENV)/.installed-test
	SLOW_SHARD=$${SLOW_SHARD:-1/1} $(BIN)/python -m pytest -n 2 --dist=loadfile -m slow $(PYTEST_ARGS)

# Every TPU kernel through the TPU compiler, without a TPU (installs it: half a gigabyte).
aot: $(VENV)/.installed-plan
	$(BIN)/python -m pytest -n 2 --dist=load -m aot $(PYTEST_ARGS)

aot_slow: $(VENV)/.installed-plan
	SLOW_SHARD=$${SLOW_SHARD:-1/1} $(BIN)/python -m pytest -n 2 --dist=load -m "aot and slow" $(PYTEST_ARGS)

# Every GPU kernel through the compilers for sm_90a, without a GPU and without NVIDIA's libraries. Needs jax 0.11.2 or newer (Python 3.12).
gpu_compile: $(VENV)/.installed-gpu-compile
	PYTHONPATH=$(VENV)/cuda $(BIN)/python -m pytest -n 2 --dist=load -m gpu_compile $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"effmodels needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: setup.py $(VENV)/.python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: setup.py $(VENV)/.python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-plan: setup.py $(VENV)/.installed-test
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,plan]'
	@touch $@

# jax's CUDA plugin of the same version (0.4 GB), in a folder of its own: the environment itself stays one without it.
$(VENV)/.installed-gpu-compile: setup.py $(VENV)/.installed-test
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/cuda \
	  $$($(BIN)/python -c 'import jaxlib; print(*(f"jax-cuda13-{part}=={jaxlib.__version__}" for part in ("plugin", "pjrt")))')
	@touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info

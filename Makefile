# make quickstart   install, then train a small model with PPO from end to end on this machine
# make test         install if needed, lint, every CPU test
# make test-extra   tests of what hybridrl can use and does not install: W&B, MLflow (fetched into build/extra)
SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
OUT ?= runs/quickstart

# Another Python's packages must not mix in. (PYTHON=... names the interpreter; launch/setup.sh finds one without it.)
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1

.PHONY: setup quickstart test test-extra lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements-cpu.lock launch/setup.sh pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
	bash launch/setup.sh $(VENV)
	touch $@

quickstart: setup
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash launch/quickstart.sh $(OUT)

lint: setup
	$(PY) -m ruff check .

test: lint
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pytest --no-header tests

test-extra: setup
	$(PY) -m pip install -q --upgrade --target build/extra wandb mlflow-skinny
	@HYBRIDRL_EXTRA="$(abspath build/extra)" $(PY) -m pytest --no-header tests/extra

docs: setup
	$(PY) -m hybridrl.config > docs/config_keys.md

clean:
	rm -rf build $(VENV) hybridrl/_C*.so

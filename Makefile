# make quickstart   install, then train a small model with PPO from end to end on this machine
# make test         install if needed, lint, every CPU test
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
PY := $(VENV)/bin/python
OUT ?= runs/quickstart

.PHONY: setup quickstart test lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements-cpu.lock launch/setup.sh setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
	PYTHON=$(PYTHON) bash launch/setup.sh $(VENV)
	touch $@

quickstart: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash launch/quickstart.sh $(OUT)

lint: setup
	$(PY) -m ruff check .

test: lint
	$(PY) -m pytest tests

docs: setup
	$(PY) -m hybridrl.config > docs/config_keys.md

clean:
	rm -rf build $(VENV) hybridrl/_C*.so

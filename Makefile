# `make demo` and `make test` need Python 3.10+ and make; they build .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/demo

.PHONY: demo test lint browser census clean

demo: $(VENV)/demo.stamp
	$(BIN)/spvit demo --output $(OUTPUT)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A headless browser for the tests of report pages, which are skipped without one. Needs root on Debian or Ubuntu;
# elsewhere install Chromium or Chrome by hand.
browser:
	command -v chromium || command -v google-chrome || (apt-get update && apt-get install --yes --no-install-recommends chromium)

# Every ViT-like model of timm and the usual ones of other libraries; minutes on two cores. Writes docs/models.md.
census: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/census.py --output docs/models.md

$(VENV)/demo.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)

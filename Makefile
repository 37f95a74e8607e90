# Two targets are all that a newcomer needs:
#
#   make run     starts the main example and says what to type in another terminal
#   make test    runs everything that CI runs
#
# Both make .venv first.  PYTHON names another interpreter, PORT another port for `run`.

PYTHON ?= python3
PORT ?= 6380

UPGRADE ?=

# How long `fuzz` looks for a fault.
SECONDS ?= 60

BIN := .venv/bin

# CPython's own tests, which run in every supported interpreter by themselves.
CPYTHON_TESTS := tests/compat/test_cpython.py

SHORT := --ignore=$(CPYTHON_TESTS) -m "not long"

# Where everything runs side by side, a test that fails gets a second run: the first may have met
# a machine that stood still.  The summary names each that needed it.
TWICE := --reruns 1 --reruns-delay 1 -rfEsXR

# One resolution for every supported Python, with markers where they differ, and without the
# addresses and folders of the machine that made it.
COMPILE := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --quiet \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help run test environment lint format types unit suites long cpython compat compat-next \
	docs wheel bench fuzz lock changelog pre-commit clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## start the key-value server; PORT=6380 chooses where
	@$(PYTHON) tools/environment.py .venv requirements/run.txt
	@exec $(BIN)/python examples/keyvalue.py $(PORT)

test: lint types docs suites cpython long ## run everything that CI runs

environment: ## make .venv with all tools in it, or bring it up to date
	@$(PYTHON) tools/environment.py .venv requirements/dev.txt

lint: environment ## check formatting and rules (ruff)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: environment ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: environment ## check types (mypy, pyright) and that the public face is complete
	$(BIN)/mypy
	$(BIN)/pyright --warnings
	$(BIN)/python -m tools.typed_face

unit: environment ## run the tests on the sources, but for the long ones
	$(BIN)/python -m pytest $(SHORT)

suites: wheel ## run them on every supported Python, the wheel on the others, and measure coverage
	$(BIN)/python -m tools.suites $(SHORT) $(TWICE)

long: environment ## run the tests that put a crowd of clients on a server, or measure it
	$(BIN)/python -m pytest -m long $(TWICE)

bench: environment ## measure every engine beside its peers
	@$(PYTHON) tools/environment.py .venv requirements/bench.txt
	$(BIN)/python -m benchmarks

fuzz: environment ## try to break the PROXY protocol parser; SECONDS=60 chooses how long
	@$(PYTHON) tools/environment.py .venv requirements/fuzz.txt
	@mkdir -p .fuzz/proxy
	$(BIN)/python -m fuzz.proxy -max_total_time=$(SECONDS) -max_len=5000 -timeout=5 \
		-artifact_prefix=.fuzz/ .fuzz/proxy fuzz/corpus/proxy

cpython: environment ## run CPython's own tests on portico, on every supported Python
	$(BIN)/python -m pytest $(CPYTHON_TESTS) $(TWICE)

compat: environment ## run these and the habits of public programs
	$(BIN)/python -m pytest tests/compat

compat-next: environment ## the same on Python 3.14 and 3.15, from Debian unstable; needs root
	$(BIN)/python -m tools.compat_next

docs: environment ## build the documentation; any warning is an error
	$(BIN)/sphinx-build --builder html --nitpicky --fail-on-warning --keep-going --quiet \
		--doctree-dir docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel: environment ## build the wheel and the source distribution into dist/
	@rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	@ls dist

lock: environment ## pin every dependency anew in requirements/; UPGRADE=--upgrade for the newest
	$(COMPILE) --group dev --output-file requirements/dev.txt $(UPGRADE)
	$(COMPILE) --group bench --output-file requirements/bench.txt --constraint requirements/dev.txt
	$(COMPILE) --group fuzz --output-file requirements/fuzz.txt --constraint requirements/dev.txt
	$(COMPILE) --group build --output-file requirements/run.txt --constraint requirements/dev.txt
	$(COMPILE) --group test --output-file requirements/test.txt --constraint requirements/dev.txt

pre-commit: environment ## run the same checks before each commit
	$(BIN)/pre-commit install

changelog: environment ## show what the fragments in changelog.d/ say so far
	$(BIN)/towncrier build --draft --version next

clean: ## remove environments, builds and caches
	rm -rf .venv .venv.lock .venvs dist docs/_build .fuzz .coverage .coverage.* htmlcov .hypothesis \
		.mypy_cache .pytest_cache .ruff_cache
	find src tests examples docs fuzz tools -name __pycache__ -type d -exec rm -rf {} +

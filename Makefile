# Everything that a developer does here; `make help` lists it. Works from a clean checkout with python3 >= 3.11.

PYTHON ?= python3
VENV   := .venv
# More arguments for pytest, such as TESTS="tests/test_tree.py -k whiteout"; for the benchmark, such as BENCH=--quick.
TESTS  ?=
BENCH  ?=
# How many tests run at once.
JOBS   ?= 2

STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install test lint format demo bench torture clean

help:
	@echo "make test      run the tests (what needs a program that is not installed is skipped, saying so)"
	@echo "make lint      check formatting, style and types"
	@echo "make format    format the code"
	@echo "make demo      publish images from a registry on this machine and run a program inside one"
	@echo "make bench     compare with skopeo + umoci and with gzip | tar (BENCH=--quick: a minute)"
	@echo "make torture   kill a run at every point there is and look at what it leaves"
	@echo "make clean     remove the virtual environment and all that was generated"

install: $(STAMP)

# Installed once, and again when pyproject.toml changes or the interpreter that the environment was made of has gone.
$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) here: install Python 3.11 or newer, or name one:" \
	    "make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$("$(PYTHON)" --version) is too old:" \
	    "3.11 or newer is needed. Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@[ -w . ] || { echo "$$(pwd) cannot be written to, and all that make does goes there:" \
	    "clone or copy it to where you may write, and run make there" >&2; exit 1; }
	@rm -rf "$(VENV)"
	@if command -v uv >/dev/null; then \
	    echo "Installing into $(VENV) with uv" && \
	    uv venv --quiet --python "$(PYTHON)" "$(VENV)" && \
	    uv pip install --quiet --python "$(VENV)/bin/python" -e '.[dev]'; \
	else \
	    "$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments:" \
	        "apt install python3-venv (on Debian and Ubuntu), or install uv" >&2; exit 1; }; \
	    echo "Installing into $(VENV) with pip" && \
	    "$(PYTHON)" -m venv "$(VENV)" && \
	    "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi || { echo "Installing failed: is a package index reachable from here? (PIP_INDEX_URL or UV_INDEX_URL names" \
	    "another; PIP_CERT a certificate)" >&2; exit 1; }
	@touch "$@"

test: $(STAMP)
	"$(VENV)/bin/python" -m pytest -n $(JOBS) $(TESTS)

lint: $(STAMP)
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/mypy"
	"$(VENV)/bin/mypy" --follow-imports=silent -p demo -p bench

format: $(STAMP)
	"$(VENV)/bin/ruff" format .
	"$(VENV)/bin/ruff" check --fix .

demo: $(STAMP)
	@"$(VENV)/bin/python" -m demo.run

bench: $(STAMP)
	@"$(VENV)/bin/python" -m bench.run $(BENCH)

torture: $(STAMP)
	"$(VENV)/bin/python" -m pytest tests/test_kills.py tests/test_kills_stratum0.py tests/test_real_sequences.py \
	    tests/test_real_client.py --torture -n $(JOBS) $(TESTS)

clean:
	rm -rf "$(VENV)" .demo .bench build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

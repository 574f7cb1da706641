# make quickstart | test | lint | bench | docs | torture
#   VENV=.venv          where the virtual environment lies
#   PYTHON=python3      the interpreter it is made with
#   TORCH_INDEX=URL     an index with PyTorch's CPU wheels; without it pip's own indexes decide
#   PYTEST_ARGS=...     handed to pytest

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
export PYTHON TORCH_INDEX

.PHONY: quickstart test lint bench docs torture

quickstart:
	@bash .ci/venv "$(VENV)"
	@run=runs/quickstart; n=2; while [ -e "$$run" ]; do run=runs/quickstart-$$n; n=$$((n + 1)); done; \
		"$(VENV)/bin/reasonrl" train quickstart --out "$$run" \
		&& "$(VENV)/bin/reasonrl" report "$$run" > /dev/null \
		&& echo "Done. Open $$PWD/$$run/report.html in a browser: curves, and every completion by its steps." \
		&& echo "Also there: metrics.jsonl (a line a step), completions/ and the checkpoints."

test:
	@bash .ci/venv "$(VENV)" test
	@bash .ci/in "$(VENV)" python -m pytest $(PYTEST_ARGS)

torture:
	@bash .ci/venv "$(VENV)" test
	@bash .ci/in "$(VENV)" python -m pytest -m torture $(PYTEST_ARGS)

bench:
	@bash .ci/venv "$(VENV)" test,bench
	@bash .ci/in "$(VENV)" python -m bench

docs:
	@bash .ci/venv "$(VENV)" docs
	@bash .ci/in "$(VENV)" mkdocs build --strict --site-dir build/site

lint:
	@bash .ci/venv "$(VENV)" test
	@bash .ci/in "$(VENV)" ruff format --check .
	@bash .ci/in "$(VENV)" ruff check .
	@bash .ci/in "$(VENV)" pyright
	@bash .ci/in "$(VENV)" clang-format --dry-run --Werror \
		csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h

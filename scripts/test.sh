#!/usr/bin/env bash
# Lint, types and tests, in .venv (made when it is not there). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh test
ruff check .
ruff format --check .
mypy
# Two processes: the tests use one thread each.
python -m pytest -n "${TEST_PROCESSES:-2}" "$@"

#!/usr/bin/env bash
# Run ruff, mypy and pytest in .venv, which is created if missing. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh test
ruff check .
ruff format --check .
mypy
python -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@" # each test process uses one thread

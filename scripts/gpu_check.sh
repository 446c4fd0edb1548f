#!/usr/bin/env bash
# Is the fast path right on this GPU? Prints PASS and FAIL lines, writes gpu_check.json, exits with 1 if anything failed.
# Needs an environment with the package's dependencies; uses .venv if it is there, else the python on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} CUBLAS_WORKSPACE_CONFIG=:4096:8
exec "$(command -v python || command -v python3)" tools/gpu_check.py --json gpu_check.json "$@"

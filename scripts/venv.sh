# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with this project in it, and puts it on the PATH.
# $1: what to install besides the core, as a pip extra ("" or "test").
# $PYTHON: the interpreter that makes the environment; python3 by default, needs 3.11 or newer.
extra=${1:-}
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than 3.11: set PYTHON to a newer one" >&2
    exit 2
  }
  "$python" -m venv .venv
fi
stamp=.venv/.installed-${extra:-core}
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing into .venv (PyTorch is large: this takes a few minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
PATH=$PWD/.venv/bin:$PATH

# shellcheck shell=bash
# Sourced by the other scripts: create .venv, install this project into it and put it first on the PATH.
# $1: pip extra to install, for example "test"; empty for none.
# $PYTHON: interpreter to create the environment with, Python >= 3.11; default: python3.
extra=${1:-}
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than 3.11: set PYTHON to a newer interpreter" >&2
    exit 2
  }
  "$python" -m venv .venv
fi
stamp=.venv/.installed-${extra:-core}
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing into .venv; the first download of PyTorch takes a few minutes"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
PATH=$PWD/.venv/bin:$PATH

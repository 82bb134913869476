#!/usr/bin/env bash
# Make a virtual environment, install this package with everything CI needs, run ruff, mypy and every
# test. Arguments go to pytest: scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
venv="${VENV:-.venv-test}"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt ".[cpu,export,openvino,plugins,tensorrt-rtx,video,dev]"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/mypy" scripts tests/campaign
# Tests compute on one thread each, so that one process per core fills the machine.
exec "$venv/bin/python" -m pytest --numprocesses auto --dist worksteal "$@"

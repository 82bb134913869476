#!/usr/bin/env bash
# Make a virtual environment, install this package with everything CI needs, run ruff, mypy and every
# test. Arguments go to pytest: scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
venv="${VENV:-.venv-test}"
if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv"
    # The pip that a Python brings may be years old, and takes twice as long.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
    new=yes
fi
# What modules are compiled to is kept, whatever the environment says: a test that starts a process
# would compile torch and transformers anew, for seconds.
unset PYTHONDONTWRITEBYTECODE
PYTHONPYCACHEPREFIX="$(cd "$venv" && pwd)/pycache"
export PYTHONPYCACHEPREFIX
# Not compiled: most of these modules are never imported, the others are compiled as they are.
install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}
# Two processes unpack half of the packages each. On systems that lack one of them this does
# nothing, and all are installed below.
if [ -n "${new:-}" ]; then
    for half in 0 1; do
        awk -v half=$half 'NR % 2 == half' constraints.txt > "$venv/half-$half.txt"
        install --no-deps --requirement "$venv/half-$half.txt" > /dev/null 2>&1 &
    done
    wait
fi
install --constraint constraints.txt ".[cpu,export,openvino,plugins,serve,structured,tensorrt-rtx,video,dev]"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
types() {
    "$venv/bin/mypy" && "$venv/bin/mypy" scripts tests/campaign
}
# mypy has one process: it runs beside the tests, and says what it found after them.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
types > "$said" 2>&1 &
checked=$!
status=0
# Tests compute on one thread each, so that one process per core fills the machine.
"$venv/bin/python" -m pytest --numprocesses auto --dist worksteal "$@" || status=$?
wait "$checked" || status=1
cat "$said"
exit "$status"

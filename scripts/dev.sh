#!/usr/bin/env bash
# A checkout to work in: everything CI needs, and this tree itself, editable, in .venv. Run it again
# after adding a file directly to src/lvlm/, or a folder to calibration/ (CONTRIBUTING.md says why).
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".[cpu,export,openvino,plugins,serve,structured,tensorrt-rtx,video,dev]"
echo "next: . $venv/bin/activate && make test-fast"

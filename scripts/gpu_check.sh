#!/usr/bin/env bash
# Check and measure the plugins' kernels on this machine's GPU, from a fresh checkout, installed or
# not: see gpu_check.py, or scripts/gpu_check.sh --help.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if ! "$python" -c 'import lvlm.plugins_trt' 2> /dev/null; then
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    mkdir "$tree/lvlm"
    ln -s "$PWD"/src/lvlm/* "$PWD"/{runtime,export,calibration,plugins_trt,assets} "$tree/lvlm/"
    export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" scripts/gpu_check.py "$@"

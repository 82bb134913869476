#!/usr/bin/env bash
# Check and measure the plugins' kernels on this machine's GPU, from a fresh checkout, installed or
# not: see gpu_check.py, or scripts/gpu_check.sh --help.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/with_package.sh
"$PYTHON" scripts/gpu_check.py "$@"

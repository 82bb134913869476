#!/usr/bin/env bash
# From nothing to an answer: install into .venv, export the shipped model without and with token
# merging, ask both about the sample image. Safe to run again; what is there is used.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing into $venv (the first time this downloads torch) …"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt ".[cpu,export]"
mkdir -p out
bundle() { # recipe, its settings
    if [ ! -f "out/$1/lvlm.json" ]; then
        "$venv/bin/lvlm-export" --model tiny-llava --recipe "$@" --dtype fp32 -o "out/$1"
    fi
}
bundle none
bundle lightvlm
"$venv/bin/python" scripts/quickstart.py out/none out/lightvlm
echo
echo "next: . $venv/bin/activate"
echo "      lvlm-run out/lightvlm --image assets/samples/digits-1.png \"Read the top row.\""

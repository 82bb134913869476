#!/usr/bin/env bash
# What a release must do: sdist and wheel build, the wheel alone installs into an empty environment,
# and every command answers --version and --help there. Needs pip install build.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --outdir "$work/dist" . > "$work/log" 2>&1 || { tail -20 "$work/log"; exit 1; }
"$python" -m venv "$work/venv"
bin="$work/venv/bin"
"$bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt "$work"/dist/*.whl
cd "$work" # not the checkout: what is installed answers
version=$("$bin/python" -c 'import lvlm; print(lvlm.__version__)')
for command in "$bin"/lvlm*; do
    said=$("$command" --version)
    [[ "$said" == *"$version"* ]] || { echo "$(basename "$command") --version: $said"; exit 1; }
    "$command" --help > /dev/null
    echo "$(basename "$command"): $said"
done
ls -l dist

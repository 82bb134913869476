#!/usr/bin/env bash
# The tables and plots of docs/notes/quality: what compression costs on tiny-llava's held-out digits.
# Needs the package with extras cpu, export and calibration. usage: scripts/eval_digits.sh [SAMPLES]
set -euo pipefail
cd "$(dirname "$0")/.."
samples=${1:-100}
keeps=0.1,0.2,0.3,0.5,0.7,0.9
work=${TMPDIR:-/tmp}/lvlm-eval-digits
mkdir -p "$work"
common=(-m tiny-llava --threads 1 --dtype fp32 --data digits --kinds describe --samples "$samples" --keep "$keeps")

lvlm-eval "${common[@]}" --recipes none,uniform,elastic-cache,prefixkv,lightvlm --kv-keep "$keeps" \
    -o "$work/recipes"
lvlm-eval "${common[@]}" --recipes none,uniform --set uniform.positions=layer0 -o "$work/layer0"

cpu=$(sed -n 's/^model name[^:]*: //p;T;q' /proc/cpuinfo)
mkdir -p docs/notes/quality
note() { # name, title: table and plot, below when and how they were made
    {
        printf '# %s\n\n' "$2"
        printf '%s, commit %s, %s cores of %s: `bash scripts/eval_digits.sh %s`. ' \
            "$(date -u +%F)" "$(git rev-parse --short HEAD)" "$(nproc)" "$cpu" "$samples"
        printf 'Times are those of a machine that may have had other work.\n\n![plot](%s.png)\n\n' "$1"
        cat "$work/$1/results.md"
    } > "docs/notes/quality/$1.md"
    cp "$work/$1/results.png" "docs/notes/quality/$1.png"
}
note recipes "Quality by recipe and kept cache"
note layer0 "Positions as two papers' released code has them"

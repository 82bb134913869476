#!/usr/bin/env bash
# The first ten minutes on a GPU: everything that this project claims of its kernels, in one command.
# usage: scripts/gpu_session.sh OUT_DIR [--build FOLDER] [--dry-run]
#
# Each step has a limit of its own, and what it prints is in OUT_DIR at once, so that a run that is cut
# off leaves what it had: under 600 s in all. Needs torch, triton, transformers, onnx and numpy; no
# TensorRT, and no network if --build names a folder that `scripts/gpu_check.sh --make FOLDER --arch 90`
# made on another machine.
# --dry-run goes through without a GPU: kernels in Triton's interpreter, launches into a stand-in driver.
set -uo pipefail
out=${1:?usage: scripts/gpu_session.sh OUT_DIR [--build FOLDER] [--dry-run]}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
build=() dry=""
while [ $# -gt 0 ]; do
    case $1 in
        --build) build=(--build "$(cd "${2:?--build FOLDER}" && pwd)") || exit 2; shift 2 ;;
        --dry-run) dry=1; shift ;;
        *) echo "unknown argument $1" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
. scripts/with_package.sh
failed=0

step() { # name, limit in seconds, command …: what it prints goes to name.log
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    echo "== $name (at most $limit s): $*" | tee -a "$out/session.log"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed=1
    echo "== $name: status $status, $((SECONDS - began)) s" | tee -a "$out/session.log"
}

machine() {
    nvidia-smi || echo "no nvidia-smi here"
    "$PYTHON" -c 'import sys; from importlib.metadata import version
print("python", sys.version.split()[0], *(f"{name} {version(name)}" for name in sys.argv[1:]))' \
        torch triton transformers numpy
}
export -f machine

check=(bash scripts/gpu_check.sh "${build[@]}")
recipes=("$PYTHON" scripts/bench_recipes_torch.py)
if [ -n "$dry" ]; then
    check+=(--dry-run --dtypes fp16 --repeats 2)
    recipes=(env TRITON_INTERPRET=1 "${recipes[@]}" --shape tiny --device cpu --repeats 1
        --recipes none "lightvlm 15 %")
fi
: > "$out/session.log"
step machine 15 bash -c machine
step samples 60 "${check[@]}" --parts samples -o /dev/null
step times 100 "${check[@]}" --parts times --longest 8192 -o /dev/null
if command -v compute-sanitizer > /dev/null; then
    step sanitizer 45 "${check[@]}" --parts sanitizer --tools memcheck -o /dev/null
else
    echo "== sanitizer: not run, compute-sanitizer is not installed" | tee -a "$out/session.log"
fi
step recipes 370 "${recipes[@]}"
exit $failed

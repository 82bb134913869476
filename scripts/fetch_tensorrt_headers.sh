#!/usr/bin/env bash
# TensorRT 10.14's C++ headers (235 kB, from a Python package that carries them) into FOLDER/include,
# for machines without the TensorRT SDK. usage: scripts/fetch_tensorrt_headers.sh FOLDER
set -euo pipefail
folder=${1:?usage: fetch_tensorrt_headers.sh FOLDER}
python="${PYTHON:-python3}"
[ -f "$folder/include/NvInferRuntime.h" ] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "kernel-lens==2.0.1 \
    --hash=sha256:07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0" > "$work/wanted"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --require-hashes --requirement "$work/wanted" --dest "$work" || {
    echo "TensorRT's headers cannot be downloaded; give those of an SDK instead" \
        "(TENSORRT_ROOT, --tensorrt-root)" >&2
    exit 1
}
"$python" -m zipfile -e "$work"/kernel_lens-*.whl "$work"
mkdir -p "$folder"
rm -rf "$folder/include.new"
mv "$work/kernel_lens/include/tensorrt" "$folder/include.new"
mv "$folder/include.new" "$folder/include"

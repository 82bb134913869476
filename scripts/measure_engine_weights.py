"""Bytes of weights that engines hold, by each way of sharing them between prefill and decode.

    lvlm-export -m tiny-llava --dtype fp16 -o out/fp16
    python scripts/measure_engine_weights.py out/fp16

Engines are built by TensorRT-RTX, ahead of time, without a GPU. What its builder refuses to do
without one is said so. docs/notes/tensorrt.md has the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lvlm.core.console import Parser, run_main
from lvlm.core.errors import BuildError
from lvlm.core.progress import Progress
from lvlm.export.targets.trt_rtx import TARGET
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.plugins_trt.engines.shape_profiles import EngineLimits, parse_batch, profiles, shapes
from lvlm.plugins_trt.engines.shared_weights import shared_matrices, stored_weights
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, open_tensorrt
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity

SM = 86
GRAPHS = ("prefill", "decode")  # vision shares no weight with them
WAYS = {
    "embedded": (False, ()),
    "stripped, to be refitted": (False, ("STRIP_PLAN",)),
    "matrices as inputs": (True, ()),
}


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="+", help="folders made by lvlm-export")
    args = parser.parse_args()
    return run_main("measure_engine_weights", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    print("| bundle | weights | prefill | decode | matrices apart | on the device |")
    print("| --- | --- | --: | --: | --: | --: |")
    for bundle in args.bundle:
        manifest = lower_bundle(bundle, read_bundle(bundle), TARGET, Progress(1, quiet=True))
        for way in WAYS:
            print(f"| {bundle.name} | {way} | {_measure(bundle, manifest, way)} |", flush=True)
    return 0


def _measure(bundle: Path, manifest: Manifest, way: str) -> str:
    tensorrt = open_tensorrt(TARGET.flavour)
    as_inputs, flags = WAYS[way]
    shared = shared_matrices(stored_weights(bundle, manifest)) if as_inputs else {}
    found = profiles(manifest, EngineLimits(parse_batch("1..4")))
    sizes = []
    for name in GRAPHS:
        graph = manifest.graphs[name]
        settings = BuildSettings(
            shapes=shapes(graph, found[name], static_capacity(manifest).per_layer),
            weights=shared,
            sms=(SM,),
            flags=flags,
        )
        try:
            built = tensorrt.build(bundle / TARGET.file(graph.file), settings)
        except BuildError as error:
            return f"{_short(error)} | | |"
        sizes.append(built.engine.nbytes)
    apart = sum(weight.bytes for weight in shared.values())
    return " | ".join(f"{count:,}" for count in (*sizes, apart, sum(sizes) + apart))


def _short(error: BuildError) -> str:
    text = str(error)
    return "refused without a GPU" if "CUDA_SUCCESS" in text else f"refused: {text[:80]}"


if __name__ == "__main__":
    raise SystemExit(main())

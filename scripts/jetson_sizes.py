"""Memory that models of released shapes take on a Jetson, by the arithmetic of
``lvlm-build engine --dry-run``: the table of docs/jetson.md.

    python scripts/jetson_sizes.py [--shape qwen2.5-vl-3b …] [--block-size 128] [--target NAME]

Nothing is downloaded, written or computed: checkpoints are headers with holes behind them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Collection
from importlib import resources
from pathlib import Path

import torch
from big_shapes import SHAPES
from torch import nn

from lvlm.core.discovery import discover
from lvlm.core.progress import size
from lvlm.export.bundle_manifest import manifest_of
from lvlm.export.checkpoint.checkpoint import find_family
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan, make_plan
from lvlm.export.graphs.bundle_graphs import graph_names
from lvlm.export.recipes.recipe import known_recipe, parse_settings
from lvlm.export.targets.target import Target
from lvlm.export.weights.quantization import linear_weights
from lvlm.plugins_trt.engines.memory_estimate import MemoryEstimate, estimate
from lvlm.plugins_trt.engines.shape_profiles import longest_prompt
from lvlm.plugins_trt.engines.shared_weights import shared_matrices
from lvlm.runtime.bundle.engine_sets import EngineWeight, Range
from lvlm.runtime.bundle.manifest import Graph, Weight

FILE = "model.safetensors"
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16"}
DEFAULT = ("llava-onevision-qwen2-0.5b", "qwen2-vl-2b", "qwen2.5-vl-3b", "llava-1.5-7b")
RECIPES = ("none", "lightvlm")
MAX_TOKENS = 1024  # of an image, where a processor bounds them by pixels
SCALES = ".scales"  # of a weight's name
HEAD = "| model | weights | recipe | weights on the device | cache | workspace | in all |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=DEFAULT)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--target", default="jetson-jp72")
    args = parser.parse_args()
    target: Target = discover("lvlm.export.targets", "TARGET")[args.target]
    print(HEAD, "| --- | --- | --- | --: | --: | --: | --: |", sep="\n")
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as work:
            folder = hollow_checkpoint(Path(work) / shape, shape)
            for weights in (None, "int4"):
                for recipe in RECIPES:
                    needs = sizes(folder, target, weights, args.block_size, recipe)
                    cells = [needs.weights, needs.cache, needs.workspace, needs.total]
                    facts = [shape, weights or "fp16", f"`{recipe}`", *map(size, cells)]
                    print(f"| {' | '.join(facts)} |", flush=True)


def sizes(
    folder: Path, target: Target, weights: str | None, block: int, recipe: str
) -> MemoryEstimate:
    """Sizes of one prompt at once, 2,048 text tokens and one image."""
    plan = make_plan(
        ExportOptions(
            model=str(folder),
            recipe=parse_settings(known_recipe(recipe), []),
            output=folder / "out",
            dtype="fp16",
            weights=weights,
            block_size=block if weights else None,
            targets=(target,),
        )
    )
    stored = {
        graph: of_graph(plan, graph) for graph in graph_names(plan.recipe, plan.skeleton.language)
    }
    text = plan.config.get_text_config()
    # Of a manifest's weights the widest is looked at, which is gate and up
    widest = Weight("weights.bin", 0, 0, "float16", (2 * text.intermediate_size,))
    graphs = {name: Graph(f"{name}.onnx", (), (), ("gate+up",)) for name in stored}
    manifest = manifest_of(plan, graphs, {"gate+up": widest}, {})
    profiles = {
        "decode": {"batch": Range(1, 1, 1)},
        "prefill": {"sequence": Range(1, 1, longest_prompt(manifest))},
    }
    shared = shared_matrices(stored)
    inside = {graph: held(names, shared, target) for graph, names in stored.items()}
    return estimate(manifest, profiles, stored, shared, inside, None)


def held(stored: dict[str, EngineWeight], shared: Collection[str], target: Target) -> int:
    """Bytes of weights in an engine; scales of int4, where rounded to the nearest, may be below
    zero."""
    over = target.signed is not None and target.signed.positive(4)
    own = [weight for name, weight in stored.items() if name not in shared]
    return sum(w.bytes * (1 + (over and w.name.endswith(SCALES))) for w in own)


def of_graph(plan: ExportPlan, graph: str) -> dict[str, EngineWeight]:
    """The weights of a graph: the tower's, or the language model's, as an export stores them."""
    if graph == "compact":
        return {}
    tower = {id(p) for p in plan.skeleton.vision.parameters()}
    linears = linear_weights(plan.skeleton.model, plan.skeleton.language)
    embedding = {id(p) for p in plan.skeleton.language.embed.parameters()}
    found: dict[str, EngineWeight] = {}
    for name, parameter in plan.skeleton.model.named_parameters():
        if (id(parameter) in tower) != (graph == "vision"):
            continue
        quantized = plan.options.quantization if name in linears else None
        if quantized is None or id(parameter) in embedding:
            found[name] = weight(name, parameter)
        if quantized is not None:
            outputs, inputs = parameter.shape
            numbers, scales = f"{name}.numbers", name + SCALES
            found[numbers] = packed(numbers, outputs * inputs * quantized.bits // 8)
            found[scales] = packed(scales, 2 * outputs * inputs // quantized.block)
    return found


def weight(name: str, parameter: nn.Parameter) -> EngineWeight:
    dims = tuple(parameter.shape)
    return EngineWeight(name, "weights.bin", 0, 2 * math.prod(dims), "float16", dims)


def packed(name: str, length: int) -> EngineWeight:
    return EngineWeight(name, "weights.bin", 0, length, "uint8", (length,))


def hollow_checkpoint(folder: Path, shape: str) -> Path:
    """A checkpoint of a shape whose weights are holes in its file."""
    make, dtype = SHAPES[shape]
    config = make()
    family = find_family(config.to_dict(), "")
    with torch.device("meta"):
        model = family.build(config)
    folder.mkdir()
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + parameter.numel() * dtype.itemsize
        facts = {"dtype": NAMES[dtype], "shape": list(parameter.shape)}
        header[name] = facts | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    shipped = Path(str(resources.files("lvlm.assets") / "tiny-llava"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shipped / name, folder)
    for name, content in family.tiny_files(config).items():
        facts = json.loads(content)
        if "max_pixels" in facts:
            token = facts["patch_size"] * facts["merge_size"]
            facts["max_pixels"] = MAX_TOKENS * token**2
        (folder / name).write_text(json.dumps(facts))
    config.dtype = dtype
    config.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()

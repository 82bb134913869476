"""Bundles with engines for fake_tensorrt.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from fake_tensorrt import VERSION
from settings import CACHED, LIGHTVLM

from lvlm.core.integrity import sha256_of
from lvlm.plugins_trt.engines.greedy_choice import add_best
from lvlm.plugins_trt.engines.shape_profiles import EngineLimits, profiles
from lvlm.runtime.bundle.engine_sets import (
    SCHEMA,
    EngineGraph,
    EngineSet,
    EngineWeight,
    PluginLibrary,
    Range,
)
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity

RECIPES = {
    "none": ("none",),
    "lightvlm": LIGHTVLM,
    "prefixkv": CACHED["prefixkv (cached)"],
    "interval": CACHED["lightvlm (cached)"],
}
Make = Callable[..., Path]


def one_line(err: str) -> str:
    """What lvlm-run printed of an error."""
    assert err.startswith("lvlm-run: error: ")
    assert err.count("\n") == 1
    return err


def build_engines(
    source: Path,
    folder: Path,
    *,
    flavour: str = "tensorrt-rtx",
    weights: str = "embedded",
    batch: int = 4,
    max_prompt: int | None = None,
    plugins: str | None = None,
    greedy: bool = True,
    **changes: Any,
) -> EngineSet:
    """A copy of the bundle ``source`` in ``folder``, with engines; ``greedy``: decode chooses."""
    shutil.copytree(source, folder)
    manifest = read_bundle(folder)
    where = folder / "engines" / "sm89-fake"
    where.mkdir(parents=True)
    static = {f"capacity_{i}": c for i, c in enumerate(static_capacity(manifest).per_layer)}
    library = None
    if plugins is not None:
        (where / "liblvlm_plugins.so").write_text(plugins)
        library = PluginLibrary("liblvlm_plugins.so", sha256_of(where / "liblvlm_plugins.so"))
    graphs = {}
    for name, ranges in profiles(manifest, EngineLimits(Range(1, 1, batch), max_prompt)).items():
        file = folder / manifest.graphs[name].file
        if name == "decode" and greedy:
            file = _choosing(file)
        listed: tuple[EngineWeight, ...] = ()
        if weights == "inputs":
            file, listed = _with_weights_as_inputs(file)
        built = {
            "onnx": str(file),
            "profile": {dim: (r.min, r.opt, r.max) for dim, r in ranges.items()},
            "static": static,
        }
        path = where / f"{name}.engine"
        path.write_text(json.dumps(built))
        graphs[name] = EngineGraph(
            path.name,
            sha256_of(path),
            path.stat().st_size,
            manifest.graphs[name].file,
            ranges,
            listed,
        )
    files = ("weights.bin", *(g.file for g in manifest.graphs.values()))
    fields: dict[str, Any] = {
        "folder": where,
        "schema": SCHEMA,
        "target": "trt-rtx" if flavour == "tensorrt-rtx" else "trt-11",
        "flavour": flavour,
        "version": VERSION,
        "gpu": None,
        "sms": (86, 89),
        "hardware_compatible": False,
        "version_compatible": False,
        "plugins": library,
        "bundle": {name: manifest.files[name].sha256 for name in files},
        "options": (),
        "graphs": graphs,
    }
    engines = EngineSet(**(fields | changes))
    engines.write()
    return engines


def _choosing(file: Path) -> Path:
    """The graph of decode as it is built, beside the bundle's."""
    model = onnx.load(file, load_external_data=False)
    add_best(model)
    path = file.with_suffix(".greedy.onnx")
    onnx.save(model, path)
    return path


def _with_weights_as_inputs(file: Path) -> tuple[Path, tuple[EngineWeight, ...]]:
    """The graph with its matrices as inputs, beside the one with them inside."""
    model = onnx.load(file, load_external_data=False)
    listed = []
    for tensor in list(model.graph.initializer):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {e.key: e.value for e in tensor.external_data}
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        dims = tuple(tensor.dims)
        offset, size = int(place["offset"]), int(place["length"])
        listed.append(EngineWeight(tensor.name, place["location"], offset, size, dtype, dims))
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, dims)
        )
        model.graph.initializer.remove(tensor)
    path = file.with_suffix(".inputs.onnx")
    onnx.save(model, path)
    return path, tuple(listed)

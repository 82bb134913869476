"""What a target with plugins leaves in a graph is what the plugins take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from lowering_tools import FORMS
from onnx import helper
from settings import CACHED

from lvlm.export.targets.target import Target
from lvlm.plugins_trt.plugins.registry import plugins
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity

TARGETS = {name: target for name, target in FORMS.items() if target.plugins}


@pytest.mark.parametrize("recipe", ["lightvlm (cached)", "elastic-cache (cached)"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_nodes_have_the_attributes_and_inputs_of_their_plugins(
    target: Target, recipe: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    original = bundle("digits-llava", *CACHED[recipe], max_images=2)
    folder = Path(shutil.copytree(original, tmp_path / "bundle"))
    manifest = read_bundle(folder)
    graphs = {name: graph.file for name, graph in manifest.graphs.items()}
    seen = set()
    for file in target.write(folder, graphs, static_capacity(manifest)):
        for node in onnx.load(folder / file, load_external_data=False).graph.node:
            if node.domain != "lvlm":
                continue
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            # For the parser, which before TensorRT 10.10 takes the namespace from nowhere else.
            assert given.pop("plugin_namespace") == b"lvlm"
            assert given.pop("plugin_version") == b"1"
            words = {k: v.decode() if isinstance(v, bytes) else v for k, v in given.items()}
            plugin = plugins()[node.op_type]
            values = plugin.values(words)
            word = values[plugin.variant] if plugin.variant else None
            wanted = [
                i for i in plugin.inputs if not i.optional or i.name in plugin.needs.get(word, ())
            ]
            assert len(node.input) == len(wanted)
            assert all(node.input)
            assert len(node.output) <= len(plugin.outputs)
            seen.add(node.op_type)
    expected = {"CacheAttention", "CacheCompact"}  # a bundle in fp32
    expected |= {"CacheImportance"} if "lightvlm" in recipe else {"ScoredAttention"}
    expected |= {"TokenImportance", "TokenMerge"} if "lightvlm" in recipe else set()
    expected |= set() if "TensorScatter" in target.imports else {"CacheUpdate"}
    assert seen == expected

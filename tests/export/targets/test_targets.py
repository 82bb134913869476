"""Every target: what it says of itself, and that lowered graphs hold only what it takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from bundles import OTHERS
from example_counts import whole
from lowering_tools import FORMS, OPS, PLUGIN_ATTRIBUTES, TARGETS, all_nodes, lowered
from onnx import TensorProto
from settings import LIGHTVLM, SMALL

from lvlm.export.ops.op import DOMAIN, OPSET
from lvlm.export.targets.description import FLOATS, NEW_OPS
from lvlm.export.targets.target import Target
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.tools.jetpacks import JETPACKS

DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}


def test_every_target_names_its_files_and_is_in_the_docs() -> None:
    assert {"trt-rtx", "trt-11", "trt-10", "jetson-orin-jp62", "ort-cuda"} <= set(TARGETS)
    page = (Path(__file__).parents[3] / "docs/tensorrt.md").read_text()
    for name, target in TARGETS.items():
        assert target.file("prefill.onnx") == f"prefill.{name}.onnx"
        assert f"\n| `{name}` |" in page


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_an_entry_does_not_contradict_itself(target: Target) -> None:
    assert target.imports <= NEW_OPS
    assert target.attention <= FLOATS
    assert set() != target.matmul_types <= FLOATS
    assert 20 <= target.opset <= OPSET
    if target.flavour == "onnxruntime":
        assert not target.plugins
        assert not target.static_cache
    if "TensorScatter" in target.imports and target.flavour != "onnxruntime":
        assert target.static_cache  # TensorRT's own cache write wants it
    if target.imports:
        assert target.opset >= 23
    assert target.plugins or not target.valid_only
    if target.signed is not None:
        assert hash(target)
        # Blocks came with opset 21, and int4 has nothing else
        assert (4 in target.signed.blocks) == (target.opset >= 21)
        assert set(target.signed.negative_scales) <= set(target.signed.blocks)


def test_targets_of_jetsons_are_those_of_their_jetpacks() -> None:
    jetsons = {name: t for name, t in TARGETS.items() if name.startswith("jetson-")}
    named = {target for jetpack in JETPACKS for target in jetpack.targets.values()}
    assert named == set(jetsons)
    for jetpack in JETPACKS:
        for sm, name in jetpack.targets.items():
            assert sm in jetsons[name].sms
            assert jetsons[name].version == jetpack.tensorrt


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("target", FORMS.values(), ids=FORMS)
def test_lowered_graphs_hold_only_what_the_target_takes(
    target: Target, dtype: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    original = bundle(SMALL, *LIGHTVLM, dtype=dtype, max_images=2)
    folder = lowered(original, tmp_path / "bundle", target)
    manifest = read_bundle(folder)
    for name, graph in manifest.graphs.items():
        path = folder / target.file(graph.file)
        model = onnx.load(path, load_external_data=False)
        canonical = onnx.load(folder / graph.file, load_external_data=False)
        assert {o.domain: o.version for o in model.opset_import}[""] == target.opset
        kinds = {(node.domain, node.op_type) for node in all_nodes(model)}
        standard = {op for domain, op in kinds if domain == ""}
        assert standard & NEW_OPS <= target.imports
        own = {op for domain, op in kinds if domain == DOMAIN}
        has_type = manifest.dtype in target.attention
        valid_only = target.plugins and (target.valid_only or not has_type)
        if not has_type or (name == "decode" and valid_only):
            assert "Attention" not in standard
        elif name in ("vision", "decode"):
            assert "Attention" in standard
        if target.plugins and name in ("prefill", "decode"):
            # With a type of its own, TensorRT keeps what is over a prompt alone
            wanted = valid_only if name == "decode" else not has_type
            assert ("CacheAttention" in own) == wanted
            assert "Softmax" not in standard
        functions = {(f.domain, f.name) for f in model.functions}
        if target.plugins:
            assert not functions
            assert {domain for domain, _ in kinds} <= {"", DOMAIN}
            assert "TopK" not in standard
            assert all(OPS[op].lowered is None for op in own)
        else:
            assert own == {op for domain, op in functions if domain == DOMAIN}
        fixed = all(not str(d).startswith("capacity_") for d in dimensions(model))
        assert fixed == (target.static_cache or name == "vision")
        kept, added = stored(canonical), stored(model)
        assert kept.items() <= added.items()
        bounds = [t for t in model.graph.initializer if t.name not in kept]  # of split products
        assert all((t.data_type, list(t.dims)) == (TensorProto.INT64, [1]) for t in bounds)
        assert [v.name for v in model.graph.input] == [v.name for v in canonical.graph.input]
        assert [v.name for v in model.graph.output] == [v.name for v in canonical.graph.output]
        check(model, path)


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_lowers_for_every_target(
    name: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """In a normal run for every other one, of the next family for the others."""
    original = bundle(name, max_images=2)
    targets = list(FORMS.values())
    for target in targets if whole() else targets[OTHERS.index(name) % 2 :: 2]:
        folder = lowered(original, tmp_path / target.name, target)
        for graph in read_bundle(folder).graphs.values():
            path = folder / target.file(graph.file)
            model = onnx.load(path, load_external_data=False)
            kinds = {(node.domain, node.op_type) for node in all_nodes(model)}
            assert {op for domain, op in kinds if domain == ""} & NEW_OPS <= target.imports
            check(model, path)
        shutil.rmtree(folder)


def dimensions(model: onnx.ModelProto) -> list[int | str]:
    values = [*model.graph.input, *model.graph.output]
    shapes = [value.type.tensor_type.shape.dim for value in values]
    return [dim.dim_param or dim.dim_value for shape in shapes for dim in shape]


def stored(model: onnx.ModelProto) -> dict[str, bytes]:
    """Initializers by name; of external ones the place, not the data."""
    return {t.name: t.SerializeToString() for t in model.graph.initializer}


def check(model: onnx.ModelProto, path: Path) -> None:
    """ONNX's checker; the attributes that only TensorRT's parser reads are unknown to a schema."""
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        extra = [a for a in node.attribute if a.name in PLUGIN_ATTRIBUTES]
        if extra:
            assert {a.name: a.s for a in extra} == PLUGIN_ATTRIBUTES
            for attribute in extra:
                node.attribute.remove(attribute)
    beside = path.with_name(f"checked-{path.name}")
    onnx.save(model, beside)
    onnx.checker.check_model(str(beside), full_check=True)

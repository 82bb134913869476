"""Weights that come quantized: their integers in the bundle, and what the graphs compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from linear_graphs import make_store, random_values, run, save_checkpoint, traced

from lvlm.core.errors import ExportError
from lvlm.export.checkpoint.checkpoint_form import Read
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.targets.passes.block_linears import use_block_linears
from lvlm.export.weights.weight_steps import weight_steps
from lvlm.export.weights.weights_file import WEIGHTS, WeightsFile

INPUTS = 192
SHAPES = {"q.weight": (6, INPUTS), "k.weight": (2, INPUTS), "v.weight": (3, INPUTS)}
BODY = "".join(f"{x}t = Transpose<perm = [1, 0]>({x}.weight) {x} = MatMul(x, {x}t) " for x in "qkv")
OUTPUTS = "float[2, n, 6] q, float[2, n, 2] k, float[2, n, 3] v"


@dataclass(frozen=True)
class Kind:
    """Bits and groups of q, k and v; ``zeros``: those with zero points."""

    bits: tuple[int, int, int] = (4, 4, 4)
    groups: tuple[int, int, int] = (6, 6, 6)
    zeros: str = ""


KINDS = {
    "plain": (Kind(), ["q+k+v.weight"], [32]),
    "zeros": (Kind(zeros="qkv"), ["q+k+v.weight"], [32]),
    "one-with-zeros": (Kind(zeros="k"), ["q+k+v.weight"], [32]),
    # An odd number of groups with zero points is halved, and the others' with it
    "odd": (Kind(groups=(3, 3, 3), zeros="q"), ["q+k+v.weight"], [32]),
    "odd-plain": (Kind(groups=(3, 3, 3)), ["q+k+v.weight"], [64]),
    "sizes": (Kind(groups=(6, 3, 3)), ["q+k+v.weight"], [32]),
    "one-group": (Kind(groups=(1, 1, 1), bits=(8, 8, 8), zeros="v"), ["q+k+v.weight"], [64]),
    "bits": (Kind(bits=(4, 8, 8), zeros="k"), ["q.weight", "k+v.weight"], [32, 32]),
}


def packed(kind: Kind) -> tuple[dict[str, PackedTensor], dict[str, Unpacked]]:
    rng, found, parts = np.random.default_rng(3), {}, {}
    for (name, shape), bits, groups in zip(SHAPES.items(), kind.bits, kind.groups, strict=True):
        has_zeros = name[0] in kind.zeros
        zeros = torch.from_numpy(rng.integers(0, 2**bits, (shape[0], groups), np.uint8))
        parts[name] = Unpacked(
            torch.from_numpy(rng.integers(0, 2**bits, shape, np.uint8)),
            torch.from_numpy(rng.uniform(0.01, 0.1, (shape[0], groups)).astype(np.float32)),
            zeros if has_zeros else None,
        )

        def unpack(_: Read, name: str = name) -> Unpacked:
            return parts[name]

        found[name] = PackedTensor(shape, bits, groups, not has_zeros, unpack)
    return found, parts


def dense(parts: Unpacked, bits: int) -> np.ndarray:
    """Number after number."""
    (outputs, inputs), run_ = parts.numbers.shape, INPUTS // parts.scales.shape[1]
    found = np.zeros((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            zero = 2 ** (bits - 1) if parts.zero_points is None else parts.zero_points[n, k // run_]
            found[n, k] = (int(parts.numbers[n, k]) - int(zero)) * parts.scales[n, k // run_]
    return found


def write(folder: Path, graph: TracedGraph, given: dict[str, PackedTensor]) -> WeightsFile:
    checkpoint = save_checkpoint(folder, {n: np.zeros(s, np.float32) for n, s in SHAPES.items()})
    store = make_store([graph], checkpoint)
    for step in weight_steps(None, (), given):
        step.apply([graph], store)
    weights = WeightsFile.of(store)
    weights.attach([graph])
    weights.write(folder, checkpoint, lambda _: None)
    ir.save(graph.model, folder / "g.onnx")
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_integers_stay_and_products_are_those_of_the_dense_weights(
    kind: str, tmp_path: Path
) -> None:
    of, names, blocks = KINDS[kind]
    given, parts = packed(of)
    values = {n: dense(parts[n], bits) for n, bits in zip(SHAPES, of.bits, strict=True)}
    wanted = run(traced(BODY, OUTPUTS, values, width=INPUTS).model, width=INPUTS)
    graph = traced(BODY, OUTPUTS, random_values(SHAPES), width=INPUTS)
    weights = write(tmp_path, graph, given)
    spread = [node for node in graph.model.graph if node.op_type == "DequantizeLinear"]
    assert [node.attributes.get_int("block_size", 0) for node in spread] == blocks
    content = (tmp_path / WEIGHTS).read_bytes()
    for name in names:
        members = [f"{x}.weight" for x in name.removesuffix(".weight").split("+")]
        bits = given[members[0]].bits
        stored = weights.weights[f"{name}.int{bits}"]
        held = np.frombuffer(content[stored.offset : stored.offset + stored.nbytes], np.uint8)
        if bits == 4:
            held = np.stack([held & 15, held >> 4], axis=-1)
        numbers = np.concatenate([parts[member].numbers.numpy() for member in members])
        np.testing.assert_array_equal(held.reshape(-1, INPUTS), numbers)
    for ours, theirs in zip(run(tmp_path / "g.onnx", width=INPUTS), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    model = ir.load(tmp_path / "g.onnx")
    assert use_block_linears(model) == len(names)
    model.opset_imports["com.microsoft"] = 1
    ir.save(model, tmp_path / "lowered.onnx")
    for ours, theirs in zip(run(tmp_path / "lowered.onnx", width=INPUTS), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_what_is_no_product_is_named(tmp_path: Path) -> None:
    body = BODY.replace("v = MatMul(x, vt)", "v = Add(x, vt)")
    body = body.replace("vt = Transpose<perm = [1, 0]>(v.weight)", "vt = Relu(v.weight)")
    body = body.replace("v = Add(x, vt)", "v = ReduceSum(vt)")
    outputs = OUTPUTS.replace("float[2, n, 3] v", "float[1, 1] v")
    graph = traced(body, outputs, random_values(SHAPES), width=INPUTS)
    with pytest.raises(ExportError, match=r"v\.weight is no plain MatMul; give --dequan"):
        write(tmp_path, graph, packed(Kind())[0])

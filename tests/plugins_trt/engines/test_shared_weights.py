"""Weights as inputs: read where they lie, never computed with, whatever size the model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from lvlm.core.errors import BuildError, BundleError
from lvlm.export.targets.passes.split_linears import split_linears
from lvlm.plugins_trt.engines.graph_protos import read_proto
from lvlm.plugins_trt.engines.shared_weights import with_inputs
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, Built, open_tensorrt
from lvlm.runtime.bundle.engine_sets import EngineWeight

HALF = TensorProto.FLOAT16


class Stack:
    """Layers of a language model's linears, without what lies between them: q|k|v and gate|up are
    stored side by side, as an export does. Weights are where nothing is: their values are never
    looked at."""

    def __init__(self, layers: int, hidden: int, inner: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, EngineWeight] = {}
        self.initializers: list[onnx.TensorProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        x = "x"
        for layer in range(layers):
            q, k, v = self.split(x, f"{layer}.qkv", hidden, [hidden] * 3)
            x = self.add(x, self.matmul(self.mul(q, self.mul(k, v)), f"{layer}.o", hidden, hidden))
            gate, up = self.split(x, f"{layer}.mlp", hidden, [inner] * 2)
            silu = self.mul(self.node("Sigmoid", gate), gate)
            x = self.add(x, self.matmul(self.mul(silu, up), f"{layer}.down", inner, hidden))
        ports = [helper.make_tensor_value_info(n, HALF, ["b", hidden]) for n in ("x", x)]
        graph = helper.make_graph(
            self.nodes, "stack", ports[:1], ports[1:], self.initializers, value_info=self.values
        )
        opset = [helper.make_opsetid("", 20)]
        whole = helper.make_model(graph, opset_imports=opset, ir_version=10)
        model = ir.from_proto(whole)
        split_linears(model)
        common.RemoveUnusedNodesPass()(model)  # the products that were split
        self.model = ir.to_proto(model)

    def node(self, kind: str, *inputs: str) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name]))
        return name

    def mul(self, a: str, b: str) -> str:
        return self.node("Mul", a, b)

    def add(self, a: str, b: str) -> str:
        return self.node("Add", a, b)

    def matmul(self, x: str, name: str, rows: int, columns: int) -> str:
        size = 2 * rows * columns
        tensor = onnx.TensorProto(name=name, data_type=HALF, dims=(rows, columns))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "none.bin"), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        self.initializers.append(tensor)
        self.stored[name] = EngineWeight(name, "none.bin", 0, size, "float16", (rows, columns))
        return self.node("MatMul", x, name)

    def split(self, x: str, name: str, rows: int, parts: list[int]) -> list[str]:
        product = self.matmul(x, name, rows, sum(parts))
        outputs = [f"{name}_{i}" for i in range(len(parts))]
        lengths = f"{name}_lengths"
        self.initializers.append(numpy_helper.from_array(np.array(parts, np.int64), lengths))
        self.nodes.append(helper.make_node("Split", [product, lengths], outputs, axis=-1))
        for output, width in zip(outputs, parts, strict=True):
            self.values.append(helper.make_tensor_value_info(output, HALF, ["b", width]))
        return outputs

    def build(self, hidden: int, batch: int = 4) -> Built:
        weights = with_inputs(self.model, self.stored)
        shapes = {"x": ((1, hidden), (1, hidden), (batch, hidden))}
        assert sum(w.nbytes for w in weights) == sum(w.bytes for w in self.stored.values())
        trt = open_tensorrt("tensorrt-rtx")
        return trt.build(self.model.SerializeToString(), BuildSettings(shapes, sms=(86,)))


def test_a_file_that_holds_no_graph_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "decode.onnx").write_bytes(b"\x00 no graph")
    with pytest.raises(BundleError, match=r"decode\.onnx holds no ONNX graph .*; export it again"):
        read_proto(tmp_path / "decode.onnx")


def test_columns_that_a_graph_takes_are_inputs_of_their_own() -> None:
    stack = Stack(1, 8, 16)
    weights = {weight.name: weight for weight in with_inputs(stack.model, stack.stored)}
    assert {name: (w.dims, w.columns) for name, w in weights.items()} == {
        "0.o": ((8, 8), None),
        "0.down": ((16, 8), None),
        "0.qkv[0:8]": ((8, 8), (0, 8)),
        "0.qkv[8:16]": ((8, 8), (8, 16)),
        "0.qkv[16:24]": ((8, 8), (16, 24)),
        "0.mlp[0:16]": ((8, 16), (0, 16)),
        "0.mlp[16:32]": ((8, 16), (16, 32)),
    }
    assert weights["0.qkv[8:16]"].bytes == stack.stored["0.qkv"].bytes  # where the whole lies
    inputs = {port.name for port in stack.model.graph.input}
    assert inputs == {"x", *weights}
    assert "Slice" not in {node.op_type for node in stack.model.graph.node}


def test_what_a_graph_would_compute_of_a_weight_in_every_call_is_refused() -> None:
    stack = Stack(1, 8, 16)
    (product,) = (n for n in stack.model.graph.node if "0.o" in n.input)
    product.input[1] = "turned"
    stack.model.graph.node.insert(0, helper.make_node("Transpose", ["0.o"], ["turned"]))
    with pytest.raises(
        BuildError, match=r"^Transpose would be computed of the weight 0\.o in ever"
    ):
        with_inputs(stack.model, stack.stored)


def test_memory_that_the_linears_of_a_7b_model_compute_in() -> None:
    """No copies of weights, which were 0.28 GB a layer, all of them at once."""
    pytest.importorskip("tensorrt_rtx")
    built = Stack(32, 4096, 11008).build(4096)
    assert built.activations is not None
    assert 0 < built.activations < 100_000_000
    assert built.engine.nbytes < 5_000_000

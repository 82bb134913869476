"""Every op keeps its contract: outputs, ONNX function, TensorRT, one node when exported."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from single_node import (
    FLOATS,
    assert_close,
    axis_names,
    feeds,
    profiles,
    session,
    single_node_model,
)

from lvlm.core.discovery import discover
from lvlm.core.errors import BackendError
from lvlm.export.ops.op import DOMAIN, VERSION, Op, OpSample
from lvlm.export.targets import trt_rtx
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, TensorRtBuilder, open_tensorrt
from lvlm.runtime.bundle.manifest import Capacity

OPS = discover("lvlm.export.ops", "OP")


def variant(op: Op, sample: OpSample) -> tuple[object, ...]:
    """Samples of one variant are the same graph: only capital axes differ."""
    found: list[object] = sorted(sample.attributes.items())
    for formal, tensor in zip(op.schema.inputs, sample.inputs, strict=True):
        if tensor is not None:
            axes = zip(axis_names(op, formal.name, tensor.dim()), tensor.shape, strict=True)
            found += [formal.name, tensor.dtype, *(a if a.isupper() else n for a, n in axes)]
    return tuple(found)


def params(samples: Iterable[tuple[Op, OpSample]]) -> list[object]:
    return [pytest.param(op, s, id=f"{op.name}: {s.name}") for op, s in samples]


def in_bf16(op: Op, sample: OpSample) -> OpSample:
    """The tensors of the schema's type T, that of the data, as bf16."""
    pairs = zip(op.schema.inputs, sample.inputs, strict=True)
    tensors = [t if t is None or f.type_str != "T" else t.bfloat16() for f, t in pairs]
    return OpSample(f"{sample.name} in bfloat16", tensors, sample.attributes)


def for_tensorrt(op: Op, sample: OpSample) -> onnx.ModelProto:
    """The op's model as the target trt-rtx writes it."""
    model = ir.serde.deserialize_model(single_node_model(op, sample))
    trt_rtx.TARGET.lower(model, Capacity(1, 1, ()))
    return ir.to_proto(model)


def rtx() -> TensorRtBuilder:
    pytest.importorskip("tensorrt_rtx")
    return open_tensorrt("tensorrt-rtx")


ALL = [(op, sample) for op in OPS.values() for sample in op.samples()]
VARIANTS = list({(op.name, variant(op, s)): (op, s) for op, s in reversed(ALL)}.values())[::-1]
# One of each number of inputs is enough where a test is slow.
ARITIES = list({(op.name, s.inputs.count(None)): (op, s) for op, s in reversed(VARIANTS)}.values())
BRAIN = [(op, in_bf16(op, s)) for op, s in ARITIES]


def form(op: Op, sample: OpSample) -> tuple[object, ...]:
    """What decides a body, and the data's type."""
    words = [(k, v) for k, v in sorted(sample.attributes.items()) if isinstance(v, str)]
    types = {t.dtype for t in sample.inputs if t is not None} & set(FLOATS)
    return op.name, sample.inputs.count(None), str(words), torch.float16 in types


# In a normal run TensorRT builds every body in every type, with --whole every shape and number too.
FORMS = list({form(op, s): (op, s) for op, s in reversed(VARIANTS)}.values())[::-1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"built", "sample"} <= set(metafunc.fixturenames):
        shapes = VARIANTS if metafunc.config.getoption("--whole") else FORMS
        metafunc.parametrize(("built", "sample"), params(shapes + BRAIN))


@functools.cache
def variant_session(op_name: str, key: tuple[object, ...]) -> onnxruntime.InferenceSession:
    """One session per variant: its dynamic axes must serve all of the variant's samples."""
    op, sample = next((o, s) for o, s in VARIANTS if (o.name, variant(o, s)) == (op_name, key))
    return session(single_node_model(op, sample))


def test_there_are_ops() -> None:
    assert {"CacheCompact", "CacheImportance", "CausalAttention"} <= set(OPS)
    assert {"TokenImportance", "TokenMerge"} <= set(OPS)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_schema_and_axes_name_the_same_inputs(op: Op) -> None:
    schema = onnx.defs.get_schema(op.name, VERSION, DOMAIN)
    assert [formal.name for formal in schema.inputs] == list(op.axes)
    assert schema.name == op.name
    assert schema.doc
    names = [s.name for s in op.samples()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("op", "sample"), params(ALL))
def test_described_outputs_are_those_of_the_reference(op: Op, sample: OpSample) -> None:
    described = op.outputs(*sample.inputs, **sample.attributes)
    found = op(*sample.inputs, **sample.attributes)
    assert [(t.dtype, tuple(t.shape)) for t in found] == [(d, tuple(s)) for d, s in described]


@pytest.mark.parametrize(("op", "sample"), params(ALL))
def test_onnx_function_computes_the_reference(op: Op, sample: OpSample) -> None:
    runner = variant_session(op.name, variant(op, sample))
    assert_close(op, sample, runner.run(None, feeds(op, sample)))


@pytest.mark.parametrize(("op", "sample"), params(VARIANTS))
@pytest.mark.parametrize("dynamic", [True, False])
def test_checker_takes_node_and_body(op: Op, sample: OpSample, dynamic: bool) -> None:
    model = single_node_model(op, sample, dynamic=dynamic)
    onnx.checker.check_model(model, full_check=True)
    # The checker trusts a registered schema; inlined, it infers through the body as well.
    onnx.checker.check_model(onnx.inliner.inline_local_functions(model), full_check=True)


@pytest.mark.slow
def test_tensorrt_builds_it_and_reads_every_input(built: Op, sample: OpSample) -> None:
    model = for_tensorrt(built, sample).SerializeToString()
    assert rtx().build(model, BuildSettings(profiles(built, sample))).engine.nbytes > 0


LOWERED = [(op, sample) for op, sample in ALL if op.lowered is not None]


@pytest.mark.parametrize(("op", "sample"), params(LOWERED))
def test_lowered_form_computes_the_reference(op: Op, sample: OpSample) -> None:
    model = for_tensorrt(op, sample)
    onnx.checker.check_model(model, full_check=True)
    assert op.name not in {node.op_type for node in model.graph.node}
    assert op.name not in {function.name for function in model.functions}
    assert_close(op, sample, session(model).run(None, feeds(op, sample)))


def test_gate_names_what_tensorrt_leaves_unread() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x, float[2] y) => (float[2] z) '
    model = onnx.parser.parse_model(text + "{ z = Relu(x) }").SerializeToString()
    with pytest.raises(BackendError, match="leaves y of the graph unused"):
        rtx().build(model)


def test_gate_refuses_a_profile_that_contradicts_itself() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] z) '
    model = onnx.parser.parse_model(text + "{ z = Relu(x) }").SerializeToString()
    with pytest.raises(BackendError, match=r"shape profile: .*MIN<=OPT<=MAX"):
        rtx().build(model, BuildSettings({"x": ([4], [2], [3])}))


def test_gate_repeats_the_parsers_message(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (int64[a, b] z) '
    model = onnx.parser.parse_model(text + "{ z = NoSuchOp(x) }")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(BackendError, match=r"cannot parse this graph: .*NoSuchOp"):
        rtx().build(path)


class Calls(torch.nn.Module):
    """A model that calls the op on its own inputs."""

    def __init__(self, op: Op, sample: OpSample) -> None:
        super().__init__()
        self.op, self.attributes = op, sample.attributes
        self.left_out = sample.inputs.count(None)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.op(*inputs, *[None] * self.left_out, **self.attributes)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "sample"), params(ARITIES))
def test_export_leaves_one_node(op: Op, sample: OpSample) -> None:
    """Traced by torch.export first, as checkpoints are, with the varying axes dynamic."""
    given = [t for t in sample.inputs if t is not None]
    axes = [axis_names(op, f.name, t.dim()) for f, t in zip(op.schema.inputs, given, strict=False)]
    dims = [
        {i: torch.export.Dim.AUTO for i, axis in enumerate(a) if axis.isupper() and t.shape[i] > 1}
        for a, t in zip(axes, given, strict=True)
    ]
    module = Calls(op, sample)
    traced = torch.export.export(module, tuple(given), dynamic_shapes=(tuple(dims),), strict=False)
    program = torch.onnx.export(traced, dynamo=True, opset_version=24, optimize=False)
    model = program.model
    (node,) = [n for n in model.graph if n.domain == DOMAIN]
    assert (node.op_type, len(node.inputs)) == (op.name, len(given))
    assert {name: value.value for name, value in node.attributes.items()} == pytest.approx(
        dict(sample.attributes)
    )

    body = ir.serde.deserialize_function(op.function(sample.attributes))
    model.functions[body.identifier()] = body
    model.opset_imports[DOMAIN] = VERSION
    runner = session(ir.to_proto(model))
    assert any(isinstance(extent, str) for i in runner.get_inputs() for extent in i.shape)
    feed = zip(runner.get_inputs(), given, strict=True)
    assert_close(op, sample, runner.run(None, {i.name: t.numpy() for i, t in feed}))

"""A model of one ``lvlm::`` node: what implementations of an op are checked and timed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, Op, OpSample

ELEMENT = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int8: onnx.TensorProto.INT8,
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def single_node_model(
    op: Op, sample: OpSample, dynamic: bool = True, *, function: bool = True
) -> onnx.ModelProto:
    """One node of ``op``, with its ``function`` or without, inputs and outputs under the schema's
    formal names.

    ``dynamic``: axes that vary at run time (capital in ``Op.axes``) are symbolic; outputs then
    state their rank only. Otherwise every extent is the sample's.
    """
    inputs = []
    for name, tensor in _given(op, sample):
        axes = zip(axis_names(op, name, tensor.dim()), tensor.shape, strict=True)
        shape = [axis if dynamic and axis.isupper() else extent for axis, extent in axes]
        inputs.append(helper.make_tensor_value_info(name, ELEMENT[tensor.dtype], shape))
    described = op.outputs(*sample.inputs, **sample.attributes)
    outputs = [
        helper.make_tensor_value_info(
            formal.name, ELEMENT[dtype], [None] * len(shape) if dynamic else [int(n) for n in shape]
        )
        # An optional output comes last and may not be given.
        for formal, (dtype, shape) in zip(op.schema.outputs, described, strict=False)
    ]
    node = helper.make_node(
        op.name, [i.name for i in inputs], [o.name for o in outputs], domain=DOMAIN
    )
    node.attribute.extend(helper.make_attribute(k, v) for k, v in sample.attributes.items())
    return helper.make_model(
        helper.make_graph([node], op.name, inputs, outputs),
        functions=[op.function(sample.attributes)] if function else [],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=11,  # opset 24 came with 11; newer ones are refused by released runtimes
    )


def session(
    model: onnx.ModelProto,
    library: Path | None = None,
    threads: int = 1,
    initializers: Mapping[str, onnxruntime.OrtValue] = MappingProxyType({}),
) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime on CPU threads, one since small graphs only wait for more; with the
    kernels of ``library``, and with ``initializers`` for its own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in initializers.items():
        options.add_initializer(name, value)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feeds(op: Op, sample: OpSample) -> dict[str, np.ndarray]:
    """The sample's tensors by formal name, as NumPy arrays (bf16 has none)."""
    return {name: tensor.numpy() for name, tensor in _given(op, sample)}


def assert_close(op: Op, sample: OpSample, got: Iterable[np.ndarray]) -> None:
    """What an implementation gave for a sample is what the reference gives, within tolerance."""
    floats = [t.dtype for t in sample.inputs if t is not None and t.dtype in FLOATS]
    dtype = floats[0] if floats else torch.float32
    expected = op(*sample.inputs, **sample.attributes)
    names = [formal.name for formal in op.schema.outputs[: len(expected)]]
    for name, want, have in zip(names, expected, got, strict=True):
        if want.dtype not in FLOATS:
            np.testing.assert_array_equal(have, want.numpy(), err_msg=name)
            continue
        assert want.isfinite().all(), name
        assert np.isfinite(have).all(), name
        wide = want.double().numpy()
        if name in sample.unspecified:
            have = np.where(sample.unspecified[name], wide, have)
        error = np.abs(have.astype(np.float64) - wide).max() / max(1, np.abs(wide).max())
        assert error <= op.tolerance[dtype], name


def profiles(op: Op, sample: OpSample) -> Mapping[str, tuple[list[int], list[int], list[int]]]:
    """(min, opt, max) shapes for a TensorRT build: varying axes go from 1 over the sample's
    extent to twice it."""
    found = {}
    for name, tensor in _given(op, sample):
        axes = axis_names(op, name, tensor.dim())
        opt = list(tensor.shape)
        low = [1 if a.isupper() else n for a, n in zip(axes, opt, strict=True)]
        high = [2 * n if a.isupper() else n for a, n in zip(axes, opt, strict=True)]
        found[name] = (low, opt, high)
    return found


def axis_names(op: Op, name: str, rank: int) -> list[str]:
    """The axes of the input ``name`` at this rank; those before the named ones are fixed."""
    axes = op.axes[name].split()
    return ["fixed"] * (rank - len(axes)) + axes


def _given(op: Op, sample: OpSample) -> list[tuple[str, torch.Tensor]]:
    pairs = zip(op.schema.inputs, sample.inputs, strict=True)
    return [(formal.name, tensor) for formal, tensor in pairs if tensor is not None]

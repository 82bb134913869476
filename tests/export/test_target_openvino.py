"""Target openvino: what OpenVINO's reader is given, and that every op computes its contract there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest
import torch
from bundles import CACHED

from lvlm.export.ops._contract import DOMAIN, Op, Sample
from lvlm.export.ops._model import feeds, session, single_node_model
from lvlm.export.targets._host_writes import leave_writes_to_host
from lvlm.export.targets._loops import scans_to_loops
from lvlm.export.targets.openvino import TARGET
from lvlm.runtime.backends.openvino import SLOTS
from lvlm.runtime.bundle import Capacity, read_bundle
from lvlm.runtime.discovery import discover
from lvlm.runtime.errors import ExportError

# CacheUpdate is for targets with plugins.
OPS: dict[str, Op] = {
    name: op for name, op in discover("lvlm.export.ops", "OP").items() if name != "CacheUpdate"
}
PRECISIONS = {"FP32": "f32", "BF16": "bf16"}
TOLERANCE = {"f32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def core() -> openvino.Core:
    return openvino.Core()


def here() -> list[str]:
    """The precisions that this machine computes in."""
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [precision for name, precision in PRECISIONS.items() if name in able]


def compiled(model: onnx.ModelProto, folder: Path, precision: str = "f32") -> Any:
    onnx.save(model, folder / "model.onnx")
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    return core().compile_model(core().read_model(folder / "model.onnx"), "CPU", options)


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = ir.serde.deserialize_model(model)
    TARGET.lower(changed, Capacity(1, 1, ()))
    return ir.to_proto(changed)


def one_of_each_kind() -> list[Any]:
    """One sample of each number of inputs, set of attributes and type of data."""
    found = {}
    for op in OPS.values():
        for sample in op.samples():
            kind = (op.name, str(sample.attributes), sample.inputs.count(None))
            found.setdefault((*kind, str(sample.inputs[0].dtype)), (op, sample))  # type: ignore
    return [
        pytest.param(op, sample, precision, id=f"{op.name}: {sample.name}, {precision}")
        for op, sample in found.values()
        for precision in here()
    ]


@pytest.mark.parametrize(("op", "sample", "precision"), one_of_each_kind())
def test_ops_compute_their_contract(
    op: Op, sample: Sample, precision: str, tmp_path: Path
) -> None:
    model = compiled(lowered(single_node_model(op, sample)), tmp_path, precision)
    names = [port.any_name for port in model.outputs]
    got = model(feeds(op, sample))
    expected = op(*sample.inputs, **sample.attributes)
    dtypes = [t.dtype for t in sample.inputs if t is not None and t.is_floating_point()]
    if precision == "bf16":
        dtypes = [torch.bfloat16]
    for number, want in enumerate(expected):
        have, name = got[number], op.schema.outputs[number].name
        assert have.shape == tuple(want.shape), names
        if not want.is_floating_point():
            np.testing.assert_array_equal(have, want.numpy(), err_msg=name)
            continue
        valid = ~sample.unspecified.get(name, torch.zeros((), dtype=torch.bool)).numpy()
        difference = np.abs(have.astype(float) - want.double().numpy()) * valid
        limit = op.tolerance[dtypes[0]] * max(1, float(want.double().abs().max()))
        assert difference.max(initial=0) <= limit, name

"""Every plugin's kernels against the torch reference of its op, on the op's own samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from example_counts import whole

from lvlm.core.discovery import discover
from lvlm.export.ops.op import Op, OpSample
from lvlm.plugins_trt.plugins.plan_runner import run
from lvlm.plugins_trt.plugins.plugin_plan import Plugin
from lvlm.plugins_trt.plugins.registry import plugins

OPS: dict[str, Op] = discover("lvlm.export.ops", "OP")


def supported(plugin: Plugin, sample: OpSample) -> bool:
    """Modes that exist for parity tests alone have no kernel."""
    word = sample.attributes.get(plugin.variant or "")
    return word is None or word in plugin.words()


def cases(name: str, plugin: Plugin) -> list[OpSample]:
    """An op's samples; in a normal run all in fp32, and one in half precision."""
    found = [sample for sample in OPS[name].samples() if supported(plugin, sample)]
    half = [s for s in found if any(t is not None and t.dtype in HALF for t in s.inputs)]
    left_out = [] if whole() else half[1:]
    return [sample for sample in found if not any(sample is one for one in left_out)]


HALF = (torch.float16, torch.bfloat16)
CASES = [
    pytest.param(name, sample, id=f"{name}-{sample.name}")
    for name, plugin in plugins().items()
    for sample in cases(name, plugin)
]


def check(name: str, sample: OpSample, device: torch.device) -> None:
    """Run both and compare; integers exactly, data within the op's tolerance."""
    op = OPS[name]
    inputs = [None if t is None else t.to(device) for t in sample.inputs]
    expected = op.reference(*sample.inputs, **sample.attributes)
    found = run(plugins()[name], inputs, sample.attributes)
    data = next(t.dtype for t in sample.inputs if t is not None and t.dtype.is_floating_point)
    outputs = [parameter.name for parameter in op.schema.outputs]
    for output, right, got in zip(outputs, expected, found, strict=False):
        assert (got.shape, got.dtype) == (right.shape, right.dtype), output
        compare(output, right, got.cpu(), sample.unspecified.get(output), op.tolerance[data])


def compare(
    name: str, right: torch.Tensor, got: torch.Tensor, free: torch.Tensor | None, tolerance: float
) -> None:
    if not right.dtype.is_floating_point:
        assert torch.equal(got, right), name
        return
    right, got = right.double(), got.double()
    if free is not None:
        assert got[free].isfinite().all(), name
        right, got = right.masked_fill(free, 0), got.masked_fill(free, 0)
    wild = ~right.isfinite()
    assert torch.equal(~got.isfinite(), wild), f"{name}: not finite at other places"
    right, got = right.masked_fill(wild, 0), got.masked_fill(wild, 0)
    largest = max(1.0, float(right.abs().max())) if right.numel() else 1.0
    assert float((got - right).abs().max() if right.numel() else 0) <= tolerance * largest, name


@pytest.mark.parametrize(("name", "sample"), CASES)
def test_samples(name: str, sample: OpSample, gpu: torch.device) -> None:
    check(name, sample, gpu)


@pytest.mark.parametrize("name", sorted(plugins()))
def test_plan_is_the_schema(name: str) -> None:
    """Names, order, optional inputs, attributes and their defaults."""
    plugin, schema = plugins()[name], OPS[name].schema
    assert [i.name for i in plugin.inputs] == [i.name for i in schema.inputs]
    assert [i.optional for i in plugin.inputs] == [
        i.option.name == "Optional" for i in schema.inputs
    ]
    assert [o.name for o in plugin.outputs] == [o.name for o in schema.outputs]
    assert {a.name for a in plugin.attributes} == set(schema.attributes)
    for attribute in plugin.attributes:
        default = schema.attributes[attribute.name].default_value
        has: dict[str, Any] = {"i": default.i, "s": default.s.decode(), "f": default.f}
        expected = has[{int: "i", str: "s", float: "f"}[attribute.kind]] if default.name else None
        assert attribute.default == expected, attribute.name


@pytest.mark.parametrize(("name", "sample"), CASES)
def test_plan_gives_the_contracts_shapes(name: str, sample: OpSample) -> None:
    present = zip(plugins()[name].inputs, sample.inputs, strict=False)
    shapes = {i.name: tuple(t.shape) for i, t in present if t is not None}
    described = OPS[name].outputs(*sample.inputs, **sample.attributes)
    assert plugins()[name].output_shapes(shapes) == [tuple(shape) for _, shape in described]


def test_every_op_has_a_plugin_or_a_body_for_tensorrt() -> None:
    """An op is either a kernel here, or says in ``lowered`` how TensorRT computes it without."""
    missing = {name for name, op in OPS.items() if name not in plugins() and op.lowered is None}
    assert not missing, f"no folder in plugins_trt/ for {missing}"
    assert set(plugins()) <= set(OPS), "a plugin without a contract in export/ops/"

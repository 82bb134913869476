"""The plugin library, compiled without a warning and asked what TensorRT asks. What it launches is
in test_launches.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from example_plugin import EXAMPLE
from plugin_library import (
    OPS,
    TEST_PLUGINS,
    Built,
    data_type,
    example_inputs,
    named_inputs,
    samples,
    shapes_of,
)
from scratch import scratch_bytes

from lvlm.plugins_trt.plugins.library_harness import Field, inputs_of, write_case
from lvlm.plugins_trt.plugins.plugin_plan import DATA, FLOATS, Plugin
from lvlm.plugins_trt.plugins.registry import plugins


def test_the_library_stands_alone(built: Built) -> None:
    """It links with neither TensorRT nor CUDA and shows two functions."""
    read = ["readelf", "--wide", "--dynamic", "--dyn-syms", str(built.library)]
    text = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]\n") for line in text.splitlines() if "(NEEDED)" in line]
    assert {name.split(".so")[0] for name in needed} <= {"libstdc++", "libm", "libgcc_s", "libc"}
    symbols = [line.split() for line in text.splitlines() if " GLOBAL " in line or " WEAK " in line]
    assert {s[-1] for s in symbols if "UND" not in s} == {"getCreators", "setLoggerFinder"}


RTX = """
import sys
import numpy as np
import onnx
from onnx import TensorProto, helper
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        print(message, flush=True)

logger = Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
for creator in registry.all_creators:
    if creator.plugin_namespace == "lvlm":
        fields = [field.name for field in creator.field_names]
        print("creator", creator.name, creator.plugin_version, *fields, flush=True)
node = helper.make_node(
    "Example", ["s", "i", "b", "w"], ["r", "t"], domain="lvlm", mode="weighted", factor=0.75,
    times=-2, plugin_namespace="lvlm", plugin_version="1")
value = helper.make_tensor_value_info
inputs = [value("s", TensorProto.FLOAT16, [5, 8]), value("i", TensorProto.INT64, [3]),
          value("b", TensorProto.FLOAT, [3]), value("w", TensorProto.FLOAT, [3])]
graph = helper.make_graph([node], "g", inputs, [value("r", TensorProto.FLOAT16, None)])
model = helper.make_model(
    graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("lvlm", 1)])
network = builder.create_network(0)
print("parse", flush=True)
trt.OnnxParser(network, logger).parse(model.SerializeToString())  # ends the process: no plugins
"""


def test_tensorrt_finds_every_creator_and_its_parser_gives_them_attributes(built: Built) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RTX, str(built.library)],
        capture_output=True,
        text=True,
        env=os.environ | {"LVLM_PLUGINS_VERBOSE": "1"},
    )
    creators = {
        line.split()[1]: line.split()[2:]
        for line in done.stdout.splitlines()
        if line.startswith("creator ")
    }
    expected = {p.name: p for p in (*plugins().values(), *TEST_PLUGINS)}
    assert creators == {
        name: ["1", *(a.name for a in plugin.attributes)] for name, plugin in expected.items()
    }
    assert "parse" in done.stdout
    said = "lvlm Example: created with mode=weighted factor=0.750000 times=-2 note="
    assert said in done.stderr
    assert "Successfully created plugin: Example" in done.stdout


@pytest.mark.parametrize("name", sorted(plugins()))
def test_every_sample_as_tensorrt_asks(name: str, built: Built, tmp_path: Path) -> None:
    plugin, op = plugins()[name], OPS[name]
    wanted = samples(name)
    cases = [
        built.case(tmp_path, plugin, s.inputs, s.attributes, name=f"{i}")
        for i, s in enumerate(wanted)
    ]
    for sample, report in zip(wanted, built.harness.run(cases), strict=True):
        described = op.outputs(*sample.inputs, **sample.attributes)
        assert report["types"] == [str(dtype).removeprefix("torch.") for dtype, _ in described]
        assert report["shapes"] == [list(shape) for _, shape in described]
        check_report(report, plugin, sample.inputs, sample.attributes)


@pytest.mark.parametrize("mode", ["plain", "weighted"])
def test_the_example_as_tensorrt_asks(mode: str, built: Built, tmp_path: Path) -> None:
    attributes = {"mode": mode, "factor": 0.5, "times": 7, "note": "anything at all"}
    inputs = example_inputs(torch.bfloat16, weighted=mode == "weighted")
    (report,) = built.harness.run([built.case(tmp_path, EXAMPLE, inputs, attributes)])
    assert report["shapes"] == [[3, 8], [2, 3]]
    assert report["aliases"] == [-1, 2]
    check_report(report, EXAMPLE, inputs, attributes)


def check_report(
    report: Mapping[str, Any],
    plugin: Plugin,
    tensors: Sequence[torch.Tensor | None],
    attributes: Mapping[str, Any],
) -> None:
    """What holds for every plugin."""
    assert report["created"]
    assert report["clone_equal"]
    assert report["serialized_equal"]
    assert report["configured"]
    assert report["log"] == []
    assert report["fields"] == single(plugin.values(attributes))
    shapes, names = shapes_of(plugin, tensors), [name for name, _ in inputs_of(plugin, tensors)]
    word = plugin.values(attributes)[plugin.variant] if plugin.variant else None
    sizes = scratch_bytes(plugin, shapes, data_type(plugin, tensors), word)
    assert report["workspace"] == sum(sizes)
    aliases = [names.index(o.alias) if o.alias else -1 for o in plugin.outputs]
    assert report["aliases"] == aliases
    kinds = {spec.name: spec.dtype for spec in plugin.inputs}
    types = [*(kinds[name] for name in names), *(o.dtype for o in plugin.outputs)]
    floats = FLOATS if DATA in types else ("",)
    assert report["formats"] == [[f if t == DATA else t for t in types] for f in floats]


def single(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers in single precision, to the nine digits that the harness writes."""
    return {
        name: float(f"{torch.tensor(value).item():.9g}") if isinstance(value, float) else value
        for name, value in values.items()
    }


GOOD: list[Field] = [("mode", "char", "plain"), ("factor", "float32", "2")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "needs the attribute factor"),
        ([("factor", "int32", "2")], "factor must be one number, float32 or float64"),
        ([("factor", "float32", "2,3")], "factor must be one number, float32 or float64"),
        ([("factor", "null", "")], "factor has no data"),
        ([*GOOD, ("factor", "float64", "3")], "factor is given twice"),
        ([*GOOD, ("speed", "int32", "3")], "unknown attribute 'speed'"),
        ([*GOOD, ("times", "float32", "3")], "times must be one integer, int32 or int64"),
        ([*GOOD, ("times", "int64", "-4")], "times is -4; -3 is the smallest that is allowed"),
        (
            [*GOOD, ("times", "int64", "99999999999")],
            "times is 99999999999; 2147483647 is the largest that is allowed",
        ),
        (
            [("mode", "char", "weighty"), ("factor", "float32", "2")],
            "mode is 'weighty'; known: plain, weighted",
        ),
        ([("mode", "char", ""), *GOOD[1:]], "mode is ''; known: plain, weighted"),
        ([("mode", "int32", "1"), *GOOD[1:]], "mode must be a word (char)"),
    ],
)
def test_wrong_fields(fields: list[Field], message: str, built: Built, tmp_path: Path) -> None:
    case = write_case(tmp_path / "case", "Example", fields, [])
    (report,) = built.harness.run([case])
    assert (report["created"], report["log"]) == (False, [f"lvlm Example: {message}"])


def test_fields_that_are_not_wrong(built: Built, tmp_path: Path) -> None:
    """Both widths of numbers; what is left out has its default."""
    fields = [("times", "int32", "-3"), ("factor", "float64", "0.1"), ("mode", "char", "plain")]
    case = write_case(tmp_path / "case", "Example", fields, [])
    (report,) = built.harness.run([case])
    expected = {"mode": "plain", "factor": 0.1, "times": -3, "note": ""}
    assert report["fields"] == single(expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (named_inputs(weight=None), "has 3 inputs; 4 are needed with mode=weighted"),
        ([*named_inputs(), ("more", torch.zeros(1))], "has 5 inputs; 4 are needed"),
        (named_inputs(source=torch.zeros(2)), "source has 1 axes"),
        (
            named_inputs(source=torch.zeros(5, 8, dtype=torch.int32)),
            "source must be float32, float16 or bfloat16",
        ),
        (
            named_inputs(index=torch.zeros(3, dtype=torch.int32)),
            "index has another type than the one it must have",
        ),
    ],
)
def test_wrong_inputs(
    inputs: list[tuple[str, torch.Tensor]], message: str, built: Built, tmp_path: Path
) -> None:
    fields = [("mode", "char", "weighted"), ("factor", "float32", "2")]
    case = write_case(tmp_path / "case", "Example", fields, inputs)
    (report,) = built.harness.run([case])
    assert report["created"]
    assert not report["accepted"]
    assert [line.startswith(f"lvlm Example: {message}") for line in report["log"]] == [True]

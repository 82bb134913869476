"""What the plugin library launches, read from a driver that only notes it down (fake_cuda.cpp)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from example_plugin import EXAMPLE
from plugin_library import (
    OPS_ARCH,
    OPS_FLOAT,
    SIZES,
    SIZES_PLUGIN,
    Built,
    data_type,
    example_inputs,
    named_inputs,
    samples,
    shapes_of,
)
from scratch import scratch_bytes

from lvlm.plugins_trt.plugins.kernel_compiler import Image
from lvlm.plugins_trt.plugins.kernels import variants
from lvlm.plugins_trt.plugins.library_harness import fields_of, inputs_of, read_outputs, write_case
from lvlm.plugins_trt.plugins.plugin_plan import Plugin, Scalar, chosen
from lvlm.plugins_trt.plugins.registry import plugins
from lvlm.plugins_trt.plugins.sizes import Size

Launch = dict[str, Any]


def test_sizes_are_computed_as_in_python(built: Built, tmp_path: Path) -> None:
    """By TensorRT's expressions and by numbers."""
    for left, right in (((2, 3), (2, 4)), ((1, 2, 5), (1, 3)), ((4, 1), (3, 1))):
        tensors = [torch.zeros(left), torch.zeros(right)]
        shapes = {"left": left, "right": right}
        case = built.case(tmp_path, SIZES_PLUGIN, tensors, {}, data=True)
        report, launches = enqueued(built, case, tmp_path, sm=86)
        assert report["shapes"] == [[size(shapes)] for size in SIZES]
        assert [launch["arguments"][2] for launch in launches] == [size(shapes) for size in SIZES]


def enqueued(
    built: Built, case: Path, folder: Path, *, sm: int, **environment: str
) -> tuple[dict[str, Any], list[Launch]]:
    """The report, and the launches outside and inside of the graph's capture, which are the same
    but for aliased outputs."""
    fake = built.fake_gpu(folder, sm, **environment)
    (report,) = built.harness.run([case], outputs=folder, environment=fake)
    assert "error" not in report, report
    launches = [json.loads(line) for line in (folder / "launches").read_text().splitlines()]
    plain = [launch for launch in launches if not launch["captured"]]
    assert report["graph_equal"]
    assert len(launches) == 2 * len(plain)
    in_place = dict(zip(report["output_memory"], report["output_memory"], strict=True))
    for output, alias in enumerate(report["aliases"]):
        if alias >= 0:
            in_place[report["output_memory"][output]] = report["input_memory"][alias]
    for one, again in zip(plain, launches[len(plain) :], strict=True):
        moved = [in_place.get(value, value) for value in one["arguments"]]
        assert again == one | {"captured": True, "arguments": moved}
    return report, plain


def expected_launches(
    built: Built,
    plugin: Plugin,
    tensors: Sequence[torch.Tensor | None],
    attributes: Mapping[str, Any],
    report: Mapping[str, Any],
    sm: int,
) -> list[Launch]:
    """What the plan says, evaluated in Python."""
    values, shapes = plugin.values(attributes), shapes_of(plugin, tensors)
    data = data_type(plugin, tensors)
    names = [name for name, _ in inputs_of(plugin, tensors)]
    memory = dict(zip(names, report["input_memory"], strict=True))
    outputs = [output.name for output in plugin.outputs]
    memory |= zip(outputs, report["output_memory"], strict=True)
    place = report["workspace_memory"]
    word = values[plugin.variant] if plugin.variant else None
    sizes = scratch_bytes(plugin, shapes, data, word)
    for scratch, size in zip(plugin.scratch_for(word), sizes, strict=True):
        memory[scratch.name] = place
        place += size
    launches = []
    for step in plugin.steps_for(word):
        grid = [size(shapes) for size in step.grid]
        if 0 in grid:
            continue
        block = chosen(step, shapes)[step.choice[0]] if step.choice else None
        (kernel,) = (v.kernel for v in variants(plugin, step)
                     if v.data in (None, data) and v.block in (None, block))  # fmt: skip
        image = next(i for i in built.compiled[kernel] if i.arch == sm)
        given = []
        for argument in step.arguments:
            if isinstance(argument, Size):
                given.append(argument(shapes))
            elif isinstance(argument, Scalar):
                given.append(bits(values[argument.attribute]))
            else:
                given.append(memory[argument])
        launches.append(
            {
                "kernel": image.entry,
                "image": fnv(image),
                "grid": [*grid, 1, 1][:3],
                "threads": 32 * step.warps,
                "shared": image.shared,
                "captured": False,
                "arguments": [*given, *[0] * image.extras],
            }
        )
    return launches


def bits(value: float) -> int:
    """As a kernel's parameter of four bytes holds it."""
    kind = torch.float32 if isinstance(value, float) else torch.int32
    return int(torch.tensor(value, dtype=kind).view(torch.int32)) & 0xFFFFFFFF


@cache
def fnv(image: Image) -> int:
    found = 0xCBF29CE484222325
    for byte in image.code:
        found = ((found ^ byte) * 0x100000001B3) & (2**64 - 1)
    return found


@pytest.mark.parametrize("name", sorted(plugins()))
def test_launches_of_every_sample(name: str, built: Built, tmp_path: Path) -> None:
    """Kernels, grids, arguments and scratch memory as in Python, also inside of a graph."""
    plugin, sm = plugins()[name], OPS_ARCH
    wanted = [s for s in samples(name) if data_type(plugin, s.inputs) == OPS_FLOAT]
    assert wanted
    for sample in wanted:
        case = built.case(tmp_path, plugin, sample.inputs, sample.attributes, data=True)
        report, launches = enqueued(built, case, tmp_path, sm=sm)
        assert launches == expected_launches(
            built, plugin, sample.inputs, sample.attributes, report, sm
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["plain", "weighted"])
def test_launches_of_the_example(
    mode: str, dtype: torch.dtype, built: Built, tmp_path: Path
) -> None:
    attributes = {"mode": mode, "factor": 0.3, "times": -1}
    for width in (8, 17):
        inputs = example_inputs(dtype, weighted=mode == "weighted")
        inputs[0] = torch.ones(5, width, dtype=dtype)
        case = built.case(tmp_path, EXAMPLE, inputs, attributes, data=True)
        report, launches = enqueued(built, case, tmp_path, sm=86)
        assert launches == expected_launches(built, EXAMPLE, inputs, attributes, report, 86)
        rows, total = read_outputs(report)
        assert rows.view(torch.uint8).eq(0xFF).all()  # no kernel ran
        assert torch.equal(total, inputs[2])  # an aliased output elsewhere begins as a copy


def test_nothing_to_do_is_not_launched(built: Built, tmp_path: Path) -> None:
    inputs = example_inputs(torch.float32)
    inputs[1] = inputs[1][:0]
    case = built.case(tmp_path, EXAMPLE, inputs, {"factor": 1.0}, data=True)
    _, launches = enqueued(built, case, tmp_path, sm=86)
    assert [launch["kernel"] for launch in launches] == ["count_up", "add"]


@pytest.mark.parametrize(
    ("sm", "index", "warnings"),
    [(86, 0, 0), (89, 0, 0), (90, 1, 0), (87, 2, 1), (100, 2, 1), (121, 2, 1)],
)
def test_code_for_a_gpu(sm: int, index: int, warnings: int, built: Built, tmp_path: Path) -> None:
    """Its own, or of a lower one of its family; Orin and all from 90 on take no other's but PTX."""
    case = built.case(tmp_path, EXAMPLE, example_inputs(torch.float32), {"factor": 1.0}, data=True)
    report, launches = enqueued(built, case, tmp_path, sm=sm)
    (kernel,) = (k for k in built.compiled if k.function == "count_up")
    assert [x["image"] for x in launches if x["kernel"] == "count_up"] == [
        fnv(built.compiled[kernel][index])
    ]
    assert len(report["log"]) == warnings  # once, not for each kernel
    assert all(
        f"compiled from PTX for this GPU, sm_{sm}; for code of its own" in line
        for line in report["log"]
    )


def test_code_that_the_driver_refuses(built: Built, tmp_path: Path) -> None:
    case = built.case(tmp_path, EXAMPLE, example_inputs(torch.float32), {"factor": 1.0}, data=True)
    report, launches = enqueued(built, case, tmp_path, sm=90, FAKE_CUDA_REFUSES="cubin")
    (kernel,) = (k for k in built.compiled if k.function == "add")
    assert launches[-1]["image"] == fnv(built.compiled[kernel][2])
    assert "its code was refused (CUDA, load kernel: no binary for this GPU)" in report["log"][0]


def failed(built: Built, case: Path, folder: Path, sm: int, **environment: str) -> dict[str, Any]:
    fake = built.fake_gpu(folder, sm, **environment)
    (report,) = built.harness.run([case], outputs=folder, environment=fake)
    return report


def test_memory_that_is_not_aligned(built: Built, tmp_path: Path) -> None:
    """Kernels would fault, and the context with them, or read something else."""
    case = built.case(tmp_path, EXAMPLE, example_inputs(torch.float32), {"factor": 1.0}, data=True)
    report = failed(built, case, tmp_path, sm=86, FAKE_CUDA_OFFSET="8")
    assert report["error"] == "enqueue failed"
    name = EXAMPLE.inputs[0].name
    why = f"{name} does not lie at a multiple of 16 bytes; kernels need that"
    assert report["log"] == [f"lvlm Example: {why}"]
    assert not (tmp_path / "launches").read_text()
    enqueued(built, case, tmp_path, sm=86, FAKE_CUDA_OFFSET="16")


def test_a_gpu_without_code(built: Built, tmp_path: Path) -> None:
    case = built.case(tmp_path, EXAMPLE, example_inputs(torch.float32), {"factor": 1.0}, data=True)
    report = failed(built, case, tmp_path, sm=80)
    assert report["error"] == "onShapeChange failed"
    (line,) = report["log"]
    assert line.startswith(
        "lvlm Example: example_plugin.gather BLOCK_D=16 does not run on this GPU"
    )
    assert line.endswith("sm_80 (it was built for others); lvlm-build plugins --arch 80")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"source": torch.ones(5, 65)}, "no kernel for a size of 65; the largest is 64"),
        (
            {"source": torch.ones(5, 8, dtype=torch.bfloat16)},
            "no kernel for this type of data in the library",
        ),
    ],
)
def test_calls_without_a_kernel(
    inputs: dict[str, torch.Tensor], message: str, built: Built, tmp_path: Path
) -> None:
    fields = fields_of(EXAMPLE, {"factor": 1.0})
    named = named_inputs(weight=None, **inputs)
    case = write_case(tmp_path / "case", "Example", fields, named, data=True)
    report = failed(built, case, tmp_path, sm=86)
    assert (report["error"], report["log"]) == (
        "onShapeChange failed",
        [f"lvlm Example: {message}"],
    )


def test_a_grid_that_is_too_large(built: Built, tmp_path: Path) -> None:
    """Half precision, so that a small case makes a grid of 65,536 in its second axis."""
    plugin = plugins()["CacheUpdate"]
    assert len(plugin.steps[0].grid) > 1
    batch = 65_536
    inputs = [torch.zeros(batch, 1, 1, 1, dtype=torch.half)] * 2 + [torch.zeros(batch).long()]
    case = built.case(tmp_path, plugin, inputs, {}, data=True)
    report = failed(built, case, tmp_path, sm=OPS_ARCH)
    assert report["error"] == "enqueue failed"
    assert "65536 x 1 blocks is too large" in report["log"][0]


def test_without_a_driver(built: Built, tmp_path: Path) -> None:
    """The library loads and answers; only running says that there is no driver."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    case = built.case(tmp_path, EXAMPLE, example_inputs(torch.float32), {"factor": 1.0}, data=True)
    (report,) = built.harness.run([case], outputs=tmp_path)
    assert report["shapes"] == [[3, 8], [2, 3]]
    assert "there is no CUDA driver on this machine" in report["error"]

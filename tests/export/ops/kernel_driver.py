"""Nodes of the CPU kernels run by kernel_driver.cpp: without ONNX Runtime, under a sanitizer or on
another kind of CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from lvlm.runtime.backends.ort.kernels.kernel_library import SOURCES

KINDS = {onnx.AttributeProto.FLOAT: 0, onnx.AttributeProto.INT: 1, onnx.AttributeProto.STRING: 2}


@dataclass(frozen=True)
class Run:
    """A model of one node, whose initializers are constant; ``in_place``: outputs that are written
    into the memory of an input, by names."""

    model: onnx.ModelProto
    feeds: Mapping[str, np.ndarray]
    in_place: Mapping[str, str] = field(default_factory=dict)


def build_driver(compiler: str, flags: Sequence[str], folder: Path) -> Path:
    """The driver in ``folder``, with the library's sources in it, for one kind of instructions.
    Skips where the compiler, what ``flags`` ask for, or Highway is missing."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, "-std=c++17", "-pthread", *flags]
    probe = folder / "probe.cpp"
    probe.write_text("#include <hwy/highway.h>\nint main() {}\n")
    if said := _compile([*command, str(probe), "-o", str(folder / "probe")]):
        pytest.skip(f"{compiler} lacks something: {said.splitlines()[0]}")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    objects = []
    for source in [Path(__file__).with_suffix(".cpp"), *sorted(SOURCES.glob("*.cpp"))]:
        objects.append(str(folder / f"{source.stem}.o"))
        own = [*warnings, "-DHWY_COMPILE_ONLY_STATIC", f"-I{SOURCES}", "-c", str(source)]
        said = _compile([*command, *own, "-o", objects[-1]])
        assert said == ""
    program = folder / "kernel_driver"
    said = _compile([*command, *objects, "-o", str(program)])
    assert said == ""
    return program


def run_driver(
    command: Sequence[str], runs: Sequence[Run], folder: Path, settings: Mapping[str, str]
) -> list[list[np.ndarray] | str]:
    """Outputs of every run, or what its kernel says is wrong. Fails on a sanitizer's report."""
    cases, results = folder / "cases", folder / "results"
    with cases.open("wb") as file:
        _write_number(file, len(runs))
        for run in runs:
            _write_run(file, run)
    done = subprocess.run(
        [*command, str(cases), str(results)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:20_000] or f"status {done.returncode}"
    assert done.stderr == ""
    file = BytesIO(results.read_bytes())
    return [_read_text(file) or _read_outputs(file) for _ in runs]


def _compile(command: Sequence[str]) -> str:
    """What is wrong; nothing: it is made."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def _write_run(file: BinaryIO, run: Run) -> None:
    (node,) = run.model.graph.node
    constants = {t.name: numpy_helper.to_array(t) for t in run.model.graph.initializer}
    _write_text(file, node.domain)
    _write_text(file, node.op_type)
    _write_number(file, len(node.attribute))
    for attribute in node.attribute:
        _write_text(file, attribute.name)
        _write_number(file, KINDS[attribute.type])
        value = helper.get_attribute_value(attribute)
        if isinstance(value, float):
            file.write(np.float32(value).tobytes())
        elif isinstance(value, int):
            _write_number(file, value)
        else:
            _write_text(file, value.decode())
    _write_number(file, len(node.input))
    for name in node.input:
        _write_number(file, name != "")
        _write_number(file, name in constants)
        if name:
            _write_tensor(file, constants[name] if name in constants else run.feeds[name])
    _write_number(file, len(node.output))
    types = {output.name: output.type.tensor_type.elem_type for output in run.model.graph.output}
    for name in node.output:
        _write_number(file, types[name])
        bound = run.in_place.get(name)
        _write_number(file, -1 if bound is None else list(node.input).index(bound))


def _write_tensor(file: BinaryIO, array: np.ndarray) -> None:
    _write_number(file, helper.np_dtype_to_tensor_dtype(array.dtype))
    _write_number(file, array.ndim)
    for extent in array.shape:
        _write_number(file, extent)
    file.write(array.tobytes())


def _write_text(file: BinaryIO, text: str) -> None:
    _write_number(file, len(text.encode()))
    file.write(text.encode())


def _write_number(file: BinaryIO, number: int) -> None:
    file.write(np.int64(number).tobytes())


def _read_outputs(file: BytesIO) -> list[np.ndarray]:
    return [_read_tensor(file) for _ in range(_read_number(file))]


def _read_tensor(file: BytesIO) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(_read_number(file))
    shape = [_read_number(file) for _ in range(_read_number(file))]
    count = int(np.prod(shape))
    return np.frombuffer(file.read(count * dtype.itemsize), dtype).reshape(shape)


def _read_text(file: BytesIO) -> str:
    return file.read(_read_number(file)).decode()


def _read_number(file: BytesIO) -> int:
    return int(np.frombuffer(file.read(8), np.int64)[0])

"""Drive a built plugin library as TensorRT would (library/test/harness.cpp), on torch tensors; for
tests and for measurements on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvlm.core.errors import BuildError
from lvlm.plugins_trt.plugins.plugin_plan import Plugin

Field = tuple[str, str, str]  # name, type, value, as harness_case.h has them
WORDS = {int: "int64", float: "float32", str: "char"}


def fields_of(plugin: Plugin, attributes: Mapping[str, Any]) -> list[Field]:
    """A node's attributes as fields."""
    kinds = {attribute.name: attribute.kind for attribute in plugin.attributes}
    return [(name, WORDS[kinds[name]], str(value)) for name, value in attributes.items()]


def inputs_of(
    plugin: Plugin, tensors: Sequence[torch.Tensor | None]
) -> list[tuple[str, torch.Tensor]]:
    """The inputs that are there, by name; optional ones may be None or left out."""
    named = zip(plugin.inputs, tensors, strict=False)
    return [(spec.name, tensor) for spec, tensor in named if tensor is not None]


def write_case(
    file: Path,
    op: str,
    fields: Sequence[Field],
    inputs: Sequence[tuple[str, torch.Tensor]],
    *,
    data: bool = False,
    traffic: int = 0,
) -> Path:
    """A case file; with ``data`` the tensors' contents go beside it. traffic: bytes that the op
    reads and writes at least."""
    lines = [f"op {op}", f"traffic {traffic}", *(f"field {n} {t} {v}" for n, t, v in fields)]
    for name, tensor in inputs:
        contents = "-"
        if data:
            contents = f"{file}.{name}"
            Path(contents).write_bytes(raw(tensor))
        extents = ",".join(map(str, tensor.shape))
        lines.append(
            f"input {name} {str(tensor.dtype).removeprefix('torch.')} {extents} {contents}"
        )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def raw(tensor: torch.Tensor) -> bytes:
    """The numbers of an input, row by row."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def read_outputs(report: Mapping[str, Any]) -> list[torch.Tensor]:
    """Outputs of an enqueued case."""
    outputs = []
    for file, dtype, shape in zip(report["files"], report["types"], report["shapes"], strict=True):
        contents = bytearray(Path(file).read_bytes())
        kind = getattr(torch, dtype)
        flat = torch.frombuffer(contents, dtype=kind) if contents else torch.empty(0, dtype=kind)
        outputs.append(flat.reshape(shape))
    return outputs


@dataclass(frozen=True)
class Harness:
    """library and program are built files; ``prefix`` is what the program runs under."""

    library: Path
    program: Path
    prefix: tuple[str, ...] = ()

    def run(
        self,
        cases: Sequence[Path],
        *,
        outputs: Path | None = None,
        raw_memory: bool = False,
        repeats: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Answers of the harness for each case (harness.cpp).

        outputs     a folder: run the plugins on the GPU, and write there
        raw_memory  do not fill memory first
        repeats     measure that many runs
        Raises BuildError if the program fails, as it does where a kernel breaks the GPU's context.
        """
        command = [*self.prefix, str(self.program.resolve()), str(self.library.resolve())]
        if outputs is not None:
            command += ["--enqueue", str(outputs)]
        command += ["--raw"] if raw_memory else []
        command += ["--time", str(repeats)] if repeats else []
        command += [str(case) for case in cases]
        done = subprocess.run(
            command, capture_output=True, text=True, env=dict(os.environ) | dict(environment or {})
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(lines) != len(cases):
            said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
            raise BuildError(f"the harness ended with {done.returncode} and said: {said[-1]}")
        return lines

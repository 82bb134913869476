"""Running calls through the harness and comparing them with the torch references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_cases import KernelCase

from lvlm.core.discovery import discover
from lvlm.core.errors import BuildError
from lvlm.export.ops.op import Op, OpSample
from lvlm.plugins_trt.plugins.library_harness import Harness, fields_of, inputs_of, write_case
from lvlm.plugins_trt.plugins.plugin_plan import DATA, Plugin
from lvlm.plugins_trt.plugins.registry import plugins

OPS: dict[str, Op] = discover("lvlm.export.ops", "OP")
FAILED: list[str] = []  # what went wrong so far


def converted(plugin: Plugin, dtype: torch.dtype) -> Iterator[OpSample]:
    """The fp32 samples that the plugin has kernels for, in another type."""
    words = plugin.words()
    kinds = [spec.dtype for spec in plugin.inputs]
    for sample in OPS[plugin.name].samples():
        data = next(t for t, k in zip(sample.inputs, kinds, strict=False) if k == DATA)
        if data is None or data.dtype != torch.float32:
            continue
        if sample.attributes.get(plugin.variant or "") not in (None, *words):
            continue
        inputs = [
            t.to(dtype) if t is not None and k == DATA else t
            for t, k in zip(sample.inputs, kinds, strict=False)
        ]
        yield OpSample(sample.name, inputs, sample.attributes, sample.unspecified)


def run_calls(
    harness: Harness,
    work: Path,
    plugin: Plugin,
    chosen: Sequence[OpSample | KernelCase],
    environment: Mapping[str, str],
    *,
    raw_memory: bool = False,
    repeats: int = 0,
) -> list[dict[str, Any]]:
    cases = [
        write_case(
            work / f"case{number}",
            plugin.name,
            fields_of(plugin, call.attributes),
            inputs_of(plugin, call.inputs),
            data=True,
            traffic=getattr(call, "traffic", 0),
        )
        for number, call in enumerate(chosen)
    ]
    try:
        return harness.run(
            cases, outputs=work, environment=environment, raw_memory=raw_memory, repeats=repeats
        )
    except BuildError as error:
        FAILED.append(f"{plugin.name}: {error}")
        return [{"error": str(error)} for _ in cases]


def ran(report: Mapping[str, Any], what: str) -> bool:
    if "error" in report or not report["graph_equal"]:
        said = report.get("error", "other bits in a CUDA graph")
        FAILED.append(f"{what}: {said} {' '.join(report.get('log', []))}")
        return False
    return True


def difference(
    what: str, name: str, sample: OpSample, found: Sequence[torch.Tensor], *, exact: bool = True
) -> float:
    """The largest over the outputs; a wrong integer, or what is not finite elsewhere, is a failure.

    Not ``exact``: one in a thousand integers may differ.
    """
    expected = OPS[name].reference(*sample.inputs, **sample.attributes)
    outputs = [output.name for output in plugins()[name].outputs]
    largest = 0.0
    for output, right, got in zip(outputs, expected, found, strict=True):
        right = right.cpu()
        if not right.dtype.is_floating_point:
            wrong = int((right != got).sum())
            if wrong > (0 if exact else right.numel() / 1000):
                FAILED.append(f"{what}: {wrong} of {right.numel()} differ in {output}")
            continue
        right, got = right.double(), got.double()
        free = sample.unspecified.get(output)
        if free is not None:
            right, got = right.masked_fill(free, 0), got.masked_fill(free, 0)
        wild = ~right.isfinite()
        if not torch.equal(~got.isfinite(), wild):
            FAILED.append(f"{what}: {output} is not finite at other places")
            continue
        right, got = right.masked_fill(wild, 0), got.masked_fill(wild, 0)
        if right.numel():
            scale = max(1.0, float(right.abs().max()))
            largest = max(largest, float((right - got).abs().max()) / scale)
    return largest

"""What a target is: graphs lowered for one engine, written beside the canonical ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from lvlm.runtime.bundle import Capacity


class Target(Protocol):
    """One entry of ``--target``; found by discovery as ``TARGET``."""

    name: str
    summary: str

    def write(self, bundle: Path, graphs: Mapping[str, str], capacity: Capacity) -> None:
        """Write a lowered graph beside each of ``graphs`` (name -> file of the bundle)."""


def target_file(file: str, target: str) -> str:
    """prefill.onnx -> prefill.trt-rtx.onnx. Beside the canonical graph, not in a folder of its own:
    ONNX's external data must not lie above the graph, and the weights are stored once."""
    return f"{Path(file).stem}.{target}.onnx"

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
        """Write ``targets/<name>/<graph>.onnx`` for graph -> file of a bundle."""

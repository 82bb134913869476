"""A target: the description of an engine, and how a bundle's graphs get their form for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lvlm.export.targets.description import Description
from lvlm.runtime.bundle.manifest import Capacity

if TYPE_CHECKING:
    import onnx_ir as ir


class Target(Description):
    """One entry of ``--target``; found by discovery as ``TARGET``."""

    def check(self, graph: Path) -> None:
        """Raise ExportError where ``lower`` would, for what it does not take of a canonical graph
        in a file."""
        # Imported here: to list targets needs no onnx.
        import onnx_ir as ir

        from lvlm.export.targets.passes.lowering import check

        check(ir.load(graph), self)

    def lower(self, model: ir.Model, capacity: Capacity) -> None:
        """Change a canonical graph into one for this target."""
        from lvlm.export.targets.passes.lowering import lower

        lower(model, self, capacity)

    def lowers(self, graphs: Iterable[str]) -> list[str]:
        """Those of ``graphs`` that it has a form of its own for."""
        return list(graphs)

    def write(self, bundle: Path, graphs: Mapping[str, str], capacity: Capacity) -> list[str]:
        """Write a lowered graph beside each of ``graphs`` (name -> file of the bundle); the new
        files' names."""
        from lvlm.export.targets.passes.lowering import write

        return write(
            bundle,
            {file: self.file(file) for file in graphs.values()},
            self.weights_file,
            lambda model: self.lower(model, capacity),
        )

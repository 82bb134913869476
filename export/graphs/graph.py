"""A graph of a bundle: inputs, outputs and what is computed, all by name, in one class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import nn

from lvlm.core.errors import ExportError
from lvlm.export.ports import GraphPort

Tensors = Mapping[str, torch.Tensor]


class BundleGraph(nn.Module):
    """A graph as a torch module: traced into the bundle, or run eagerly as its reference.

    A subclass declares ``inputs`` and ``outputs`` and says in ``compute`` what the graph computes.
    Their order here is the order in the file and in the manifest.
    """

    name: ClassVar[str]  # in the manifest; of the file, too

    def inputs(self) -> list[GraphPort]:
        raise NotImplementedError

    def outputs(self) -> list[GraphPort]:
        raise NotImplementedError

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        """Every output by its name, in any order, from the inputs by theirs."""
        raise NotImplementedError

    def forward(self, given: Tensors) -> dict[str, torch.Tensor]:
        """``compute``, its outputs in their order.

        Args:
            given: every input by its name; what is no input is left out.

        Raises:
            ExportError: ``compute`` reads what is no input, or its outputs are not those declared.
        """
        inputs, outputs = ([p.name for p in ps] for ps in (self.inputs(), self.outputs()))
        self._refuse("is not given its input", (n for n in inputs if n not in given))
        taken = _Inputs((name, given[name]) for name in inputs)
        taken.graph = self.name
        found = self.compute(taken)
        self._refuse("does not give its output", (n for n in outputs if n not in found))
        self._refuse("gives an output that it does not declare:", found.keys() - set(outputs))
        return {name: found[name] for name in outputs}

    def _refuse(self, what: str, names: Iterable[str]) -> None:
        if wrong := ", ".join(sorted(names)):
            raise ExportError(f"graph {self.name} {what} {wrong}")


class _Inputs(dict[str, torch.Tensor]):
    """A graph's inputs; another name is refused as such."""

    graph: str

    def __missing__(self, name: str) -> torch.Tensor:
        raise ExportError(f"graph {self.graph} has no input {name}; it declares {', '.join(self)}")

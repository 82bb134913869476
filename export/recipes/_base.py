"""What a recipe is: a frozen dataclass whose fields are the parameters ``--set name=value`` sets.

A recipe acts while the prefill graph is traced: before each block it may shorten the sequence. It
also says, as data in the manifest, which counts the runtime must compute from the prompt. The same
code runs eagerly with the torch references of the ops; that is the recipe's torch reference.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from lvlm.export.standard_ops import Tap
from lvlm.runtime.bundle import Reduction
from lvlm.runtime.discovery import nearest
from lvlm.runtime.errors import ParameterError


@dataclass
class TokenSequence:
    """The token sequence between two blocks; rows padded on the right.

    hidden     [B,N,D]
    positions  [B,N] int64 (or [3,B,N]): rotary positions, original ones throughout
    image_id   [B,N] int64: -1 padding, 0 text, m the m-th image
    maps       old -> new index of each reduction so far, [B,N before] int64
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    image_id: torch.Tensor
    maps: list[torch.Tensor] = field(default_factory=list)

    def last(self) -> torch.Tensor:
        """Index of each row's last prompt token, [B] int64."""
        return (self.image_id >= 0).sum(1) - 1


@dataclass(frozen=True)
class GraphInput:
    """One input of a graph: name, element type, and its dimensions (a name: dynamic)."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]


def parameter(default: Any, doc: str) -> Any:
    """A recipe's field with the line that ``--help-recipe`` shows."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Recipe:
    """The base of every recipe; on its own it changes nothing."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]

    def for_layers(self, layers: int) -> Self:
        """The recipe with its defaults worked out and checked for a model of that depth."""
        del layers
        return self

    def inputs(self) -> list[GraphInput]:
        """Further inputs of the prefill graph."""
        return []

    def reductions(self) -> tuple[Reduction, ...]:
        """What the runtime must know to fill those inputs."""
        return ()

    def taps(self, layer: int) -> bool:
        """Whether ``before_block(layer + 1)`` needs the query and key of block ``layer``."""
        del layer
        return False

    def before_block(
        self, layer: int, state: TokenSequence, tap: Tap | None, inputs: Mapping[str, torch.Tensor]
    ) -> TokenSequence:
        """The sequence that enters block ``layer``; ``tap`` is the block before's attention."""
        del layer, tap, inputs
        return state

    def parameters(self) -> dict[str, Any]:
        """Every parameter and its value, as the manifest records them."""
        return dataclasses.asdict(self)


def parse_settings(recipe: type[Recipe], settings: Sequence[str]) -> Recipe:
    """A recipe from ``name=value`` strings; values are JSON, or plain words."""
    known = {f.name for f in dataclasses.fields(recipe)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ParameterError(f"--set {setting}: write name=value")
        if name not in known:
            if not known:
                raise ParameterError(f"--set {setting}: recipe '{recipe.name}' has no parameters")
            raise nearest(f"parameter of recipe '{recipe.name}'", name, known)
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        values[name] = tuple(value) if isinstance(value, list) else value
    return recipe(**values)

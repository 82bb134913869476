"""The leaf modules of transformers' models: which classes there are, and what each is traced as.

Everything around them is traced through. What a class becomes is in a table that the model's family
gives (``Family.leaves``); nothing is told by what a class is called.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.activations import ACT2CLS

from lvlm.core.errors import CheckpointError
from lvlm.export.standard_ops import (
    attention,
    checked_attention,
    rms_normalization,
    rotary_embedding,
)

ATTENTION = "lvlm"  # the name transformers' configurations select our attention by
AttentionInterface.register(ATTENTION, attention)

# Rotary tables that do not depend on the length of a text
FIXED_TABLES = ("default", "linear", "llama3", "yarn")


class Leaf:
    """A module that is traced as it is."""

    def exchanged(self, module: Any, undo: ExitStack) -> None:
        """Change ``module`` for tracing; ``undo`` gets what takes that back."""

    def buffers(self, module: Any) -> Mapping[str, torch.Tensor]:
        """Buffers that no checkpoint stores, from its configuration: name -> value."""
        del module
        return {}


@dataclass(frozen=True)
class Norm(Leaf):
    """A normalisation, in whose place ``forward`` (module, hidden) is traced."""

    forward: Callable[[Any, torch.Tensor], torch.Tensor]

    def exchanged(self, module: Any, undo: ExitStack) -> None:
        module.forward = types.MethodType(self.forward, module)
        undo.callback(module.__dict__.pop, "forward")


@dataclass(frozen=True)
class Rotary(Leaf):
    """The angles of positions, computed from a table that follows from the configuration.

    kinds  of tables (``rope_type``) that it has, and that graphs can hold
    """

    kinds: tuple[str, ...] = FIXED_TABLES

    def buffers(self, module: Any) -> Mapping[str, torch.Tensor]:
        made = type(module)(module.config)  # small, and built by the module itself
        return {name: x.float() for name, x in made._buffers.items() if x is not None}


def no_window(attention: Any) -> None:
    """The window of an attention that sees every position."""
    del attention


@dataclass(frozen=True)
class Attention(Leaf):
    """An attention that goes through transformers' interface of attentions.

    window  how many positions a token sees, itself and those before it; None: all of them
    turn    the function of its source file that turns queries and keys by their angles (q, k, cos,
            sin), if any
    """

    window: Callable[[Any], int | None] = no_window
    turn: str | None = "apply_rotary_pos_emb"

    def exchanged(self, module: Any, undo: ExitStack) -> None:
        home = sys.modules[type(module).__module__]
        if self.turn is None or getattr(home, self.turn) is rotary_embedding:
            return
        undo.callback(setattr, home, self.turn, getattr(home, self.turn))
        setattr(home, self.turn, rotary_embedding)


class Places(Leaf):
    """Embeddings of an image's patches, one after the other."""

    def buffers(self, module: Any) -> Mapping[str, torch.Tensor]:
        return {"position_ids": torch.arange(module.num_positions)[None]}


def rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Normalised in fp32, cast back, then scaled by the weight: most of transformers' RMSNorm."""
    return rms_normalization(hidden, module.weight, module.variance_epsilon)


def zero_centred(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Gemma's and Qwen3.5's: a weight of 0 scales by 1; all of it in fp32."""
    scale = 1.0 + module.weight.float()
    return rms_normalization(hidden.float(), scale, module.eps).to(hidden.dtype)


RMS_NORM, ZERO_CENTRED = Norm(rms_norm), Norm(zero_centred)
Table = Mapping[type[nn.Module], Leaf]  # class -> what tracing makes of it


@dataclass(frozen=True)
class Leaves:
    """A family's table, and the module of the family: errors name it as the place to mend."""

    table: Table
    home: str

    def of(self, module: nn.Module) -> Leaf:
        """The entry of a module; CheckpointError names its class if there is none."""
        kind = type(module)
        leaf = self.table.get(kind)
        if leaf is None:
            raise CheckpointError(
                f"{kind.__name__} ({kind.__module__}) is in no table of leaf modules; say in the "
                f"leaves of {self.home} how it is traced"
            )
        return leaf

    def check(self, model: nn.Module) -> None:
        """CheckpointError unless every module of ``model`` that has none inside is in the table, an
        activation or torch's own."""
        for module in model.modules():
            if next(module.children(), None) is None and not _known(module):
                self.of(module)

    def window(self, attention: nn.Module) -> int | None:
        """The number of positions a token sees in it, None: all; CheckpointError as ``of``."""
        leaf = self.of(attention)
        return leaf.window(attention) if isinstance(leaf, Attention) else None

    def buffer(self, module: nn.Module, name: str) -> torch.Tensor:
        """The content of a buffer that no checkpoint stores; CheckpointError."""
        value = self.of(module).buffers(module).get(name)
        if value is None:
            raise CheckpointError(
                f"buffer '{name}' of {type(module).__name__} is in no checkpoint; say in the "
                f"leaves of {self.home} what it holds"
            )
        return value

    @contextmanager
    def exchanged(self, model: nn.Module) -> Iterator[None]:
        """Within, the modules of ``model`` are what they become in a traced graph, and no attention
        is traced that is not in the table."""
        with ExitStack() as undo:
            for module in model.modules():
                leaf = self.table.get(type(module))
                if leaf is not None:
                    leaf.exchanged(module, undo)
            undo.enter_context(checked_attention(self.of))
            yield


class HasLeaves(Protocol):
    """A family, as far as it matters here."""

    @property
    def leaves(self) -> Table: ...


def leaves_of(family: HasLeaves) -> Leaves:
    """The family's table of leaf modules."""
    return Leaves(family.leaves, type(family).__module__)


def _known(module: nn.Module) -> bool:
    """True where it is torch's own, or an activation that transformers knows by a word."""
    kinds = (kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values())
    return type(module).__module__.startswith("torch.nn.") or type(module) in kinds

"""A form of checkpoint that is not the plain one: which tensors of the model are made of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lvlm.export.checkpoint.weight_files import Stored

Read = Callable[[str], torch.Tensor]  # a tensor by its name


class MadeTensor(Protocol):
    """A tensor that no file holds as it is."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """The data type as safetensors writes it."""

    def make(self, read: Read) -> torch.Tensor:
        """Its values, of what ``read`` gives. Raises CheckpointError."""


@dataclass(frozen=True)
class DenseTensor:
    """A tensor that a function computes, of fp32 unless ``dtype`` says otherwise."""

    shape: tuple[int, ...]
    compute: Callable[[Read], torch.Tensor]
    dtype: str = "F32"

    def make(self, read: Read) -> torch.Tensor:
        return self.compute(read)


@dataclass(frozen=True)
class Form:
    """A form that a checkpoint is read as.

    Attributes:
        words: what it is, for a report.
        made: tensors by the names that a plain checkpoint would have.
        used: names of stored tensors that are no tensors of the model.
        config: config.json of the plain checkpoint; None: the one that is there.
        quantized: whether weights are.
        unkept: why quantized weights cannot stay as they are, "" where they can.
        parts: paths of files beyond the checkpoint's that the weights are made of.
    """

    words: str
    made: Mapping[str, MadeTensor]
    used: frozenset[str] = frozenset()
    config: Mapping[str, Any] | None = None
    quantized: bool = False
    unkept: str = ""
    parts: tuple[Path, ...] = ()


class Source(Protocol):
    """The source that a form is found in: a checkpoint as its files have it."""

    @property
    def folder(self) -> Path: ...

    @property
    def source(self) -> str:
        """The name that the user may look it up by."""

    @property
    def absent(self) -> Mapping[str, Mapping[str, Stored]]:
        """Weight files that are still to be downloaded."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def read(self, name: str) -> torch.Tensor: ...


class Layout(Protocol):
    """A file in layouts/: names and settings of a repository's own, as its LAYOUT."""

    name: str

    def read(self, found: Source) -> Form | None:
        """The form, None where the checkpoint is not of this layout. CheckpointError names the
        checkpoint to take where the weights alone do not make one."""


class Scheme(Protocol):
    """A file in quantized/: a way to quantize, as its SCHEME."""

    name: str
    methods: tuple[str, ...]  # quant_method of config.json

    def read(self, settings: Mapping[str, Any], found: Source) -> Form:
        """The form; ``settings`` are config.json's. CheckpointError names what is not supported."""

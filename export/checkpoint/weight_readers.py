"""Files of weights, opened for one tensor at a time: safetensors, and torch's own."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.weight_files import Stored

TORCH = (".bin", ".pt", ".pth")
# As safetensors writes them
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class WeightReader(Protocol):
    """An open file of weights."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...

    def get_slice(self, name: str) -> Any:
        """An object that gives rows of a tensor when it is indexed."""


@contextmanager
def open_weights(path: Path) -> Iterator[WeightReader]:
    """The file, opened for torch. Raises CheckpointError."""
    if path.suffix in TORCH:
        yield _TorchFile(path)
        return
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no readable safetensors file: {reason}") from None
    with file as reader:
        yield reader


def header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file. Raises CheckpointError."""
    with open_weights(path) as file:
        if isinstance(file, _TorchFile):
            return {name: _stored(path, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Stored(path, tuple(held.get_shape()), str(held.get_dtype()))
            for name, held in slices.items()
        }


def _stored(path: Path, tensor: torch.Tensor) -> Stored:
    return Stored(path, tuple(tensor.shape), NAMES.get(tensor.dtype, str(tensor.dtype)))


class _TorchFile:
    """A file of torch.save, read without running what it may contain, its tensors mapped."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError."""
        again = "save the checkpoint in safetensors format (save_pretrained)"
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, BadZipFile, EOFError,
                KeyError, AttributeError, TypeError, IndexError) as error:  # fmt: skip
            reason = str(error).strip().partition("\n")[0][:160]
            raise CheckpointError(
                f"{path} is not read: torch takes it for no file of weights alone ({reason}); "
                f"{again}"
            ) from None
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in found.items()
        ):
            raise CheckpointError(f"{path} holds more than tensors by their names; {again}")
        self._tensors: dict[str, torch.Tensor] = found

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> torch.Tensor:
        return self._tensors[name]

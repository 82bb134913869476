"""Weights that ONNX Runtime reads where they lie: mapped from their file once, for every session.

Left to itself each session loads its own copy. Mapped pages are shared between sessions (and
processes), come from the disk when they are first read, and can always be dropped again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.runtime.bundle import Weight
from lvlm.runtime.errors import BackendError


class MappedWeights:
    """OrtValues over mapped files; ``ort`` is the package onnxruntime."""

    def __init__(self, ort: Any) -> None:
        self.ort = ort
        self._files: dict[Path, np.ndarray] = {}
        self._values: dict[tuple[Path, str], Any] = {}

    def of(
        self, folder: Path, names: Sequence[str], weights: Mapping[str, Weight]
    ) -> dict[str, Any]:
        """An OrtValue for every weight of a type that numpy has; the others are ORT's to load.

        They must live as long as the sessions that were given them.
        """
        found = {}
        for name in names:
            if (dtype := _numpy_type(weights[name].dtype)) is None:
                continue
            key = (folder, name)
            if key not in self._values:
                array = self._array(folder, name, weights[name], dtype)
                self._values[key] = self.ort.OrtValue.ortvalue_from_numpy(array)
            found[name] = self._values[key]
        return found

    def _array(self, folder: Path, name: str, weight: Weight, dtype: np.dtype[Any]) -> np.ndarray:
        path = folder / weight.file
        if path not in self._files:
            self._files[path] = np.memmap(path, np.uint8, mode="r")
        data = self._files[path][weight.offset : weight.offset + weight.bytes]
        if len(data) != math.prod(weight.dims) * dtype.itemsize:
            raise BackendError(
                f"{path} has no {name} where the manifest says; export the bundle again"
            )
        return data.view(dtype).reshape(weight.dims)


def _numpy_type(dtype: str) -> np.dtype[Any] | None:
    try:
        return np.dtype(dtype)
    except TypeError:  # bfloat16, uint4
        return None

"""The weights that a target's graphs alone read, in a file of their own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir

from lvlm.core.errors import ExportError
from lvlm.core.output import whole_file

ALIGNMENT = 4096  # a page, as in the bundle's own file


@dataclass
class OwnWeights:
    """The file, written as weights come, each once: a name means the same bytes in all graphs. It
    is there when the context ends without an error, and only if something was taken.

    ``places``: offset and bytes by name.
    """

    path: Path
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _file: BinaryIO | None = None

    def __enter__(self) -> OwnWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def take(self, value: ir.Value) -> None:
        """Write an initializer that is computed (ir.LazyTensor), unless it is there, and let it lie
        in the file from now on; nothing is done to others."""
        tensor = value.const_value
        if not isinstance(tensor, ir.LazyTensor):
            return
        name = str(value.name)
        if name not in self.places:
            self.places[name] = self._write(tensor)
        offset, length = self.places[name]
        value.const_value = ir.ExternalTensor(
            self.path.name, offset, length, tensor.dtype, shape=tensor.shape, name=name
        )

    def _write(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        if self._file is None:
            partial = self._stack.enter_context(whole_file(self.path, ExportError))
            self._file = self._stack.enter_context(partial.open("wb"))
        data = tensor.tobytes()
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(data)
        return offset, len(data)

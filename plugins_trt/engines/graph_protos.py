"""The graphs of a bundle as ONNX messages, to be looked through; their weights stay outside."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lvlm.core.errors import BundleError


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph in a file. Raises BundleError where it holds none."""
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BundleError(f"{path} holds no ONNX graph ({reason}); export it again") from None

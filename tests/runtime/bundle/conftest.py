"""A bundle without graphs, to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundle_tools import FIXED_POINT, GRAPHS, fit_ports

from lvlm.core import integrity
from lvlm.runtime.bundle.manifest import (
    Capacity,
    Graph,
    Images,
    Manifest,
    Quantization,
    Reduction,
    Text,
    Weight,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle that is right as far as the reader can tell."""
    folder = tmp_path / "out"
    folder.mkdir()
    files = {}
    for name in (*(f"{g}.onnx" for g in GRAPHS), "weights.bin", "tokenizer.json"):
        path = folder / name
        path.write_bytes(name.encode() * 100)
        files[name] = integrity.describe(path)
    fit_ports(
        Manifest(
            schema=5,
            family="llava",
            model={"source": "m", "revision": None},
            recipe="lightvlm",
            parameters={"keep": 0.5},
            dtype="float32",
            cache_dtype="float16",
            quantization=Quantization(4, 32),
            graphs={g: Graph(f"{g}.onnx", (), (), ("w",)) for g in GRAPHS},
            weights={"w": Weight("weights.bin", 8, 24, "float32", (2, 3))},
            text=Text(4, 2, 1, 8, 16, 100, (2,)),
            images=Images("<image>", 3, 4, (2, 2), (8, 8), {"name": "llava"}),
            keep=0.5,
            reductions=(Reduction(1, 0.5, None, 0.1), Reduction(2, 1.0, None, None)),
            cache_policy=FIXED_POINT,
            capacity=Capacity(32, 1, (36, 35, 34, 34)),
            chat_template=None,
            special_tokens={},
            validation="skipped",
            tools={},
            files=files,
        )
    ).write(folder)
    return folder

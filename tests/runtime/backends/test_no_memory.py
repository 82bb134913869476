"""What no machine has memory for: one line that tells how much was asked and what helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engines import build_engines
from fake_onnxruntime import FakeOrt

import lvlm
from lvlm.core.errors import DeviceMemoryError
from lvlm.runtime.backends import cpu, open_backend
from lvlm.runtime.backends.host import buffers
from lvlm.runtime.backends.openvino import OpenVinoCall, OpenVinoSession
from lvlm.runtime.backends.ort.sessions import OrtSession
from lvlm.runtime.backends.trt.cuda_driver import CudaDriver
from lvlm.runtime.bundle.manifest import Graph
from lvlm.runtime.bundle.manifest_checks import LARGEST
from lvlm.runtime.engine import Engine
from lvlm.runtime.run_cli import main

TOLD = r"^the cache \(batch of {}\) needs \d[\d,]+ bytes of memory.*; ask for fewer prompts [^\n]*$"


@pytest.fixture
def huge(bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle that says it has room for the longest prompts that a manifest may name."""
    folder = tmp_path / "huge"
    shutil.copytree(bundle("digits-llava", max_images=2), folder)
    data = json.loads((folder / "lvlm.json").read_text())
    data["capacity"]["max_text_len"] = LARGEST
    data["capacity"]["per_layer"] = [LARGEST] * data["text"]["layers"]
    (folder / "lvlm.json").write_text(json.dumps(data))
    return folder


def attempts(folder: Path, device: str) -> None:
    """A cache of some terabytes, and one of more bytes than there are addresses."""
    for slots in (None, 10**6, 10**30):
        batch = 4 if slots is None else slots
        with pytest.raises(DeviceMemoryError, match=TOLD.format(batch)):
            Engine(folder, device=device, slots=slots)
    with lvlm.load(folder, device=device) as model:
        with pytest.raises(DeviceMemoryError, match=TOLD.format(1)):
            model.generate("Hi", max_new_tokens=LARGEST - 1000)
        with pytest.raises(DeviceMemoryError, match=TOLD.format(2)):
            model.generate(["Hi", "Hello"], max_new_tokens=LARGEST - 1000)


@pytest.mark.parametrize("told", [True, False], ids=["by its size", "by numpy"])
def test_on_the_host(told: bool, huge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may promise what it does not have; where it does not say how much that is, numpy
    still refuses what has no addresses."""
    if told:
        monkeypatch.setattr(np, "zeros", lambda *_, **__: pytest.fail("allocates"))
        with pytest.raises(DeviceMemoryError, match=r"bytes of memory, this machine has \d"):
            Engine(huge)
        return
    monkeypatch.setattr(buffers, "physical_memory", lambda: None)
    real = np.zeros

    def zeros(shape: Any, *kind: Any, **named: Any) -> Any:
        if isinstance(shape, tuple) and max(shape, default=0) > 2**30:
            raise MemoryError  # as numpy does where the system does not overcommit
        return real(shape, *kind, **named)

    monkeypatch.setattr(np, "zeros", zeros)
    attempts(huge, "cpu")


@pytest.mark.parametrize("error", [MemoryError(), ValueError("array is too big"), OverflowError()])
def test_a_buffer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object) -> None:
        raise error

    backend = cpu.Backend(1)
    monkeypatch.setattr(np, "zeros", zeros)
    with pytest.raises(DeviceMemoryError, match=r"there are no 48 bytes of memory for a buffer; g"):
        backend.allocate((2, 3, 4), "float16")


def test_on_cuda(huge: Path, ort: FakeOrt) -> None:
    ort.full = True
    attempts(huge, "cuda")


@pytest.mark.usefixtures("trt")
def test_on_tensorrt(huge: Path, tmp_path: Path) -> None:
    build_engines(huge, tmp_path / "built")
    with pytest.raises(DeviceMemoryError, match=TOLD.format(4)):
        Engine(tmp_path / "built", device="tensorrt-rtx")
    with pytest.raises(DeviceMemoryError, match=r"MiB of GPU memory, 1,048,576 MiB are free"):
        open_backend("tensorrt-rtx").allocate((10**30, 2), "float32")


def test_more_than_cuda_has_addresses_for() -> None:
    driver = CudaDriver.__new__(CudaDriver)  # its library is not asked
    assert driver.allocate(2**63) is None


def test_the_command_line(huge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(huge), "Hi", "--max-new-tokens", str(LARGEST - 1000)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lvlm-run: error: the cache (batch of 1) needs ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("Failed to allocate memory for requested buffer of size 1024\nstack"),
        RuntimeError("Available memory of 12 is smaller than requested bytes of 1024"),
    ],
)
def test_while_a_graph_runs(error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    binding = SimpleNamespace(synchronize_inputs=lambda: None)
    ort: Any = SimpleNamespace(io_binding=lambda: binding, run_with_iobinding=fails)
    request = SimpleNamespace(start_async=fails)
    compiled = SimpleNamespace(inputs=(), create_infer_request=lambda: request)
    graph = Graph("g.onnx", (), ())
    for call in (
        OrtSession(ort, graph, [], "cpu", object).bind({}, {}),
        OpenVinoCall(OpenVinoSession(None, graph, compiled), {}, {}),
    ):
        with pytest.raises(DeviceMemoryError, match=r"failed, out of memory \(.*; give fewer") as e:
            call({}, {})
        assert "\n" not in str(e.value)

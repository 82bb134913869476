"""The cuda backend with an ONNX Runtime that only says that it has a GPU (fake_onnxruntime.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from engine_tools import WAIT, Ask, idle, same, scheduler
from fake_onnxruntime import FakeOrt
from settings import ASSETS, CACHED

import lvlm
from lvlm.core.errors import BackendError, DeviceMemoryError
from lvlm.runtime.backends import open_backend
from lvlm.runtime.backends.cuda import Backend
from lvlm.runtime.backends.ort.sessions import OrtSession
from lvlm.runtime.bundle.manifest import Graph, Port
from lvlm.runtime.engine import Engine
from lvlm.runtime.run_cli import main

SAMPLES = [ASSETS / f"samples/digits-{i}.png" for i in (1, 2)]
PROMPTS = ["Describe the picture.", "Read the top row.", "Hi"]
IMAGES = [SAMPLES[:1], SAMPLES, []]
TENSORRT = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
LIGHTVLM = CACHED["lightvlm (cached)"]


@pytest.mark.parametrize(
    ("device", "recipe"),
    [("cuda", ("none",)), ("cuda", LIGHTVLM), ("ort-tensorrt", LIGHTVLM)],
    ids=["none", "lightvlm", "ort-tensorrt"],
)
def test_answers_are_those_of_the_cpu(
    device: str,
    recipe: tuple[str, ...],
    bundle: Callable[..., Path],
    ort: FakeOrt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = ("ort-tensorrt",) if device == "ort-tensorrt" else ()
    ort.available = TENSORRT[0 if targets else 1 :]
    folder = bundle("digits-llava", *recipe, max_images=2, targets=targets)
    options: dict[str, Any] = {"max_new_tokens": 24}
    if len(recipe) > 1:
        options["kv_keep"] = 0.5
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", onnxruntime)
        with lvlm.load(folder) as cpu:
            expected = cpu.generate(PROMPTS, IMAGES, **options)
    with lvlm.load(folder, device=device) as model:
        assert ort.preloaded
        assert all(("ort-tensorrt" in name) == bool(targets) for name in ort.opened)
        ours = model.generate(PROMPTS, IMAGES, **options)
        assert [g.token_ids for g in ours] == [g.token_ids for g in expected]
        cache = model.calls._cache
        assert cache is not None
        for name, value in cache.buffers.items():
            places = {(d, a) for n, d, a in ort.bound if n in (f"past_{name}", f"present_{name}")}
            assert places == {("cuda", value.data_ptr())}  # in place
    assert {d for n, d, _ in ort.bound if n in ("input_ids", "logits", "kept")} == {"cpu"}
    assert ort.waits[:2] == ["inputs", "outputs"]


@pytest.mark.parametrize("recipe", [("none",), LIGHTVLM], ids=["none", "lightvlm"])
def test_rows_of_the_device_s_memory(
    recipe: tuple[str, ...],
    bundle: Callable[..., Path],
    ort: FakeOrt,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine binds parts of the buffers, and moves rows within the device."""
    folder = bundle("digits-llava", *recipe, max_images=2)
    ratio = {"kv_keep": 0.5} if len(recipe) > 1 else {}
    asks = [Ask(p, (0,), {"max_new_tokens": 4 + 9 * i, **ratio}) for i, p in enumerate(PROMPTS * 2)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", onnxruntime)
        with lvlm.load(folder) as cpu:
            expected = [a.alone(cpu) for a in asks]
    with Engine(folder, device="cuda", slots=2) as engine:
        handles = [engine.submit(*a.arguments, **a.options) for a in asks]
        for handle, one in zip(handles, expected, strict=True):
            same(handle.result(WAIT), one)
        lost = engine.submit(*asks[-1].arguments, **asks[-1].options)
        next(lost.tokens())
        scheduler(engine).batch.slots.cache.clear_row(1)  # of nobody
        lost.cancel()
        idle(engine)


def test_graphs_that_were_not_lowered(ort: FakeOrt, bundle: Callable[..., Path]) -> None:
    ort.available = TENSORRT
    with pytest.raises(BackendError, match=r"is missing; .* --target ort-tensorrt"):
        lvlm.load(bundle("digits-llava", max_images=2), device="ort-tensorrt")


def test_bf16_travels_as_its_bits(ort: FakeOrt) -> None:
    """ONNX's own number of the type, since numpy has none; nothing runs it here."""
    value = open_backend("cuda").allocate((2, 3), "bfloat16")
    array = ort.arrays[value.data_ptr()]
    assert (array.dtype, array.shape) == (np.uint16, (2, 3))
    assert not array.any()
    kinds: list[Any] = []
    binding = SimpleNamespace(bind_input=lambda *place: kinds.append(place[3]))
    session = SimpleNamespace(io_binding=lambda: binding)
    ports = (Port("x", "bfloat16", (2, 3)), Port("n", "int64", (1,)))
    host = np.zeros(1, np.int64)
    graph = Graph("g.onnx", ports, ())
    OrtSession(session, graph, [], "cuda", object).bind({"x": value, "n": host}, {})
    assert kinds == [16, np.int64]


def test_without_the_provider(
    ort: FakeOrt, bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle("digits-llava", max_images=2)
    ort.available = ("AzureExecutionProvider", "CPUExecutionProvider")
    assert main([str(folder), "Hi", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no CUDAExecutionProvider, only AzureExecutionProvider, CPUExecutionProvider" in error
    assert "pip uninstall -y onnxruntime" in error


def test_a_provider_that_does_not_start(ort: FakeOrt, bundle: Callable[..., Path]) -> None:
    """ONNX Runtime would go on, on the CPU."""
    ort.starts = False
    with pytest.raises(
        BackendError, match=r"CUDAExecutionProvider did not start, .* would use CPUExec"
    ):
        lvlm.load(bundle("digits-llava", max_images=2), device="cuda")


def test_no_room_for_the_cache(ort: FakeOrt, bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle("digits-llava", max_images=2), device="cuda") as model:
        ort.full = True
        with pytest.raises(
            DeviceMemoryError, match=r"the cache \(batch of 1\) needs .*; ask for fewer"
        ):
            model.generate("Hi")


def test_a_run_that_fails() -> None:
    """One line, of the class that tells whether memory was short."""
    said = "CUDA failure 2: out of memory ; GPU=0"

    def fails(*_: object) -> None:
        raise RuntimeError(f"{said}\nstack")

    binding = SimpleNamespace(synchronize_inputs=lambda: None)
    session = SimpleNamespace(io_binding=lambda: binding, run_with_iobinding=fails)
    call = OrtSession(session, Graph("g.onnx", (), ()), [], "cuda", object).bind({}, {})
    with pytest.raises(DeviceMemoryError, match=r"out of memory .*; give fewer prompts") as caught:
        call({}, {})
    assert "\n" not in str(caught.value)
    said = "CUBLAS_STATUS_NOT_INITIALIZED"
    with pytest.raises(BackendError, match=r"ONNX Runtime failed: CUBLAS_STATUS_NOT_INITIALIZED$"):
        call({}, {})


def test_onnxruntime_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime cannot be .*\[cuda\]"):
        Backend()


def test_this_machine_has_no_provider() -> None:
    """The onnxruntime of the tests is the CPU's."""
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider"):
        Backend()

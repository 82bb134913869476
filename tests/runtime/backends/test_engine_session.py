"""Sessions of one small engine on a GPU that is not there: types, shapes, copies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from example_counts import examples
from fake_driver import FakeDriver
from fake_tensorrt import FakeEngine, FakeTensorRt
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from lvlm.core.errors import BackendError, CapacityError
from lvlm.runtime.backends.trt import engine_session
from lvlm.runtime.backends.trt.driver import DeviceArray, DeviceBuffer
from lvlm.runtime.backends.trt.engine_session import EngineSession, Shared, Workspace
from lvlm.runtime.backends.trt.staging import Staging
from lvlm.runtime.bundle.engine_sets import ALIGNMENT
from lvlm.runtime.bundle.manifest import Graph, Port


def small_session(driver: FakeDriver, tmp_path: Path, dtype: str, **built: Any) -> EngineSession:
    """y = x + x, in fp32 inside, of x [n,4] of ``dtype``."""
    element = {"bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}[dtype]
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["a", "a"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=element),
    ]
    ports = [helper.make_tensor_value_info(n, element, ["batch", 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "small", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "small.onnx")
    described = {"onnx": str(tmp_path / "small.onnx"), "profile": {"batch": (2, 2, 3)}}
    trt = FakeTensorRt(driver, rtx=False)
    engine = FakeEngine(trt, described | {"static": {}} | built)
    log = SimpleNamespace(errors=[], text=lambda: "no reason")
    listed = Graph(
        "small.onnx", (Port("x", dtype, ("batch", 4)),), (Port("y", dtype, ("batch", 4)),)
    )
    return EngineSession(Shared(trt, driver, Workspace(driver), log), "small", engine, listed, {})


def test_bf16_travels_as_its_bits(tmp_path: Path) -> None:
    session = small_session(FakeDriver(), tmp_path, "bfloat16")
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)  # exact: few digits
    twice = np.zeros_like(bits)
    session.bind({}, {})({"x": bits}, {"y": twice})
    np.testing.assert_array_equal((twice.astype(np.uint32) << 16).view(np.float32), 2 * values)


def test_replays_read_what_lies_in_the_buffers_now(tmp_path: Path) -> None:
    driver = FakeDriver()
    call = small_session(driver, tmp_path, "float32").bind({}, {})
    for step in range(4):
        given = np.full((2, 4), step, np.float32)
        found = np.zeros_like(given)
        call({"x": given}, {"y": found})
        np.testing.assert_array_equal(found, 2 * given)
    assert driver.kinds().count("launch") == 3
    driver.events.clear()
    call({"x": np.ones((3, 4), np.float32)}, {})  # nobody asks for y
    assert driver.kinds() == ["upload", "run", "wait"]


def test_graphs_are_kept_by_shapes_and_addresses(tmp_path: Path) -> None:
    """Calls of two sizes in turn, and of another one that moves the staging memory."""
    driver = FakeDriver()
    session = small_session(driver, tmp_path, "float32", profile={"batch": (1, 2, 200)})
    calls = {rows: session.bind({}, {}) for rows in (1, 2, 3, 40, 150)}
    events: dict[str, list[str]] = {}
    for step, rows in enumerate([40, 2, 2, 3, 3, 2, 3, 1, 2, 1, 150, 2, 2, 3]):
        driver.events.clear()
        given = np.full((rows, 4), step, np.float32)
        found = np.zeros_like(given)
        calls[rows]({"x": given}, {"y": found})
        np.testing.assert_array_equal(found, 2 * given)
        (kind,) = {"run", "launch"} & set(driver.kinds())
        kind = "capture" if "capture" in driver.kinds() else kind
        events[f"{step}: {rows}"] = kind
    assert list(events.values()) == [
        "run",  # memory for what follows
        *("run", "capture", "run", "capture", "launch", "launch"),  # 2 and 3
        *("run", "launch", "capture"),  # 1, between
        *("run", "run", "capture", "run"),  # what was captured is of memory that has gone
    ]
    assert len(session.graphs) == 1
    assert sum(bool(graph) for graph in driver.graphs.values()) == 1  # the others are freed


def test_only_so_many_graphs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_session, "GRAPHS", 2)
    driver = FakeDriver()
    session = small_session(driver, tmp_path, "float32", profile={"batch": (1, 2, 4)})
    largest = np.zeros((4, 4), np.float32)
    session.bind({}, {})({"x": largest}, {"y": largest})  # memory for all that follow
    calls = {rows: session.bind({}, {}) for rows in (1, 2, 3)}
    for rows in (1, 1, 2, 2, 1, 3, 3):
        x = np.zeros((rows, 4), np.float32)
        calls[rows]({"x": x}, {"y": x})
    assert driver.kinds().count("capture") == 3
    assert [key[0][0][1][0] for key in session.graphs] == [1, 3]  # 2 was used least lately


ARRAYS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 40), max_size=3).map(tuple),
        st.sampled_from(["int64", "float32", "uint16", "float16"]),
    ),
    max_size=5,
)


@settings(max_examples=examples(40), deadline=None)
@given(calls=st.lists(st.tuples(ARRAYS, ARRAYS, ARRAYS), min_size=1, max_size=3))
def test_arrays_cross_side_by_side(calls: list[Any]) -> None:
    """Whatever their shapes, in memory that is used again: each arrives where the engine finds it,
    aligned, and the outputs come back."""
    driver = FakeDriver()
    staging = Staging(driver)
    for inputs, outputs, idle in calls:
        kinds = [
            {f"{kind}{i}": array for i, array in enumerate(arrays)}
            for kind, arrays in (("in", inputs), ("out", outputs), ("idle", idle))
        ]
        staging.lay_out(*kinds)
        given_arrays = {
            name: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype) + i
            for i, (name, (shape, dtype)) in enumerate((kinds[0] | kinds[1]).items())
        }
        staging.upload({name: given_arrays[name] for name in kinds[0]})
        driver.synchronize()
        for name, slot in staging.slots.items():
            assert staging.address(name) % ALIGNMENT == 0
            memory = driver.memory(staging.address(name), slot.nbytes)
            if name in kinds[1]:
                memory[:] = given_arrays[name].reshape(-1).view(np.uint8)
            elif name in kinds[2]:
                memory[:] = 0xFF  # what an engine writes there hurts nobody
        for name in kinds[0]:
            memory = driver.memory(staging.address(name), staging.slots[name].nbytes)
            assert memory.tobytes() == given_arrays[name].tobytes()
        staging.download()
        driver.synchronize()
        for name in kinds[1]:
            np.testing.assert_array_equal(staging.view(name), given_arrays[name])


@pytest.mark.parametrize(("rows", "fewer"), [(1, "more"), (4, "fewer")])
def test_shapes_outside_the_profile(tmp_path: Path, rows: int, fewer: str) -> None:
    call = small_session(FakeDriver(), tmp_path, "float32").bind({}, {})
    with pytest.raises(
        CapacityError, match=rf"2 to 3 prompts at once \(x\), .* {rows}; give {fewer}, .* --batch"
    ):
        call({"x": np.zeros((rows, 4), np.float32)}, {})


def test_outputs_of_another_shape_or_type(tmp_path: Path) -> None:
    call = small_session(FakeDriver(), tmp_path, "float32").bind({}, {})
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(BackendError, match=r"gives y of shape \[2, 4\], not \[2, 5\]; build"):
        call({"x": x}, {"y": np.zeros((2, 5), np.float32)})
    with pytest.raises(BackendError, match="x is float64, the graph takes float32"):
        call({"x": x.astype(np.float64)}, {"y": x})


def test_a_host_array_is_no_device_buffer(tmp_path: Path) -> None:
    session = small_session(FakeDriver(), tmp_path, "float32")
    array = np.zeros((2, 4), np.float32)
    fake = SimpleNamespace(address=array.ctypes.data // 256 * 256, shape=array.shape)
    with pytest.raises(AssertionError, match="is not the memory it should be"):
        session.bind({"x": fake}, {})({}, {"y": array})  # type: ignore[dict-item]


def test_memory_that_is_not_aligned(tmp_path: Path) -> None:
    """TensorRT takes what begins at multiples of 256 bytes; kernels fault on what does not."""
    driver = FakeDriver()
    session = small_session(driver, tmp_path, "float32")
    buffer = DeviceBuffer(driver, 1024, "a test", "")
    odd, even = (DeviceArray(buffer, (2, 4), "float32", offset) for offset in (128, 256))
    with pytest.raises(BackendError, match="x of the small engine does not begin at a multiple of"):
        session.bind({"x": odd}, {})({}, {})
    session.bind({"x": even}, {})({}, {})


def test_an_engine_of_other_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "is_shape_inference_io", lambda self, name: name == "x")  # noqa: ARG005
        with pytest.raises(BackendError, match="reads x on the host; build the engines"):
            small_session(FakeDriver(), tmp_path, "float32")
    monkeypatch.setattr(FakeEngine, "dtype", lambda self, name: "int64")  # noqa: ARG005
    with pytest.raises(BackendError, match=r"small engine and the manifest differ in [xy]; build"):
        small_session(FakeDriver(), tmp_path, "float32")

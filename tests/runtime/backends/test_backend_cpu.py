"""Backend cpu: one copy of the weights for all sessions, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from settings import ASSETS

import lvlm
from lvlm.core.errors import BackendError
from lvlm.runtime.backends import cpu
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS
from lvlm.runtime.backends.ort.mapped_weights import MappedWeights
from lvlm.runtime.bundle.manifest import Graph, Port, Weight
from lvlm.runtime.bundle.reader import read_bundle

pytestmark = pytest.mark.usefixtures("own_sessions")

MEGABYTE = 1 << 20
LOWERED = "lvlm.lowered"  # domain of the nodes that have kernels of our own only
WIDE, DEEP = 1024, 8  # weights [WIDE,WIDE] fp32 of 4 MB each
SIZE = 4 * WIDE * WIDE
IMAGE = ASSETS / "samples/digits-1.png"


class Listed:
    """As much of a manifest as a backend asks for: two graphs that multiply with all weights, by
    ``ops``."""

    dtype = "float32"

    def __init__(self, folder: Path, ops: tuple[str, str] = ("MatMul", "MatMul")) -> None:
        self.weights = {
            f"w{i}": Weight("weights.bin", i * SIZE, SIZE, "float32", (WIDE, WIDE))
            for i in range(DEEP)
        }
        self.graphs = {
            name: self.graph(folder, name, op)
            for name, op in zip(("first", "second"), ops, strict=True)
        }
        random = np.random.default_rng(0)
        self.values = random.normal(0, WIDE**-0.5, (DEEP, WIDE, WIDE)).astype(np.float32)
        (folder / "weights.bin").write_bytes(self.values.tobytes())

    def graph(self, folder: Path, name: str, op: str) -> Graph:
        stored = []
        for weight, place in self.weights.items():
            w = TensorProto(name=weight, dims=place.dims, data_type=TensorProto.FLOAT)
            w.data_location = TensorProto.EXTERNAL
            for key in ("location", "offset", "length"):
                fields = {"location": place.file, "length": place.bytes, "offset": place.offset}
                w.external_data.add(key=key, value=str(fields[key]))
            stored.append(w)
        values = ["x", *(f"t{i}" for i in range(1, DEEP)), "y"]
        nodes = [
            helper.make_node(
                op,
                [values[i], f"w{i}"],
                [values[i + 1]],
                domain="" if op == "MatMul" else LOWERED,
            )
            for i in range(DEEP)
        ]
        x, y = (
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDE]) for n in ("x", "y")
        )
        body = helper.make_graph(nodes, name, [x], [y], stored)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(LOWERED, 1)]
        model = helper.make_model(body, opset_imports=opsets, ir_version=10)
        onnx.save(model, folder / f"{name}.onnx")
        given, found = [(Port(n, "float32", ("rows", WIDE)),) for n in ("x", "y")]
        return Graph(f"{name}.onnx", given, found, tuple(self.weights))


def resident() -> int:
    """Bytes of this process in memory, the mapped files' pages, too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory: Linux only")
@pytest.mark.parametrize(
    ("ops", "more"), [(("MatMul", "MatMul"), 1), (("Linear", "TransposedLinear"), 4)]
)
def test_sessions_share_one_packed_copy_of_a_weight(
    ops: tuple[str, str],
    more: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Of kernels of our own, for each layout one copy; which leave nothing with the allocator."""
    if "Linear" in ops:
        monkeypatch.setenv(KERNELS, str(request.getfixturevalue("kernels")))
    listed: Any = Listed(tmp_path, ops)
    backend = cpu.Backend(threads=1)
    # What the second packs in vain may stay with the allocator, where a third finds it.
    names = (["first", "second"] * 3)[: 2 + more]
    sessions = [backend.load(tmp_path, listed, name) for name in names[:2]]
    before = resident()
    sessions += [backend.load(tmp_path, listed, name) for name in names[2:]]
    grown = resident() - before
    # Pages of the file that were read again count, too, until they are dropped.
    assert grown < 0.9 * DEEP * SIZE, f"{grown / MEGABYTE:.0f} MB"
    x = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    for name, session in zip(names, sessions, strict=True):
        transposed = dict(zip(listed.graphs, ops, strict=True))[name] == "TransposedLinear"
        values = [value.T if transposed else value for value in listed.values]
        y = np.zeros((3, WIDE), np.float32)
        session.bind({"x": x}, {})({}, {"y": y})
        np.testing.assert_allclose(y, np.linalg.multi_dot([x, *values]), atol=1e-3)


def test_a_session_is_released_before_what_it_reads(tmp_path: Path) -> None:
    """Whatever its owner drops first: the container's and the weights' memory is ONNX Runtime's."""
    listed: Any = Listed(tmp_path)
    backend = cpu.Backend(threads=1)
    assert backend.shared is not None
    released: list[str] = []
    functions = backend.shared.library.functions

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda pointer: (released.append(name), function(pointer))

    for what in ("IoBinding", "Session", "Value", "PrepackedWeightsContainer"):
        functions[f"Release{what}"] = recorded(what, functions[f"Release{what}"])
    backend.shared.container = backend.shared.library.container()
    session = backend.load(tmp_path, listed, "first")
    call = session.bind({}, {})
    (mapping,) = backend.shared.mapped._files.values()
    weakref.finalize(mapping, released.append, "mapping")
    del mapping, backend, session
    assert released == []
    del call
    assert released[:2] == ["IoBinding", "Session"]
    assert sorted(released[2:]) == ["PrepackedWeightsContainer", *["Value"] * DEEP, "mapping"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory: Linux only")
def test_a_length_met_again_takes_no_more_memory(tmp_path: Path) -> None:
    listed: Any = Listed(tmp_path)
    call = cpu.Backend(threads=1).load(tmp_path, listed, "first").bind({}, {})
    grown = []
    x, y = np.ones((1000, WIDE), np.float32), np.ones((1000, WIDE), np.float32)
    for _ in range(4):
        call({"x": x}, {"y": y})
        grown.append(resident())
    assert max(grown) - grown[0] < 2 * MEGABYTE, grown


def test_what_goes_wrong_while_running_is_one_line(tmp_path: Path) -> None:
    listed: Any = Listed(tmp_path)
    session = cpu.Backend(threads=1).load(tmp_path, listed, "first")
    call = session.bind({}, {})
    with pytest.raises(BackendError, match="ONNX Runtime failed: ") as caught:
        call({"x": np.zeros((3, 7), np.float32)}, {"y": np.zeros((3, WIDE), np.float32)})
    assert "\n" not in str(caught.value)
    call({"x": np.zeros((3, WIDE), np.float32)}, {})  # an output that nobody asked for


def test_a_stopped_call_runs_no_more(tmp_path: Path) -> None:
    listed: Any = Listed(tmp_path)
    session = cpu.Backend(threads=1).load(tmp_path, listed, "first")
    call, other = session.bind({}, {}), session.bind({}, {})
    x = {"x": np.zeros((3, WIDE), np.float32)}
    call.stop()
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        call(x, {})
    other(x, {})


def test_a_graph_that_is_none_and_ports_that_are_others_are_refused(tmp_path: Path) -> None:
    listed: Any = Listed(tmp_path)
    other = (Port("z", "float32", (1,)),)
    listed.graphs["second"] = Graph("second.onnx", other, other, tuple(listed.weights))
    backend = cpu.Backend(threads=1)
    with pytest.raises(BackendError, match="other inputs or outputs"):
        backend.load(tmp_path, listed, "second")
    (tmp_path / "first.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"first\.onnx cannot be loaded on device cpu"):
        backend.load(tmp_path, listed, "first")


def test_a_weight_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    mapped = MappedWeights()
    data = mapped.bytes_of(tmp_path, "w", Weight("weights.bin", 32, 8, "uint4", (4, 4)))
    assert data.shape == (8,)
    with pytest.raises(BackendError, match="has no w where the manifest says"):
        mapped.bytes_of(tmp_path, "w", Weight("weights.bin", 32, 8, "float32", (3,)))


def test_without_the_library_answers_are_the_same(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle("digits-llava", max_images=2)

    def answer() -> list[int]:
        with lvlm.load(folder) as model:
            tokens: list[int] = model.generate("Read it.", [IMAGE], max_new_tokens=16).token_ids
            return tokens

    expected = answer()
    monkeypatch.setattr(cpu, "find_library", lambda: None)
    assert answer() == expected


def test_the_python_package_is_not_imported() -> None:
    code = """
import sys
from lvlm.runtime.backends.cpu import Backend
assert Backend().shared is not None
print("onnxruntime" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"onnxruntime cannot be imported .*\[cpu\]"):
        cpu.Backend()


def test_a_broken_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libonnxruntime.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "find_library", lambda: broken)
    with pytest.raises(BackendError, match=r"onnxruntime cannot be loaded .*\[cpu\]"):
        cpu.Backend()


def test_a_bundle_without_the_lowered_graph_runs_the_canonical_one(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("digits-llava", max_images=2), folder)
    graph = read_bundle(folder).graphs["decode"]
    backend = cpu.Backend(threads=1)
    assert backend.file(folder, graph).name == "decode.ort-cpu.onnx"
    graph.lowered.clear()
    assert backend.file(folder, graph).name == "decode.onnx"

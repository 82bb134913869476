"""The openvino backend: the cpu backend's answers on graphs lowered for it, and what it refuses."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from openvino_tools import IMAGES, PROMPTS, SAMPLES, Make, lowering
from settings import AT_ENCODER, CACHED

import lvlm
from lvlm.core.errors import BackendError, ParameterError
from lvlm.plugins_trt.build_cli import main as build
from lvlm.runtime.backends.openvino import PRECISION, PRECISIONS, Backend
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import Engine, Session
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.run_cli import main

# Their graphs are another's, or two others' halves, but for counts; but for scores tova's are h2o's
# and streaming-llm's snapkv's, and uniform's are elastic-cache's without merging
LIKE_ANOTHER = (
    "uniform (cached)",
    "streaming-llm (cached)",
    "tova (cached)",
    "prefixkv (cached)",
    "pyramidkv (cached)",
    "lightvlm with prefixkv",
)


@pytest.fixture(scope="module")
def lowered(bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """lowered("none"): a bundle with graphs for OpenVINO."""
    return lowering(bundle, tmp_path_factory)


def test_answers_are_those_of_the_cpu(each: str, lowered: Make) -> None:
    """In a batch of different lengths and alone, with the same counts."""
    folder = lowered(each)
    options: dict[str, Any] = {"max_new_tokens": 24}
    if each in CACHED:
        options["kv_keep"] = 0.5
    with lvlm.load(folder, threads=1) as cpu:
        expected = cpu.generate(PROMPTS, IMAGES, **options)
    with lvlm.load(folder, device="openvino", threads=1) as model:
        together = model.generate(PROMPTS, IMAGES, **options)
        alone = model.generate(PROMPTS[1], IMAGES[1], **options)
    assert [g.token_ids for g in together] == [g.token_ids for g in expected]
    assert alone.token_ids == expected[1].token_ids
    for ours, theirs in zip(together, expected, strict=True):
        assert ours.stats.kept_per_layer == theirs.stats.kept_per_layer
        for mine, other in zip(ours.merge_maps, theirs.merge_maps, strict=True):
            np.testing.assert_array_equal(mine, other)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("--whole")
    if "turned" in metafunc.fixturenames:
        recipes = ["lightvlm (cached)", "elastic-cache (cached)"]
        metafunc.parametrize("turned", recipes[: 2 if whole else 1])
    if "each" in metafunc.fixturenames:
        every = ["none", *CACHED, *AT_ENCODER]
        metafunc.parametrize("each", [x for x in every if whole or x not in LIKE_ANOTHER])


def test_turns_of_a_session_are_those_of_the_cpu(turned: str, lowered: Make) -> None:
    """Read by the graph extend of a recipe that compresses, an image among them."""
    folder = lowered(turned, sessions=True)
    found = []
    for device in ("cpu", "openvino"):
        engine = Engine(folder, slots=2, device=device, threads=1)
        with engine, engine.session() as session:
            found.append(converse(engine, session))
    ours, theirs = found
    assert [g.token_ids for g in ours] == [g.token_ids for g in theirs]
    assert all(g.stats.reused_tokens for g in ours[1:])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.stats.reused_tokens == other.stats.reused_tokens
        assert mine.stats.kept_per_layer == other.stats.kept_per_layer


def converse(engine: Engine, session: Session) -> list[Generation]:
    """The answers to three turns, with an image in the first and the second."""
    talk: list[dict[str, Any]] = []
    found: list[Generation] = []
    for text, images in ((PROMPTS[0], SAMPLES[:1]), (PROMPTS[1], SAMPLES[1:]), ("And 7?", [])):
        shown = [{"type": "image", "image": str(image)} for image in images]
        talk.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        found.append(engine.generate(talk, session=session, max_new_tokens=9, kv_keep=0.3))
        talk.append({"role": "assistant", "content": found[-1].text})
    return found


def random_step(rows: int, slots: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and lasting buffers of a decode step of digits-llava."""
    random = np.random.default_rng(0)
    manifest_layers, heads, width = 6, 2, 32
    buffers = {
        f"past_{kind}_{layer}": random.normal(size=(rows, heads, slots, width)).astype("float32")
        for layer in range(manifest_layers)
        for kind in ("key", "value")
    }
    index = random.integers(0, slots, (manifest_layers, rows))
    inputs = {
        "input_ids": np.full((rows, 1), 5),
        "position_ids": np.full((rows, 1), slots),
        "write_index": index,
        "valid_length": np.maximum(index + 1, slots // 2),
    }
    return inputs, buffers


def test_one_slot_of_each_row_is_written_in_place_or_elsewhere(lowered: Make) -> None:
    folder = lowered()
    manifest = read_bundle(folder)
    inputs, buffers = random_step(3, 20)
    text = manifest.text
    assert (text.layers, text.kv_heads, text.head_dim) == (6, *buffers["past_key_0"].shape[1::2])
    canonical = onnxruntime.InferenceSession(str(folder / "decode.onnx"))
    names = [output.name for output in canonical.get_outputs()]
    expected = dict(zip(names, canonical.run(None, inputs | buffers), strict=True))
    session = Backend(threads=1).load(folder, manifest, "decode")
    for elsewhere in (False, True):
        past = {name: buffer.copy() for name, buffer in buffers.items()}
        present = {
            name.replace("past", "present"): np.zeros_like(b) if elsewhere else b
            for name, b in past.items()
        }
        logits = np.empty((3, text.vocab), np.float32)
        session.bind(past, present)(inputs, {"logits": logits})
        found = {"logits": logits, **present}
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, atol=2e-4, err_msg=name)
        if elsewhere:
            for name, buffer in buffers.items():
                np.testing.assert_array_equal(past[name], buffer)
    for name, buffer in buffers.items():
        kept = np.ones((3, 20), bool)
        kept[np.arange(3), inputs["write_index"][int(name[-1])]] = False
        new = found[name.replace("past", "present")].swapaxes(1, 2)
        np.testing.assert_array_equal(new[kept], buffer.swapaxes(1, 2)[kept])


def test_threads_are_those_asked_for(lowered: Make) -> None:
    folder = lowered()
    backend = Backend(threads=1)
    session = backend.load(folder, read_bundle(folder), "vision")
    assert session.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert str(session.compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_precision_is_what_the_cpu_has(
    lowered: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lowered()
    able = Backend().core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for wanted in ("bf16", "f16"):
        monkeypatch.setenv(PRECISION, wanted)
        command = [str(folder), "Hi", "--device", "openvino", "--max-new-tokens", "2"]
        if PRECISIONS[wanted] in able:
            assert main(command) == 0
            continue
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"does not compute in {wanted}; unset {PRECISION}" in error
    monkeypatch.setenv(PRECISION, "fp8")
    with pytest.raises(ParameterError, match=f"{PRECISION} is 'fp8'; give f32, bf16, f16"):
        Backend()


def test_graphs_that_were_not_lowered_are_made_by_the_command_that_is_named(
    bundle: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("digits-llava", max_images=2), folder)
    with pytest.raises(BackendError, match="; make it with lvlm-build") as caught:
        lvlm.load(folder, device="openvino")
    command = str(caught.value).partition("make it with lvlm-build ")[2].split()
    assert build(command) == 0
    assert "vision.openvino.onnx" in capsys.readouterr().out
    with lvlm.load(folder, device="openvino", threads=1) as model:
        assert model.generate("Hi", max_new_tokens=2).token_ids


def test_graphs_that_do_not_fit_the_bundle(lowered: Make, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(lowered(), folder)
    manifest, backend = read_bundle(folder), Backend(threads=1)
    path = folder / "vision.openvino.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.output[0].name = "other"
    model.graph.node[-1].output[0] = "other"
    onnx.save(model, path)
    with pytest.raises(BackendError, match=r"vision\.openvino\.onnx has other outputs than"):
        backend.load(folder, manifest, "vision")
    shutil.copy(folder / "decode.openvino.onnx", path)
    with pytest.raises(BackendError, match=r"has other inputs than .*; make it again with"):
        backend.load(folder, manifest, "vision")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BackendError, match=r"^OpenVINO cannot load .*vision\.openv") as caught:
        backend.load(folder, manifest, "vision")
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_is_one_line(lowered: Make) -> None:
    folder = lowered()
    session = Backend(threads=1).load(folder, read_bundle(folder), "vision")
    with pytest.raises(BackendError, match=r"^OpenVINO failed: ") as caught:
        session.bind({}, {})({"pixel_values": np.zeros((1, 3, 5, 5), np.float32)}, {})
    assert "\n" not in str(caught.value)


def test_a_stopped_run_ends_with_an_error_and_others_go_on(lowered: Make) -> None:
    folder = lowered()
    manifest = read_bundle(folder)
    session = Backend(threads=1).load(folder, manifest, "vision")
    pixels = np.random.default_rng(0).random((32, 3, *manifest.images.size), np.float32)
    shape = (32, manifest.images.tokens, manifest.text.hidden)
    call, other = session.bind({}, {}), session.bind({}, {})
    with ThreadPoolExecutor() as pool:
        running = pool.submit(
            call, {"pixel_values": pixels}, {"image_features": np.empty(shape, np.float32)}
        )
        call.stop()
        with pytest.raises(BackendError, match=r"^OpenVINO failed: "):
            running.result()
    with pytest.raises(BackendError, match="the run was stopped"):
        call({"pixel_values": pixels[:1]}, {})
    features = np.zeros((1, *shape[1:]), np.float32)
    other({"pixel_values": pixels[:1]}, {"image_features": features})
    assert features.any()


def test_openvino_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"openvino cannot be .*\[openvino\]"):
        Backend()


@pytest.mark.parametrize("recipe", ["none", *CACHED])
def test_every_input_is_consumed(recipe: str, lowered: Make) -> None:
    """By the graph that OpenVINO makes of the file; caches that are only written are no inputs."""
    folder = lowered(recipe)
    core = Backend().core
    manifest = read_bundle(folder)
    policy = manifest.cache_policy
    for name, graph in manifest.graphs.items():
        model = core.read_model(folder / f"{name}.openvino.onnx")
        inputs = model.inputs
        unused = [port.any_name for port in inputs if not port.get_target_inputs()]
        assert unused == [], name
        takes = {p.name for p in graph.inputs}
        written = {p for p in takes if p.startswith("past_") and name == "prefill"}
        if name == "decode":
            written |= {p for p in takes if p.startswith("past_query_")}
            if policy is not None and not policy.sums:  # what the newest token attends to
                written |= {p for p in takes if p.startswith("past_received_")}
        assert {port.any_name for port in inputs} == takes - written

"""lvlm-build engine as a user meets it: mistakes in one line, nothing half-built."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from settings import SMALL

from lvlm.core import own_process
from lvlm.core.discovery import discover
from lvlm.core.errors import BuildError, ExportError
from lvlm.core.installing import install
from lvlm.core.progress import Progress, size
from lvlm.export.targets import trt_rtx
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.build_cli import main
from lvlm.plugins_trt.engines import lowered_graphs
from lvlm.plugins_trt.engines.engine_plan import EnginePlan, make_plan
from lvlm.plugins_trt.engines.engine_request import BuildRequest
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.plugins_trt.engines.memory_estimate import check_memory
from lvlm.runtime.bundle.engine_sets import EngineSet
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine.memory_plan import slot_capacity
from lvlm.runtime.kv.cache import cache_bytes
from lvlm.runtime.kv.static_capacity import static_capacity

rtx = pytest.importorskip("tensorrt_rtx")
TARGETS: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
pytestmark = pytest.mark.usefixtures("in_this_process")


def test_targets_are_listed_with_what_was_seen_of_them(run: Any) -> None:
    code, out, _ = run("--list-targets")
    assert code == 0
    blocks = {block.partition("\n")[0]: " ".join(block.split()) for block in out.split("\n\n")}
    targets = discover("lvlm.export.targets", "TARGET")
    assert set(blocks) == set(targets)
    for name, target in targets.items():
        assert blocks[name].endswith(f"verified {target.verified or 'no'}")
    assert "RMSNormalization, RotaryEmbedding" in blocks["jetson-orin-jp62"]
    assert "quantized int8 with one scale" in blocks["jetson-orin-jp62"]
    assert "quantized int4 in blocks of 16, 32" in blocks["jetson-jp72"]
    assert max(map(len, out.splitlines())) <= 80


def test_what_is_built_and_where(folder: Path, run: Any) -> None:
    argv = (folder, "--target", "trt-rtx", "--sm", "86,89", "--batch", "2", "--max-prompt", 100)
    code, out, _ = run(*argv, "--dry-run")
    assert code == 0
    where = folder / "engines" / f"sm86+sm89-tensorrt-rtx-{rtx.__version__}"
    assert f"would make {where}" in out
    assert not (folder / "engines").exists()
    assert "decode.trt-rtx.onnx" not in read_bundle(folder).files

    code, out, err = run(*argv)
    assert code == 0
    assert out.startswith(str(where))
    assert "[1/5] lower for trt-rtx" in err
    assert "[5/5] build decode" in err
    assert sorted(p.name for p in where.iterdir()) == [
        *("decode.engine", "engine.json", "extend.engine", "prefill.engine", "vision.engine")
    ]
    assert [p.name for p in (folder / "engines").iterdir()] == [where.name]
    engines = EngineSet.read(where)
    assert (engines.gpu, engines.sms) == (None, (86, 89))
    assert engines.options == ("--batch", "2", "--max-prompt", "100")
    assert engines.graphs["prefill"].profile["sequence"].max == 100
    made = {graph: (where / f"{graph}.engine").read_bytes() for graph in engines.graphs}
    assert [graph for graph, data in made.items() if b"best.lowest" in data] == ["decode"]
    assert read_bundle(folder).files["decode.trt-rtx.onnx"]

    assert "exists; give --force" in run(*argv)[2]
    (where / "stale").touch()
    assert run(*argv, "--force")[0] == 0
    assert not (where / "stale").exists()
    assert [p.name for p in (folder / "engines").iterdir()] == [where.name]


@pytest.mark.parametrize("target", ["ort-cuda", "ort-tensorrt"])
def test_onnx_runtime_builds_nothing(target: str, folder: Path, run: Any) -> None:
    code, out, _ = run(folder, "--target", target)
    assert code == 0
    assert f"ONNX Runtime builds nothing beforehand; written: vision.{target}.onnx" in out
    assert "there already" in run(folder, "--target", target)[1]
    assert not (folder / "engines").exists()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--target", "trt-rxt"), "unknown target 'trt-rxt'; did you mean trt-rtx"),
        ((), "give --target, one of jetson-jp72, jetson-orin-jp62"),
        (("--target", "trt-rtx", "--sm", "75"), "--sm 75 is for --target trt-rtx-turing"),
        (("--target", "trt-rtx", "--sm", "90"), "unknown architecture '90'"),
        (("--target", "trt-rtx", "--batch", "8..1"), "--batch 8..1: give LOW..HIGH"),
        (("--target", "trt-rtx", "--max-prompt", "9999"), "room for"),
        (("--target", "trt-rtx", "--workspace", "much"), "give a size as 4GB"),
        (("--target", "trt-rtx", "--workspace", "4"), "--workspace 4 is 4 bytes; give a size as"),
        (("--target", "trt-rtx", "--plugins", "x.so"), "TensorRT-RTX runs no plugins"),
        (("--target", "trt-rtx", "--hardware-compatible"), "name the GPUs with --sm instead"),
        (("--target", "trt-rtx", "--timing-cache", "x"), "measures nothing while it builds"),
        (("--target", "trt-rtx", "--version-compatible"), "for one version"),
        (("--target", "trt-11", "--sm", "89"), "builds for the GPU it runs on"),
        (("--target", "ort-cuda", "--batch", "2"), "only lowered, nothing is built"),
        (("--target", "trt-11-portable", "--plugins", "x.so"), "does without plugins"),
        (("--target", "jetson-orin-jp62"), "needs the plugin library; lvlm-build plugins makes"),
        (("--target", "trt-11", "--plugins", "/no.so"), "library /no.so does not exist"),
        (
            ("--target", "jetson-orin-jp62", "--hardware-compatible", "--plugins", "x.so"),
            "no such thing on a Jetson",
        ),
        (("--target", "trt-rtx", "--weight", "inputs"), "did you mean --weights"),
        (("--target", "trt-rtx", "-o", "/tmp"), "exists; give --force"),
        (("--target", "trt-rtx", "-o", "/tmp", "--force"), "/tmp is no folder of engines"),
    ],
)
def test_mistakes_are_one_line(
    flags: tuple[str, ...],
    why: str,
    folder: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LVLM_PLUGINS", raising=False)
    assert why in refused(folder, *flags)


def test_what_is_no_bundle(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "is not a bundle" in refused(tmp_path, "--target", "trt-rtx")
    assert "which bundle?" in refused("--target", "trt-rtx")


def test_a_bundle_of_a_type_that_turing_lacks(
    bundle: Callable[..., Path], refused: Callable[..., str]
) -> None:
    wide = bundle("llava:llama-mha-bias-rope3-siglip", max_images=2)
    err = refused(wide, "--target", "trt-rtx-turing")
    assert "computes in float16 only, this bundle is in float32; export it with --dtype" in err


def test_too_little_workspace(folder: Path, refused: Callable[..., str]) -> None:
    err = refused(folder, "--target", "trt-rtx", "--sm", "86", "--workspace", "1KB")
    assert "no way to compute it within --workspace 1.0 kB; give more, or lower --batch" in err


def test_ctrl_c_stops_the_builder(folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its next step, wherever the signal comes: no later graph is begun."""
    from lvlm.core.progress import Stage

    show = Stage.show
    steps: list[str] = []

    def interrupt(self: Stage, text: str, *, final: bool = False) -> None:
        if "of" in text and "(" in text:  # what the builder is doing
            steps.append(text)
            if len(steps) == 1:
                signal.raise_signal(signal.SIGINT)
        show(self, text, final=final)

    monkeypatch.setattr(Stage, "show", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    try:
        code, _, err = run(folder, "--target", "trt-rtx", "--sm", "86")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert len(steps) < 20  # of 543 and more
    assert "build prefill" not in err
    assert "Traceback" not in err
    assert not list(folder.glob("engines/*"))


def test_a_builder_that_crashes(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says so in one line, and what it had begun is gone."""

    def crash(program: str, work: Callable[..., None], plan: EnginePlan, quiet: bool) -> int:
        del program, work, quiet
        plan.folder.parent.mkdir()
        plan.folder.with_name(f".{plan.folder.name}.partial-0").mkdir()
        raise BuildError("signal 11 (Segmentation fault) ended it")

    monkeypatch.setattr(own_process, "in_own_process", crash)
    err = refused(folder, "--target", "trt-rtx", "--sm", "86")
    assert f"TensorRT-RTX {rtx.__version__} crashed while it built an engine: signal 11" in err
    assert not list(folder.glob("engines/.*"))


def test_engines_are_built_in_a_process_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert main(["engine", str(folder), "--target", "trt-rtx", "--sm", "86", "-q"]) == 0
    (made,) = (folder / "engines").iterdir()
    assert (made / "decode.engine").stat().st_size > 0


@pytest.mark.parametrize("target", ["jetson-orin-jp62", "jetson-jp72", "trt-10"])
def test_a_plan_for_a_machine_that_is_elsewhere(
    target: str, folder: Path, run: Any, refused: Callable[..., str], monkeypatch: Any
) -> None:
    """With neither TensorRT nor plugins nor a GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delenv("LVLM_PLUGINS", raising=False)
    before = sorted(folder.iterdir())
    code, out, err = run(folder, "--target", target, "--batch", "1..2", "--dry-run")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    known = discover("lvlm.export.targets", "TARGET")[target]
    version, sms = ".".join(map(str, known.version)), ", ".join(f"sm_{n}" for n in known.sms)
    assert lines["target"].endswith(f"TensorRT {version}, {sms or 'any GPU'}")
    assert f"{known.platform}; not here: target {target} needs the plugin lib" in lines["elsewhere"]
    manifest = read_bundle(folder)
    each = cache_bytes(manifest, 1, static_capacity(manifest).per_layer)
    assert f"{size(each)} a prompt, {size(2 * each)} for 2" in lines["cache"]
    assert "GPU's memory when they run" in lines["in"]
    assert sorted(folder.iterdir()) == before
    err = refused(folder, "--target", target, "--dry-run", "--plugins", "/no.so")
    assert "library /no.so does not exist" in err
    assert "needs the plugin library" in refused(folder, "--target", target)  # to build it


def test_a_device_with_too_little_memory(folder: Path, refused: Callable[..., str]) -> None:
    """How much is missing, and what would fit; each in its turn."""
    argv = (folder, "--target", "trt-rtx", "--dry-run", "--batch", "1..4")
    needs = make_plan(BuildRequest(folder, trt_rtx.TARGET, batch="1..4"), dry_run=True).memory
    assert needs.weights >= sum(w.bytes for w in read_bundle(folder).weights.values())
    err = refused(*argv, "--memory", str(needs.weights + needs.cache - 1000))
    missing = f"1.0 kB too little for weights ({size(needs.weights)}) and the cache"
    assert missing in err
    assert "give --batch 1..3" in err
    err = refused(*argv, "--memory", str(needs.weights + needs.prompt // 2))
    (text,) = re.findall(r"again with --max-text-len (\d+) and build with --batch 1\.\.1", err)
    manifest = read_bundle(folder)

    def taken(length: int) -> int:
        shorter = slot_capacity(manifest, length, None, None, None)
        slots = static_capacity(dataclasses.replace(manifest, capacity=shorter)).per_layer
        return cache_bytes(manifest, 1, slots)

    assert taken(int(text)) <= needs.prompt // 2 < taken(int(text) + 16)
    assert "take a smaller model" in refused(*argv, "--memory", str(needs.weights - 1))
    assert needs.int4 is not None
    assert needs.shared // 5 < needs.int4  # of this model most is the embedding, and its head
    needs = dataclasses.replace(needs, int4=needs.weights // 2)
    manifest, short = read_bundle(folder), dataclasses.replace(needs, prompt=1)
    what = f"export with --weights int4 .*, whose weights take about {size(needs.int4)}$"
    with pytest.raises(BuildError, match=what):
        check_memory(manifest, short, needs.weights - 1, "a device", int4=True)
    with pytest.raises(BuildError, match="take a smaller model"):
        check_memory(manifest, short, needs.int4 - 1, "a device", int4=True)
    assert "--memory much: give a size as 4GB" in refused(*argv, "--memory", "much")


def test_missing_package(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    err = refused(folder, "--target", "trt-11-portable")
    assert "TensorRT is missing" in err
    assert install("tensorrt") in err


def test_a_jetson_without_torch_takes_what_was_exported_for_it(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowered_graphs, "find_spec", lambda name: None if name == "torch" else 1)
    err = refused(folder, "--target", "trt-rtx", "--sm", "86")
    assert "has no graphs for trt-rtx" in err
    assert f"torch; {install('export')}, or export it with --target trt-rtx" in err


@pytest.mark.parametrize("target", ["trt-rtx", "ort-cuda", "openvino"])
def test_a_dry_run_refuses_what_lowering_does(
    target: str, bundle: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Blocks of int8, whose scales only the data shows, in the line that a build ends with."""
    original = bundle(SMALL, max_images=2, weights="int8", block_size=16)
    folder = Path(shutil.copytree(original, tmp_path / "bundle"))
    before = sorted(folder.iterdir())
    with pytest.raises(ExportError) as lowering:
        lower_bundle(folder, read_bundle(folder), TARGETS[target], Progress(0, quiet=True))
    for argv in (("--dry-run",), ()):
        assert str(lowering.value) in refused(folder, "--target", target, *argv)
    assert sorted(folder.iterdir()) == before


def test_a_dry_run_says_that_graphs_cannot_be_lowered_here(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowered_graphs, "find_spec", lambda name: None if name == "torch" else 1)
    code, out, _ = run(folder, "--target", "trt-rtx", "--dry-run")
    assert code == 0
    assert f"not here: {folder} has no graphs for trt-rtx" in out


def test_a_changed_lowered_graph_is_noticed(folder: Path, refused: Callable[..., str]) -> None:
    manifest = read_bundle(folder)
    graphs = {name: graph.file for name, graph in manifest.graphs.items()}
    for name in trt_rtx.TARGET.write(folder, graphs, static_capacity(manifest)):
        data = json.loads((folder / "lvlm.json").read_text())
        data["files"][name] = {"sha256": "0" * 64, "bytes": (folder / name).stat().st_size}
        (folder / "lvlm.json").write_text(json.dumps(data))
    assert "has changed since its export" in refused(folder, "--target", "trt-rtx")


def test_lowering_that_is_cut_short_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(__file__).parents[2] / "data/bundles/schema-3.zip"
    with zipfile.ZipFile(data) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "s3"
    before = sorted(path.name for path in folder.iterdir())

    def stop(path: Path) -> None:
        assert path.is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(lowered_graphs, "describe", stop)
    assert main(["engine", str(folder), "--target", "openvino", "-q"]) == 130
    assert sorted(path.name for path in folder.iterdir()) == before
    monkeypatch.undo()
    assert main(["engine", str(folder), "--target", "openvino", "-q"]) == 0
    read_bundle(folder, "full")

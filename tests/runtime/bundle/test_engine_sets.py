"""engine.json: read and checked against the machine, each difference in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lvlm.core.errors import BackendError
from lvlm.core.integrity import File
from lvlm.runtime.bundle.engine_sets import (
    SCHEMA,
    EngineGraph,
    EngineSet,
    EngineWeight,
    PluginLibrary,
    Range,
)

ENGINE = b"an engine"
BUNDLE = {"decode.onnx": "1" * 64, "weights.bin": "2" * 64}
MANIFEST: Any = SimpleNamespace(files={name: File(sha, 100) for name, sha in BUNDLE.items()})
HERE: dict[str, Any] = {
    "gpu_sm": 87,
    "gpu_name": "Orin",
    "version": "10.3.0",
    "plugin_hash": "3" * 64,
    "manifest": MANIFEST,
}


@pytest.fixture
def engines(tmp_path: Path) -> EngineSet:
    folder = tmp_path / "out" / "engines" / "orin-tensorrt-10.3.0"
    folder.mkdir(parents=True)
    (folder / "decode.engine").write_bytes(ENGINE)
    weight = EngineWeight("w", "weights.bin", 0, 100, "float16", (5, 10))
    made = EngineSet(
        folder=folder,
        schema=SCHEMA,
        target="jetson-orin-jp62",
        flavour="tensorrt",
        version="10.3.0",
        gpu="Orin",
        sms=(87,),
        hardware_compatible=False,
        version_compatible=False,
        plugins=PluginLibrary("liblvlm_plugins.so", "3" * 64),
        bundle=BUNDLE,
        options=("--batch", "1..8"),
        graphs={
            "decode": EngineGraph(
                file="decode.engine",
                sha256=hashlib.sha256(ENGINE).hexdigest(),
                bytes=len(ENGINE),
                source="decode.jetson-orin-jp62.onnx",
                profile={"batch": Range(1, 1, 8)},
                weights=(weight,),
            )
        },
    )
    made.write()
    return made


def test_what_was_written_is_read(engines: EngineSet) -> None:
    assert EngineSet.read(engines.folder) == engines
    bundle = engines.folder.parents[1]
    assert EngineSet.find(bundle, "tensorrt") == [engines]
    engines.check(**HERE)
    with pytest.raises(
        BackendError, match="no engines for tensorrt-rtx; build them with lvlm-buil"
    ):
        EngineSet.find(bundle, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("here", "why"),
    [
        ({"gpu_sm": 110, "gpu_name": "Thor"}, r"for sm_87 \(Orin\), this GPU is sm_110 \(Thor\)"),
        ({"gpu_name": "Orin Nano"}, "were built on Orin, this GPU is Orin Nano"),
        ({"version": "10.3.1"}, "are of tensorrt 10.3.0, here is 10.3.1"),
        (
            {"plugin_hash": None},
            r"need the plugin library liblvlm_plugins\.so, which is not loaded",
        ),
        ({"plugin_hash": "4" * 64}, "of hash 333333333333, the one loaded has 444444444444"),
        (
            {"manifest": SimpleNamespace(files={**MANIFEST.files, "weights.bin": File("5", 1)})},
            r"from another export \(weights\.bin differs\)",
        ),
        ({"manifest": SimpleNamespace(files={})}, r"another export \(decode\.onnx differs\)"),
    ],
)
def test_differences_name_both_sides_and_the_mend(
    here: dict[str, Any], why: str, engines: EngineSet
) -> None:
    with pytest.raises(BackendError, match=why) as caught:
        engines.check(**(HERE | here))
    message = str(caught.value)
    assert "\n" not in message
    bundle = engines.folder.parents[1]
    command = f"lvlm-build engine {bundle} --target jetson-orin-jp62 --batch 1..8 --force"
    assert message.endswith(f"; rebuild them: {command}")


def test_several_differences_are_all_named(engines: EngineSet) -> None:
    with pytest.raises(BackendError, match=r"sm_110 \(Thor\), they are of .* 10\.13, they need"):
        engines.check(
            **(HERE | {"gpu_sm": 110, "gpu_name": "Thor", "version": "10.13", "plugin_hash": None})
        )


def test_engines_built_ahead_name_the_missing_architecture(engines: EngineSet) -> None:
    ahead = dataclasses.replace(engines, gpu=None, sms=(86, 89), plugins=None)
    ahead.check(**(HERE | {"gpu_sm": 89, "gpu_name": "any"}))
    with pytest.raises(BackendError, match=r"for sm_86, sm_89, this .* --sm 86,87,89 --force$"):
        ahead.check(**HERE)


def test_compatible_engines(engines: EngineSet) -> None:
    later = dataclasses.replace(engines, version_compatible=True)
    later.check(**(HERE | {"version": "10.14.1"}))
    for version in ("10.2.0", "11.0.0"):
        with pytest.raises(BackendError, match=f"here is {version}"):
            later.check(**(HERE | {"version": version}))
    newer = dataclasses.replace(engines, hardware_compatible=True, sms=(86,), gpu="A10")
    newer.check(**(HERE | {"gpu_sm": 120, "gpu_name": "RTX 5090"}))
    with pytest.raises(BackendError, match="this GPU is sm_75"):
        newer.check(**(HERE | {"gpu_sm": 75, "gpu_name": "T4"}))


def test_weights_must_be_of_the_bundle(engines: EngineSet) -> None:
    graph = engines.graphs["decode"]
    stray = dataclasses.replace(graph.weights[0], file="/etc/passwd")
    graphs = {"decode": dataclasses.replace(graph, weights=(stray,))}
    with pytest.raises(BackendError, match="the weight w lies in /etc/passwd, not in the bundle"):
        dataclasses.replace(engines, graphs=graphs).check(**HERE)


def test_files_that_changed(engines: EngineSet) -> None:
    path = engines.folder / "decode.engine"
    path.write_bytes(b"another!!")
    with pytest.raises(BackendError, match=r"has changed since it was built; rebuild them: "):
        EngineSet.read(engines.folder)
    assert EngineSet.read(engines.folder, verify="none") == engines
    path.unlink()
    with pytest.raises(BackendError, match=r"lacks the file decode\.engine; rebuild them"):
        EngineSet.read(engines.folder, verify="none")


def test_engines_of_the_schema_before_are_read(engines: EngineSet) -> None:
    path = engines.folder / "engine.json"
    data = json.loads(path.read_text())
    data["schema"] = 1
    data["graphs"]["decode"]["profile"]["batch"] = {"least": 1, "usual": 1, "most": 8}
    path.write_text(json.dumps(data))
    assert EngineSet.read(engines.folder) == engines


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": 9}, "has schema 9, this version reads 2; build these engines again"),
        ({"sms": "87"}, r"engine\.json\.sms holds '87', which does not fit; build these"),
        ({"odd": 1}, "unknown field 'odd'; build these engines again"),
        ({"graphs": {"decode": {}}}, "missing field"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_description(change: Any, why: str, engines: EngineSet) -> None:
    path = engines.folder / "engine.json"
    data = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps(data | change))
    with pytest.raises(BackendError, match=why):
        EngineSet.read(engines.folder)
    with pytest.raises(BackendError, match=why):
        EngineSet.find(engines.folder.parents[1], "tensorrt")

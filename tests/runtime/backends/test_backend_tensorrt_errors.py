"""What the TensorRT backends refuse, each in one line that says how to mend it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from fake_engines import Make, build_engines, one_line
from fake_tensorrt import VERSION, FakeTensorRt
from settings import ASSETS

import lvlm
from lvlm.core.errors import BackendError, CapacityError, DeviceMemoryError
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.run_cli import main

pytestmark = pytest.mark.usefixtures("trt")

SAMPLES = [ASSETS / f"samples/digits-{i}.png" for i in (1, 2)]


# What does not fit


def load_error(folder: Path, device: str = "tensorrt-rtx") -> str:
    with pytest.raises(BackendError) as caught:
        lvlm.load(folder, device=device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_requests_beyond_the_profiles(built: Make) -> None:
    folder = built(batch=2, max_prompt=200)
    with lvlm.load(folder, device="tensorrt-rtx") as model:
        with pytest.raises(CapacityError, match=r"takes 1 to 2 prompts at once .* has 3.* --batch"):
            model.generate(["Hi"] * 3)
        with pytest.raises(
            CapacityError, match=r"takes 1 to 200 tokens of a prompt .*fewer.* --max-prompt"
        ):
            model.generate("Hi", SAMPLES)
        assert model.generate("Hi", max_new_tokens=2).token_ids  # still usable


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sms": (75, 120)}, "sm_75, sm_120, this GPU is sm_89 (Fake RTX)"),
        ({"version": "1.6.0"}, f"of tensorrt-rtx 1.6.0, here is {VERSION}"),
        ({"bundle": {"weights.bin": "0" * 64}}, "another export (weights.bin differs)"),
        ({"graphs": {}}, "has no vision engine"),
    ],
    ids=["gpu", "version", "bundle", "graphs"],
)
def test_engines_that_do_not_fit(built: Make, changes: dict[str, Any], said: str) -> None:
    folder = built(**changes)
    error = load_error(folder)
    assert said in error
    assert f"lvlm-build engine {folder} --target trt-rtx" in error


def test_the_set_that_fits_is_taken(built: Make, bundle: Make, tmp_path: Path) -> None:
    folder = built(sms=(120,))
    build_engines(bundle("digits-llava", "none", max_images=2), tmp_path / "other")
    (tmp_path / "other/engines/sm89-fake").rename(folder / "engines/other")
    with lvlm.load(folder, device="tensorrt-rtx") as model:
        assert model.generate("Hi", max_new_tokens=2).token_ids


def test_engine_files_that_are_not_whole(built: Make) -> None:
    folder = built()
    file = folder / "engines/sm89-fake/decode.engine"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "decode.engine" in load_error(folder)
    file.write_bytes(whole.replace(b"decode", b"prefil"))
    assert "has changed since it was built" in load_error(folder)
    file.unlink()
    assert "lacks the file decode.engine" in load_error(folder)


def test_an_engine_that_tensorrt_refuses(built: Make, trt: FakeTensorRt) -> None:
    folder = built()
    trt.refuses = "Serialization (magic tag\n does not match)"
    error = load_error(folder)
    assert "cannot load" in error
    assert "Serialization (magic tag does not match); build the engines again" in error
    trt.refuses = "Cuda Runtime (out of memory)"
    assert "of GPU memory, 1,048,576 MiB are free; close what else" in load_error(folder)
    trt.refuses, trt.no_context = "", True
    assert "because the GPU is out of memory" in load_error(folder)


def test_weights_that_are_not_where_they_should_be(built: Make) -> None:
    folder = built(weights="inputs")
    path = folder / "engines/sm89-fake/engine.json"
    text = path.read_text()
    for place, wrong in (
        (r'"offset": \d+', '"offset": -64'),
        (r'"offset": \d+', '"offset": 99999999'),
        (r'"dims": \[', '"dims": [2, '),
    ):
        path.write_text(re.sub(place, wrong, text))
        assert "where engine.json says; build the engines again" in load_error(folder)


def test_a_bundle_without_engines(bundle: Make) -> None:
    folder = bundle("digits-llava", "none", max_images=2)
    assert f"has no engines for tensorrt-rtx; build them with lvlm-build engine {folder}" in (
        load_error(folder)
    )


# Plugins: full TensorRT


def test_full_tensorrt_loads_the_plugins_first(
    built: Make, full: FakeTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(flavour="tensorrt", plugins="the plugins", version_compatible=True)
    beside = folder / "engines/sm89-fake/liblvlm_plugins.so"
    with lvlm.load(folder, device="tensorrt") as model:
        assert full.libraries == [str(beside)]
        assert model.generate("Hi", max_new_tokens=6).token_ids
        assert model.graphs.backend.runtime.engine_host_code_allowed  # type: ignore[attr-defined]
    elsewhere = tmp_path / "plugins.so"
    beside.rename(elsewhere)
    assert "plugin library" in (error := load_error(folder, "tensorrt"))
    assert "set LVLM_PLUGINS to where it is" in error
    monkeypatch.setenv("LVLM_PLUGINS", str(elsewhere))
    with lvlm.load(folder, device="tensorrt"):
        assert full.libraries[-1] == str(elsewhere)
    full.broken_library = True
    assert "cannot load the plugins of" in load_error(folder, "tensorrt")
    elsewhere.write_text("another build")
    assert "the plugin library of hash" in load_error(folder, "tensorrt")
    monkeypatch.setenv("LVLM_PLUGINS", str(tmp_path / "none.so"))
    assert "none.so is not there; as LVLM_PLUGINS says" in load_error(folder, "tensorrt")


# Memory


def test_no_room_for_the_cache(built: Make, driver: FakeDriver) -> None:
    """The whole cache is told, not the buffer that was one too many."""
    with lvlm.load(built(), device="tensorrt-rtx") as model:
        whole = 2 * sum(static_capacity(model.manifest).per_layer) * 2 * 32 * 4
        driver.room = sum(b.nbytes for b in driver.blocks.values()) + whole // 2
        with pytest.raises(
            DeviceMemoryError,
            match=rf"cache \(batch of 1\) needs {whole:,} bytes .*, {whole // 2:,} are free; ask "
            r"for fewer prompts \(slots\) or new tokens at once, or export with a "
            "smaller --max-text-len",
        ):
            model.generate("Hi")
        driver.room = 1 << 40
        assert model.generate("Hi", max_new_tokens=2).token_ids


def test_no_room_for_the_computation(built: Make, driver: FakeDriver) -> None:
    with lvlm.load(built(), device="tensorrt-rtx") as model:
        model.generate("Hi", max_new_tokens=2)
        driver.room = sum(b.nbytes for b in driver.blocks.values()) + 1000
        with pytest.raises(DeviceMemoryError, match=r"MiB of GPU memory, .* are free; give fewer"):
            model.generate("Hi", SAMPLES)


def test_no_room_for_the_model(
    built: Make, driver: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = built(weights="inputs")
    driver.room = 1 << 20
    assert main([str(folder), "Hi", "--device", "tensorrt-rtx"]) == 2
    error = one_line(capsys.readouterr().err)
    assert "the model needs" in error
    assert "1 MiB are free; close what else uses the GPU" in error

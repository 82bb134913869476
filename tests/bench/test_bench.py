"""lvlm-bench as a user meets it: real runs in child processes, files, mistakes, failures."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from example_counts import whole
from PIL import Image
from settings import ASSETS, LIGHTVLM

from lvlm.bench import machine
from lvlm.bench.bench_cli import main
from lvlm.bench.contenders import BenchError, peers
from lvlm.bench.process import Child
from lvlm.core.installing import install
from lvlm.runtime.bundle.manifest import MANIFEST

SMALL = ("--threads", 1, "--prompt-tokens", 24, "--new-tokens", 6)


@pytest.fixture(autouse=True)
def little_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory, to find its bandwidth: that there is one is all that a test asks."""
    monkeypatch.setattr(machine, "read_bandwidth", partial(machine.read_bandwidth, size=1 << 24))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


@pytest.fixture(scope="module")
def full(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", max_images=2)


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", *LIGHTVLM, max_images=2)


@pytest.fixture
def broken(full: Path, tmp_path: Path) -> Path:
    """A bundle that is complete by its list, but whose decode graph is no graph."""
    folder = shutil.copytree(full, tmp_path / "broken")
    (folder / "decode.onnx").write_bytes(b"no graph")
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = hashlib.sha256(b"no graph").hexdigest()
    manifest["files"]["decode.onnx"] = {"sha256": digest, "bytes": 8}
    manifest["graphs"]["decode"]["lowered"] = {}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_two_bundles_beside_transformers(
    run: Run, full: Path, light: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """In a normal run two bundles: transformers takes as long as both, to be imported."""
    theirs = ["--against", "transformers", "--checkpoint", ASSETS / "digits-llava"]
    against = theirs if pytestconfig.getoption("--whole") else []
    data, plot = tmp_path / "out.json", tmp_path / "out.png"
    code, out, err = run(
        *(full, f"{light}:keep=0.35", *against, "--repeats", 1, *SMALL),
        *("--warmup", 0),
        *("--json", data, "--plot", plot),
    )
    assert code == 0, err
    table = rows(out)
    assert table[0][:3] == ["contender", "TTFT ms", "ITL ms p50"]
    assert [row[0] for row in table[2:]] == [full.name, f"{light.name} keep=0.35", *against[1:2]]
    assert "24 text tokens and 1 image (168 tokens in all), 6 new tokens, single stream" in out
    assert "prompts were not equally long" not in out
    assert Image.open(plot).width > 1000

    found = json.loads(data.read_text())
    assert found["command"].startswith(f"lvlm-bench {full} ")
    assert found["machine"]["threads"] == 1
    assert found["machine"]["read_bytes_per_s"] > 0
    none, merged, *eager = found["results"]
    for result in (none, merged, *eager):
        assert [len(r["records"]) for r in result["rounds"]] == [1]
        assert {len(r["records"][0]["tokens"]) for r in result["rounds"]} == {6}
        figures = result["figures"]
        assert 0 < figures["itl_p50_ms"] <= figures["itl_p95_ms"] <= figures["itl_p99_ms"]
        assert figures["ttft_ms"]["low"] <= figures["ttft_ms"]["high"]
        assert figures["prompt_tokens"] == 168
    assert none["bandwidth_share"] > 0
    assert all(one["bandwidth_share"] is None for one in eager)
    assert merged["figures"]["cache_bytes"] <= none["figures"]["cache_bytes"]
    # Processes of their own: what torch takes is in none but its own
    for one in eager:
        assert none["figures"]["peak_bytes"] < one["figures"]["peak_bytes"] / 2


def test_under_load(run: Run, full: Path, tmp_path: Path) -> None:
    data, plot = tmp_path / "out.json", tmp_path / "out.svg"
    code, out, err = run(
        *(full, "--concurrency", "1,2", "--requests", 3, "--warmup", 0, *SMALL),
        *("--json", data, "--plot", plot),
    )
    assert code == 0, err
    assert rows(out)[0][-4:] == ["tokens/s", "requests/s", "peak MB", "cache MB"]
    assert "1 at a time, 3 requests" in out
    assert "2 at a time, 3 requests" in out
    assert "<svg" in plot.read_text()
    for result in json.loads(data.read_text())["results"]:
        assert [len(r["records"]) for r in result["rounds"]] == [3]
        assert result["facts"]["engine_memory"]["slots"] == 2


def test_arrivals_by_themselves(run: Run, full: Path, tmp_path: Path) -> None:
    data = tmp_path / "out.json"
    load = ("--rate", 20, "--duration", 0.3, "--images", 0, "--warmup", 0, "--seed", 5)
    code, out, err = run(full, *SMALL, *load, "--memory-budget", "1GB", "--json", data, "-q")
    assert (code, out, err) == (0, "", "")
    (result,) = json.loads(data.read_text())["results"]
    planned = result["facts"]["engine_memory"]
    assert planned["slots"] > 4
    slots = planned["slots"] * planned["slot"]
    assert 0.9e9 < slots + planned["weights"] + planned["workspace"] + planned["images"] <= 1e9
    records = result["rounds"][0]["records"]
    assert all(0 < r["arrival"] < 0.3 for r in records)
    assert result["figures"]["prompt_tokens"] == 24


@pytest.mark.parametrize("apart", [(), ("--apart",)][0 if whole() else 1 :])
def test_one_that_fails_is_a_line(run: Run, full: Path, broken: Path, apart: tuple[str]) -> None:
    code, out, err = run(broken, full, "--repeats", 1, "--warmup", 0, *SMALL, *apart)
    assert code == 2
    table = {row[0]: row for row in rows(out)}
    assert table["broken"][1:3] == ["failed, see below", "—"]
    assert float(table[full.name][1]) > 0
    assert "\n- broken: " in out
    (line,) = [x for x in err.splitlines() if x.startswith("lvlm-bench: error: ")]
    assert "decode.onnx" in line


def test_a_child_that_is_killed(tmp_path: Path) -> None:
    with Child("mine", tmp_path / "log", threads=1) as child:
        child._process.kill()
        with pytest.raises(
            BenchError, match=r"mine: its process was ended by SIGKILL, as when mem"
        ):
            child._ask({"do": "round"})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "what to measure?"),
        (("BUNDLE:keep",), "write keep=VALUE"),
        (("BUNDLE:kep=1",), "unknown setting of a bundle 'kep'; did you mean keep or kv-keep?"),
        (("BUNDLE:keep=0.5",), "recipe none takes no keep"),
        (("BUNDLE", "BUNDLE"), "two contenders are called"),
        (("BUNDLE:device=gpu",), "unknown device 'gpu'"),
        (("nowhere",), "nowhere does not exist"),
        (("BUNDLE", "--against", "tensorflow"), "unknown peer 'tensorflow'"),
        (("BUNDLE", "--against", "transformers:f32"), "transformers takes no settings"),
        (("BUNDLE", "--requests", "3"), "--requests has no effect without --concurrency"),
        (("BUNDLE", "--duration", "3"), "--duration has no effect without --rate"),
        (("BUNDLE", "--rate", "1", "--concurrency", "2"), "two kinds of load"),
        (("BUNDLE", "--memory-budget", "2GB"), "decides how many slots there are under load"),
        (("BUNDLE", "--memory-budget", "much", "--rate", "1"), "give a size as 2GB"),
        (("BUNDLE", "--rate", "-1"), "must be above 0"),
        (("BUNDLE", "--rate", "1e-9"), "brings no request within 30 s"),
        (("BUNDLE", "--new-tokens", "0"), "--new-tokens is 0; give 1 or more"),
        (("BUNDLE", "--new-tokens", "9000"), "export with --max-text-len 9032"),
        (("BUNDLE", "--images", "9"), "export with --max-images 9"),
        (("BUNDLE", "--prompt-tokens", "3"), "the chat template and one word take"),
        (("BUNDLE", "--prompt-tokens", "a"), "'a' is not a list like 1,4,16"),
        (("BUNDLE", "--checkpoint", "x"), "--checkpoint is for --against"),
        (("BUNDLE", "--plot", "x.pdf"), "name a file ending in .png or .svg"),
        (("BUNDLE", "--json", "no/where.json"), "no does not exist; make it first"),
        (("BUNDLE", "-q"), "-q prints no table"),
        (("BUNDLE", "--against", "transformers", "--checkpoint", "."), "no config.json in it"),
    ],
)
def test_mistakes(run: Run, full: Path, argv: tuple[str, ...], message: str) -> None:
    code, out, err = run(*(a.replace("BUNDLE", str(full)) for a in argv))
    assert (code, out) == (2, "")
    assert err.startswith("lvlm-bench: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_bundles_of_two_models(run: Run, full: Path, tmp_path: Path) -> None:
    other = shutil.copytree(full, tmp_path / "other")
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["text"]["eos_ids"].append(7)
    (other / MANIFEST).write_text(json.dumps(manifest))
    code, _, err = run(full, other)
    assert code == 2
    assert "compare bundles of one checkpoint" in err


def test_a_checkpoint_must_be_the_bundles(
    run: Run, full: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoint("digits-llava"), tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    code, _, err = run(full, "--against", "transformers", "--checkpoint", other)
    assert code == 2
    assert "another tokenizer.json" in err


@pytest.mark.parametrize("name", sorted(peers()))
def test_a_peer_that_is_not_installed(run: Run, full: Path, name: str) -> None:
    if all(importlib.util.find_spec(module) for module in peers()[name].modules):
        pytest.skip(f"{name} is installed")
    code, _, err = run(full, "--against", name)
    assert code == 2
    assert f"not installed; {install('bench', 'export')}" in err


def test_a_converter_that_is_not_installed(
    run: Run, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer: Any = peers()["openvino-genai"]
    monkeypatch.setattr(type(peer), "modules", ())
    given = (full, "--against", peer.name, "--cache", tmp_path)
    given += ("--checkpoint", ASSETS / "digits-llava")
    code, _, err = run(*given, "--converter-python", f"{peer.name}={tmp_path / 'python'}")
    assert code == 2
    assert "does not start: No such file" in err
    if importlib.util.find_spec("optimum") is None:
        code, _, err = run(*given)
        assert code == 2
        assert "its converter (optimum.intel, " in err
        assert "python -m venv conv" in err


def test_onnxruntime_genai(run: Run, full: Path, tmp_path: Path) -> None:
    """Converted once, then found again."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    argv = (full, "--against", "onnxruntime-genai", "--cache", tmp_path, "--repeats", 1, *SMALL)
    for conversions in (1, 0):
        code, out, err = run(*argv)
        assert code == 0, err
        assert err.count("convert the checkpoint") == conversions
        assert "onnxruntime-genai (text only)" in out
        assert "prompts were not equally long" not in out

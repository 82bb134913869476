"""What the doctor says of machines that this one is not, with a driver and packages put in."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lvlm.core.errors import BackendError
from lvlm.core.installing import install
from lvlm.core.nvidia import Gpu, NvidiaDriver, driver
from lvlm.core.progress import size
from lvlm.runtime.backends.ort.kernels.kernel_library import Found
from lvlm.runtime.bundle.engine_sets import EngineSet
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.tools import doctor, doctor_cli
from lvlm.runtime.tools.doctor import examine
from lvlm.runtime.tools.engine_memory import engine_memory
from lvlm.runtime.tools.findings import ABSENT, Finding, Machine, as_json, can_run

ORIN = Gpu("Orin", 87, 8_000_000_000, True)
MODERN = NvidiaDriver((13, 0), (ORIN,))
PLUGINS = SimpleNamespace(getCreators=None)
KERNELS = Found(Path("liblvlm_kernels.so"), "AVX2")
PROVIDERS = "TensorrtExecutionProvider CUDAExecutionProvider CPUExecutionProvider"


def machine(
    seen: NvidiaDriver | str = MODERN,
    packages: Mapping[str, str] = {"onnxruntime-gpu": "1.31.1"},
    imports: Mapping[str, str] = {
        "onnxruntime": PROVIDERS,
        "tensorrt": "10.3.0",
        "openvino": "2026.4.1",
    },
    library: Any = PLUGINS,
    kernels: Found = KERNELS,
) -> Machine:
    """``imports``: what a try of a module prints; what is not named cannot be imported."""

    def ask() -> NvidiaDriver:
        if isinstance(seen, str):
            raise BackendError(seen)
        return seen

    def attempt(code: str) -> str:
        name = code.strip().removeprefix("try:").strip().removeprefix("import ")
        name = name.split(";")[0].split(".")[0].split("\n")[0]
        if name not in imports:
            raise BackendError(f"ModuleNotFoundError: No module named '{name}'")
        return imports[name]

    def load(path: str) -> Any:
        if library is None:
            raise OSError(f"{path}: no such file")
        return library

    return Machine(ask, packages.get, attempt, load, kernels=lambda: kernels)


def found(machine: Machine, bundle: Path | None = None) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(bundle, machine)}


def test_a_machine_with_everything() -> None:
    findings = examine(None, machine())
    bad = {f.subject for f in findings if not f.ok}
    assert bad == {"device tensorrt-rtx"}
    assert can_run(findings)
    gpu = next(f for f in findings if f.subject == "GPU 0")
    assert gpu.says == "Orin, SM 87, 8.0 GB, shared with the CPU"


@pytest.mark.parametrize(
    ("changes", "subject", "says", "fix"),
    [
        ({"seen": "no NVIDIA driver; install it"}, "NVIDIA driver", "no NVIDIA driver", "install"),
        ({"seen": "no NVIDIA driver; install it"}, "device cuda", "no GPU", "NVIDIA driver above"),
        ({"seen": NvidiaDriver((13, 0), ())}, "GPU", "sees none", "CUDA_VISIBLE_DEVICES"),
        (
            {"seen": NvidiaDriver((12, 6), (ORIN,))},
            "device cuda",
            "the driver serves 12.6",
            "newer",
        ),
        (
            {"imports": {"onnxruntime": "CPUExecutionProvider"}},
            "device cuda",
            "no CUDAExecutionProvider",
            install("cuda"),
        ),
        ({"imports": {}}, "device cpu", "onnxruntime is not installed", install("cpu")),
        ({"imports": {}}, "device tensorrt", "tensorrt is not installed", "[tensorrt]"),
        (
            {"packages": {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.1"}},
            "onnxruntime",
            "overwrite each other",
            "pip uninstall",
        ),
        ({"library": None}, "TensorRT plugins", "no such file", "lvlm-build plugins"),
        ({"library": SimpleNamespace()}, "TensorRT plugins", "holds no TensorRT", "lvlm-build"),
        (
            {"kernels": Found(None, why="not built", mend="lvlm-build cpu")},
            *("CPU kernels", "not built", "lvlm-build cpu"),
        ),
    ],
)
def test_what_is_wrong_and_how_to_mend_it(
    changes: dict[str, Any], subject: str, says: str, fix: str
) -> None:
    finding = found(machine(**changes))[subject]
    assert not finding.ok
    assert says in finding.says
    assert fix in finding.fix


def test_every_bad_finding_has_a_fix(bundle: Callable[..., Path]) -> None:
    for folder in (None, bundle("digits-llava", max_images=2)):
        for finding in examine(folder, machine("no driver; install one", {}, {}, None)):
            assert finding.ok or finding.fix, finding


def test_a_bundle(bundle: Callable[..., Path]) -> None:
    findings = found(machine(), bundle("digits-llava", max_images=2))
    assert findings["bundle"].ok
    assert findings["bundle on cpu"].ok
    assert findings["bundle on cuda"].ok
    assert "lvlm-build engine" in findings["bundle on tensorrt"].fix
    assert "vision.openvino.onnx is missing" in findings["bundle on openvino"].says
    assert findings["bundle on openvino"].fix.endswith("--target openvino")


FULL = {"flavour": "tensorrt", "plugins": "code", "sms": (87,), "gpu": "Orin"}


@pytest.mark.parametrize(
    ("engines", "says", "fix"),
    [
        ({}, "sm89-fake fits", ""),
        ({"version": "10.2.0"}, "of tensorrt 10.2.0, here is 10.3.0", "lvlm-build engine"),
        ({"sms": (86,), "gpu": "A10"}, "for sm_86 (A10), this GPU is sm_87 (Orin)", "--force"),
    ],
)
def test_engines(engines: dict[str, Any], says: str, fix: str, built: Callable[..., Path]) -> None:
    folder = built(**(FULL | {"version": "10.3.0"} | engines))
    finding = found(machine(), folder)["bundle on tensorrt"]
    assert finding.ok == (not fix)
    assert says in finding.says
    assert fix in finding.fix


@pytest.mark.parametrize("weights", ["embedded", "inputs"])
def test_what_engines_take_of_the_memory(weights: str, built: Callable[..., Path]) -> None:
    folder = built(**FULL, version="10.3.0", weights=weights, batch=3)
    (engines,), manifest = EngineSet.find(folder, "tensorrt"), read_bundle(folder)
    needs = engine_memory(engines, manifest)
    text, entries = manifest.text, sum(static_capacity(manifest).per_layer)
    assert needs.prompts == 3
    assert needs.cache == 3 * entries * 2 * text.kv_heads * text.head_dim * 4
    assert needs.engines == sum((engines.folder / g.file).stat().st_size
                                for g in engines.graphs.values())  # fmt: skip
    # Each once, whatever engines read it
    read = {w.name: w.bytes for g in engines.graphs.values() for w in g.weights}
    assert needs.shared == sum(read.values())
    assert (needs.shared > 10_000_000) == (weights == "inputs")
    assert (
        f"takes {size(needs.total)} of 8.0 GB"
        in found(machine(), folder)["bundle on tensorrt"].says
    )
    small = dataclasses.replace(ORIN, memory=needs.total - 1)
    finding = found(machine(NvidiaDriver((13, 0), (small,))), folder)["bundle on tensorrt"]
    assert not finding.ok
    assert "fits" not in finding.says
    assert "smaller --batch or --max-prompt" in finding.fix


def test_plugins_as_the_backend_takes_them(
    built: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's library comes before the one beside the engines."""
    folder = built(**FULL, version="10.3.0")
    other = tmp_path / "other.so"
    other.write_text("other code")
    monkeypatch.setenv("LVLM_PLUGINS", str(other))
    finding = found(machine(), folder)["bundle on tensorrt"]
    assert not finding.ok
    assert "they need the plugin library of hash" in finding.says


def test_nothing_can_run_it(bundle: Callable[..., Path]) -> None:
    findings = examine(
        bundle("digits-llava", max_images=2), machine("no driver; install one", {}, {}, None)
    )
    assert not can_run(findings)
    assert json.loads(as_json(findings))[0]["subject"] == "system"


def test_a_backend_that_is_only_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one is looked at without a word about it in the doctor."""
    monkeypatch.setattr("lvlm.runtime.tools.doctor.devices", lambda: ["cpu", "abacus"])
    finding = found(machine())["device abacus"]
    assert not finding.ok
    assert "No module named" in finding.says
    assert finding.fix


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_cli.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert "✓ device cpu" in out
    assert re.search(r"✗ bundle .* is not a bundle", " ".join(out.split()))


def test_lines_fit_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("one", True, "word " * 30), Finding("the other", False, "-", "mend " * 30)]
    monkeypatch.setattr(doctor, "examine", lambda _: findings)
    doctor_cli.main([])
    lines = capsys.readouterr().out.splitlines()
    starts = (
        "✓ one        word",
        " " * 13 + "word",
        f"{ABSENT} the other  -",
        " " * 11 + "  → mend",
    )
    for start in starts:
        assert any(line.startswith(start) for line in lines), lines
    assert 60 < max(map(len, lines)) <= 80


def test_a_bundle_that_changed_at_the_same_size_and_time(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle("digits-llava", max_images=2), folder)
    read_bundle(folder)
    weights = folder / "weights.bin"
    times, data = weights.stat(), bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 255
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    findings = examine(folder, machine())
    assert findings[-1].subject == "bundle"
    assert findings[-1].broken
    assert "weights.bin has changed" in findings[-1].says
    assert "copy it again" in findings[-1].fix
    assert not can_run(findings)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"seen": "no NVIDIA driver", "imports": {"onnxruntime": PROVIDERS}}, {"NVIDIA driver"}),
        ({"imports": {"onnxruntime": PROVIDERS}, "library": None}, set()),
        ({"library": SimpleNamespace()}, {"TensorRT plugins"}),
        ({"packages": {"onnxruntime": "1", "onnxruntime-gpu": "1"}}, {"onnxruntime"}),
        (
            {"seen": NvidiaDriver((12, 6), (ORIN,))},
            {"device cuda", "device ort-tensorrt"},
        ),
    ],
)
def test_what_is_merely_not_there_is_not_broken(changes: dict[str, Any], broken: set[str]) -> None:
    findings = examine(None, machine(**changes))
    assert {f.subject for f in findings if f.broken} == broken
    assert can_run(findings) == (not broken)
    marks = {f.mark for f in findings if not f.ok and not f.broken}
    assert marks <= {ABSENT}


def test_a_package_that_is_there_and_cannot_be_imported_is_broken() -> None:
    def attempt(_: str) -> str:
        raise BackendError("ImportError: libfoo.so.1: cannot open shared object file")

    odd = Machine(lambda: MODERN, {}.get, attempt, lambda _: PLUGINS)
    finding = found(odd)["device openvino"]
    assert finding.broken
    assert "libfoo" in finding.says


def test_the_command_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_cli.main([]) == 0
    assert "✓ device cpu" in capsys.readouterr().out


class Cuda:
    """The driver's functions, with what they are to answer."""

    def __init__(self, status: int = 0, count: int = 1, refused: str = "") -> None:
        self.status, self.count, self.refused = status, count, refused

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == self.refused:
                return 999
            if name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA Thor"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 11, 76: 0, 18: 1}[arguments[1]]
            elif name != "cuInit":
                answers = {"cuDriverGetVersion": 13020, "cuDeviceGetCount": self.count}
                arguments[0]._obj.value = answers.get(name, 128_000_000_000)
            return self.status if name == "cuInit" else 0

        return call


def test_the_driver_is_asked() -> None:
    seen = driver(lambda _: Cuda())  # type: ignore[arg-type,return-value]
    assert seen == NvidiaDriver((13, 2), (Gpu("NVIDIA Thor", 110, 128_000_000_000, True),))


@pytest.mark.parametrize(
    ("cuda", "says"),
    [
        (Cuda(status=100), "no GPU it can use"),
        (Cuda(status=803), "cuInit gives 803"),
        (Cuda(refused="cuDeviceGetCount"), "refuses cuDeviceGetCount"),
    ],
)
def test_a_driver_that_does_not_start(cuda: Cuda, says: str) -> None:
    with pytest.raises(BackendError, match=says):
        driver(lambda _: cuda)  # type: ignore[arg-type,return-value]


def test_no_driver() -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    with pytest.raises(BackendError, match="no NVIDIA driver"):
        driver(missing)

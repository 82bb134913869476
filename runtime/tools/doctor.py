"""What this machine can run, and why not the rest: every finding that is bad says how to mend it.

Packages are tried in a process of their own: one whose libraries are missing or broken may take
its process with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lvlm.core.errors import BackendError, BundleError, LvlmError
from lvlm.core.installing import install
from lvlm.core.integrity import sha256_of
from lvlm.core.nvidia import NoGpuError, NvidiaDriver, driver
from lvlm.runtime.backends import devices
from lvlm.runtime.bundle.engine_sets import PLUGINS, EngineSet, NoEnginesError
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle

CUDA_FOR_ORT = (13, 0)  # what onnxruntime-gpu 1.31 is built with
PROVIDERS = {"cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}
LIBRARY = "liblvlm_plugins.so"
ABSENT = "–"  # noqa: RUF001 - a dash is meant
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # device: Python module


@dataclass(frozen=True)
class Finding:
    """subject  what was looked at
    ok       it can be used
    says     what was seen
    fix      how to come by it, or how to mend it
    version  of the package, where it decides what runs
    broken   it is there, and does not work: what is not there may simply not be wanted"""

    subject: str
    ok: bool
    says: str
    fix: str = ""
    version: str = ""
    broken: bool = False

    @property
    def mark(self) -> str:
        return "✓" if self.ok else "✗" if self.broken else ABSENT


@dataclass(frozen=True)
class Machine:
    """How the doctor looks at the machine; tests put others here."""

    driver: Callable[[], NvidiaDriver] = driver
    version: Callable[[str], str | None] = lambda name: _version(name)
    attempt: Callable[[str], str] = lambda code: _attempt(code)
    load: Callable[[str], Any] = ctypes.CDLL


def examine(bundle: Path | None, machine: Machine | None = None) -> list[Finding]:
    """Every finding, the machine's first; every file of ``bundle`` is hashed."""
    machine = machine or Machine()
    found = [Finding("system", True, _system())]
    seen, gpus = _gpus(machine)
    found += gpus
    found += _onnxruntime(machine, seen)
    found += _tensorrt(machine, seen)
    found.append(_openvino(machine))
    found += _others(machine, {f.subject for f in found})
    if bundle is None:
        return found
    try:
        manifest = read_bundle(bundle, "full")
    except BundleError as error:
        return [*found, _unusable("bundle", error)]
    return [*found, *_bundle(bundle, manifest, seen, {f.subject: f for f in found})]


def _unusable(subject: str, error: LvlmError, fix: str = "") -> Finding:
    """What is there and does not work."""
    what, _, mend = str(error).partition("; ")
    return Finding(subject, False, what, fix or mend or "see the message", broken=True)


def _not_imported(subject: str, module: str, error: BackendError, fix: str) -> Finding:
    """A package that is not installed, or one that is and cannot be imported."""
    absent = f"No module named '{module}'" in str(error)
    says = f"{module} is not installed" if absent else str(error)
    return Finding(subject, False, says, fix, broken=not absent)


def _system() -> str:
    python = f"Python {platform.python_version()}"
    jetson = Path("/etc/nv_tegra_release")
    release = ""
    if jetson.is_file():
        release = f", Jetson Linux {jetson.read_text(encoding='utf-8').split(',')[0].strip('# ')}"
    return f"{platform.system()} {platform.machine()}, {python}{release}"


def _gpus(machine: Machine) -> tuple[NvidiaDriver | None, list[Finding]]:
    try:
        seen = machine.driver()
    except NoGpuError as error:
        what, _, fix = str(error).partition("; ")
        return None, [Finding("NVIDIA driver", False, what, fix)]
    except BackendError as error:
        return None, [_unusable("NVIDIA driver", error)]
    found = [Finding("NVIDIA driver", True, "serves CUDA {}.{}".format(*seen.cuda))]
    if not seen.gpus:
        fix = "check that the GPU is seated and visible (CUDA_VISIBLE_DEVICES, container options)"
        found.append(Finding("GPU", False, "the driver sees none", fix, broken=True))
    for number, gpu in enumerate(seen.gpus):
        shared = ", shared with the CPU" if gpu.integrated else ""
        says = f"{gpu.name}, SM {gpu.sm}, {gpu.memory / 1e9:.1f} GB{shared}"
        found.append(Finding(f"GPU {number}", True, says))
    return seen, found


def _onnxruntime(machine: Machine, seen: NvidiaDriver | None) -> Iterator[Finding]:
    """The backends cpu, cuda and ort-tensorrt."""
    plain, gpu = (machine.version(name) for name in ("onnxruntime", "onnxruntime-gpu"))
    if plain and gpu:
        says = f"onnxruntime {plain} and onnxruntime-gpu {gpu} overwrite each other's files"
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them"
        yield Finding("onnxruntime", False, says, fix, broken=True)
    try:
        providers = machine.attempt(
            "import onnxruntime; print(*onnxruntime.get_available_providers())"
        ).split()
    except BackendError as error:
        yield _not_imported("device cpu", "onnxruntime", error, install("cpu"))
        for device in PROVIDERS:
            yield _not_imported(f"device {device}", "onnxruntime", error, install("cuda"))
        return
    name = f"onnxruntime-gpu {gpu}" if gpu else f"onnxruntime {plain}"
    yield Finding("device cpu", True, name)
    for device, provider in PROVIDERS.items():
        says, fix, broken = name, "", False
        if provider not in providers:
            says = f"{name} has no {provider}"
            fix = f"pip uninstall -y onnxruntime; {install('cuda')} (Linux x86_64)"
        elif seen is None or not seen.gpus:
            says, fix = f"{name}, but no GPU", "see NVIDIA driver above"
        elif seen.cuda < CUDA_FOR_ORT:
            needs = "{} needs CUDA {}.{}; the driver serves {}.{}"
            says = needs.format(name, *CUDA_FOR_ORT, *seen.cuda)
            fix, broken = "install a newer NVIDIA driver", True
        yield Finding(f"device {device}", not fix, says, fix, broken=broken)


def _tensorrt(machine: Machine, seen: NvidiaDriver | None) -> Iterator[Finding]:
    """The backends tensorrt and tensorrt-rtx, and the plugin library that the former loads."""
    usable = seen is not None and bool(seen.gpus)
    for device, module in FLAVOURS.items():
        subject, extra = f"device {device}", install(device)
        if device == "tensorrt" and Path("/etc/nv_tegra_release").is_file():
            extra = "use JetPack's own TensorRT: a venv made with --system-site-packages"
        try:
            version = machine.attempt(f"import {module}; print({module}.__version__)").strip()
            machine.attempt(BINDINGS)
        except BackendError as error:
            yield _not_imported(subject, module, error, extra)
            continue
        says = f"{device} {version}"
        if usable:
            yield Finding(subject, True, says, version=version)
        else:
            says += ": engines can be built ahead of time" if device == "tensorrt-rtx" else ""
            yield Finding(subject, False, f"{says}; no GPU to run on", "see NVIDIA driver above")
    yield _plugins(machine)


def _openvino(machine: Machine) -> Finding:
    try:
        version = machine.attempt("import openvino; print(openvino.__version__)").strip()
    except BackendError as error:
        return _not_imported("device openvino", "openvino", error, install("openvino"))
    return Finding("device openvino", True, f"openvino {version}")


def _others(machine: Machine, known: Collection[str]) -> Iterator[Finding]:
    """Backends that nothing above knows: they say themselves what they lack."""
    for device in devices():
        subject = f"device {device}"
        if subject not in known:
            try:
                machine.attempt(
                    f"from lvlm.runtime.backends import open_backend; open_backend({device!r})"
                )
            except BackendError as error:
                what, _, fix = str(error).partition("; ")
                yield Finding(subject, False, what, fix or "see the message")
            else:
                yield Finding(subject, True, "opens")


BINDINGS = """
try:
    import cuda.bindings.runtime
except ImportError:
    import cuda.cudart
"""


def _plugins(machine: Machine) -> Finding:
    """The plugin library: only full TensorRT needs it."""
    path = os.environ.get(PLUGINS, LIBRARY)
    fix = f"lvlm-build plugins, then {PLUGINS}=/path/to/{LIBRARY}"
    try:
        library = machine.load(path)
    except OSError as error:
        named = PLUGINS in os.environ
        return Finding("TensorRT plugins", False, f"not loaded: {error}", fix, broken=named)
    if not hasattr(library, "getCreators"):
        says = f"{path} holds no TensorRT plugins"
        return Finding("TensorRT plugins", False, says, fix, broken=True)
    return Finding("TensorRT plugins", True, path)


def _bundle(
    folder: Path, manifest: Manifest, seen: NvidiaDriver | None, looked: Mapping[str, Finding]
) -> Iterator[Finding]:
    """Which devices can run this bundle, and which of its engines fit."""
    says = f"{manifest.family}, recipe {manifest.recipe}, {manifest.dtype}"
    yield Finding("bundle", True, f"{says}; every file as its manifest has it")
    for device in ("cpu", "cuda"):
        if device == "cpu" and manifest.dtype == "bfloat16":
            fix = "export it again with --dtype fp32 or fp16"
            yield Finding("bundle on cpu", False, "bf16 is for GPU targets", fix)
        elif looked[f"device {device}"].ok:
            yield Finding(f"bundle on {device}", True, "runs")
    if looked["device openvino"].ok:
        files = [f"{Path(graph.file).stem}.openvino.onnx" for graph in manifest.graphs.values()]
        missing = [file for file in files if file not in manifest.files]
        says = f"{missing[0]} is missing" if missing else "runs"
        fix = f"lvlm-build engine {folder} --target openvino" if missing else ""
        yield Finding("bundle on openvino", not missing, says, fix)
    for flavour in FLAVOURS:
        try:
            sets = EngineSet.find(folder, flavour)
        except NoEnginesError as error:
            what, _, fix = str(error).partition("; ")
            yield Finding(f"bundle on {flavour}", False, what, fix)
            continue
        except BackendError as error:
            yield _unusable(f"bundle on {flavour}", error)
            continue
        for engines in sets:
            yield _engines(engines, manifest, seen, looked)


def _engines(
    engines: EngineSet, manifest: Manifest, seen: NvidiaDriver | None, looked: Mapping[str, Finding]
) -> Finding:
    subject = f"bundle on {engines.flavour}"
    if seen is None or not seen.gpus:
        says = f"{engines.folder.name}: no GPU to run on"
        return Finding(subject, False, says, "see NVIDIA driver above")
    device = looked[f"device {engines.flavour}"]
    if not device.ok:
        says = f"{engines.folder.name}: {engines.flavour} cannot be used"
        return Finding(subject, False, says, f"see device {engines.flavour} above")
    try:
        library = engines.plugin_library()
        engines.check(
            gpu_sm=seen.gpus[0].sm,
            gpu_name=seen.gpus[0].name,
            version=device.version,
            plugin_hash=None if library is None else sha256_of(library),
            manifest=manifest,
        )
        EngineSet.read(engines.folder, verify="full")
    except BackendError as error:
        what, _, fix = str(error).rpartition("; ")
        return Finding(subject, False, what, fix, broken=True)
    return Finding(subject, True, f"{engines.folder.name} fits")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _attempt(code: str) -> str:
    """What a fresh Python prints for this code. Raises BackendError with its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise BackendError(lines[-1])
    return done.stdout


def as_json(findings: list[Finding]) -> str:
    return json.dumps([vars(finding) for finding in findings], ensure_ascii=False)


def can_run(findings: list[Finding]) -> bool:
    """Whether one device at least can be used (for the bundle, if one was looked at), and nothing
    that is there is broken."""
    kind = "bundle on " if any(f.subject == "bundle" for f in findings) else "device "
    usable = any(f.ok and f.subject.startswith(kind) for f in findings)
    return usable and not any(f.broken for f in findings)

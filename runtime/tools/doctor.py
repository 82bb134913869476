"""Diagnosis of this machine: what runs, and why not the rest; every bad finding says how to mend
it.

Packages are tried in a process of their own: one whose libraries are missing or broken may take
its process with it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from pathlib import Path

from lvlm.core.errors import BackendError, BundleError
from lvlm.core.installing import install
from lvlm.core.nvidia import NoGpuError, NvidiaDriver
from lvlm.runtime.backends import devices
from lvlm.runtime.bundle.engine_sets import PLUGINS
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.tools.bundle_findings import bundle_findings
from lvlm.runtime.tools.findings import Finding, Machine, unusable
from lvlm.runtime.tools.jetpacks import jetpack_finding

CUDA_FOR_ORT = (13, 0)  # what onnxruntime-gpu 1.31 is built with
PROVIDERS = {"cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}
LIBRARY = "liblvlm_plugins.so"
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # device: Python module


def examine(bundle: Path | None, machine: Machine | None = None) -> list[Finding]:
    """Every finding, the machine's first; every file of ``bundle`` is hashed."""
    machine = machine or Machine()
    found = [Finding("system", True, _system())]
    if machine.jetson.is_file():
        found.append(jetpack_finding(machine.jetson.read_text(encoding="utf-8", errors="replace")))
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
        return [*found, unusable("bundle", error)]
    return [*found, *bundle_findings(bundle, manifest, seen, {f.subject: f for f in found})]


def _not_imported(subject: str, module: str, error: BackendError, fix: str) -> Finding:
    """A package that is not installed, or one that is and cannot be imported."""
    absent = f"No module named '{module}'" in str(error)
    says = f"{module} is not installed" if absent else str(error)
    return Finding(subject, False, says, fix, broken=not absent)


def _system() -> str:
    python = f"Python {platform.python_version()}"
    return f"{platform.system()} {platform.machine()}, {python}"


def _gpus(machine: Machine) -> tuple[NvidiaDriver | None, list[Finding]]:
    try:
        seen = machine.driver()
    except NoGpuError as error:
        what, _, fix = str(error).partition("; ")
        return None, [Finding("NVIDIA driver", False, what, fix)]
    except BackendError as error:
        return None, [unusable("NVIDIA driver", error)]
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
    yield _cpu_kernels(machine)
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


def _cpu_kernels(machine: Machine) -> Finding:
    """Finding on what device cpu takes for our own ops."""
    try:
        found = machine.kernels()
    except BackendError as error:
        return unusable("CPU kernels", error)
    if found.path is None:
        return Finding("CPU kernels", False, found.why, found.mend)
    return Finding("CPU kernels", True, f"{found.path}, for {found.instructions}")


def _tensorrt(machine: Machine, seen: NvidiaDriver | None) -> Iterator[Finding]:
    """The backends tensorrt and tensorrt-rtx, and the plugin library that the former loads."""
    usable = seen is not None and bool(seen.gpus)
    for device, module in FLAVOURS.items():
        subject, extra = f"device {device}", install(device)
        if device == "tensorrt" and machine.jetson.is_file():
            extra = "use JetPack's own TensorRT: a venv made with --system-site-packages"
        try:
            version = machine.attempt(f"import {module}; print({module}.__version__)").strip()
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

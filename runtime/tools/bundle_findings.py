"""Findings on a bundle: the devices that can run it, and which of its engines fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lvlm.core.errors import BackendError
from lvlm.core.integrity import sha256_of
from lvlm.core.nvidia import NvidiaDriver
from lvlm.core.progress import size
from lvlm.runtime.bundle.engine_sets import EngineSet, NoEnginesError
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.tools.engine_memory import engine_memory
from lvlm.runtime.tools.findings import Finding, unusable

FLAVOURS = ("tensorrt", "tensorrt-rtx")


def bundle_findings(
    folder: Path, manifest: Manifest, seen: NvidiaDriver | None, looked: Mapping[str, Finding]
) -> Iterator[Finding]:
    """Findings on this bundle: the devices that can run it, and which of its engines fit."""
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
            yield unusable(f"bundle on {flavour}", error)
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
    needs, memory = engine_memory(engines, manifest), seen.gpus[0].memory
    says = f"{engines.folder.name} fits, and takes {size(needs.total)} of {size(memory)}: {needs}"
    if needs.total > memory:
        fix = (
            "build them with a smaller --batch or --max-prompt, or export with less: --weights "
            "int4, --max-text-len, kv_keep"
        )
        return Finding(subject, False, says.replace(" fits, and takes", " takes", 1), fix)
    return Finding(subject, True, says)

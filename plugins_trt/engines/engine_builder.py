"""The engines of a bundle: built one after another, put in place whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

from lvlm.core.errors import BackendError, BuildError
from lvlm.core.integrity import sha256_of
from lvlm.core.output import temporary_sibling, whole_file
from lvlm.core.progress import Progress, Stage, size
from lvlm.plugins_trt.engines.engine_listing import PEOPLE
from lvlm.plugins_trt.engines.engine_plan import EnginePlan
from lvlm.plugins_trt.engines.engine_request import BuildRequest
from lvlm.plugins_trt.engines.graph_protos import read_proto
from lvlm.plugins_trt.engines.lowered_graphs import check_graphs, lower_bundle, lowered
from lvlm.plugins_trt.engines.shape_profiles import shapes
from lvlm.plugins_trt.engines.tensorrt_builder import (
    NAMESPACE,
    BuildSettings,
    TensorRtBuilder,
    open_tensorrt,
)
from lvlm.runtime.bundle.engine_sets import SCHEMA, EngineGraph, EngineSet, PluginLibrary
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity


def stages(plan: EnginePlan) -> int:
    """Number of steps of the progress of ``build``."""
    return len(plan.manifest.graphs) + (not lowered(plan.manifest, plan.request.target))


def build(plan: EnginePlan, progress: Progress) -> EngineSet:
    """Lower the graphs where that is still to be done, and build every engine of the bundle.

    Raises LvlmError; then nothing is left in the folder's place.
    """
    request = plan.request
    manifest = lower_bundle(request.bundle, plan.manifest, request.target, progress)
    tensorrt = open_tensorrt(request.target.flavour)
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(plan.folder, BuildError) as folder:
        library = _load_plugins(tensorrt, plan, folder)
        graphs = {}
        for name in manifest.graphs:
            with progress.stage(f"build {name}") as stage:
                graphs[name] = _build_graph(tensorrt, plan, name, folder, stage)
                stage.result = size(graphs[name].bytes)
        made = EngineSet(
            folder=folder,
            schema=SCHEMA,
            target=request.target.name,
            flavour=request.target.flavour,
            version=plan.version,
            gpu=plan.gpu,
            sms=plan.sms,
            hardware_compatible=request.hardware_compatible,
            version_compatible=request.version_compatible,
            plugins=library,
            bundle=_identity(manifest, plan),
            options=request.options(),
            graphs=graphs,
        )
        made.write()
        _put_in_place(folder, plan.folder)
    return dataclasses.replace(made, folder=plan.folder)


def lower_only(request: BuildRequest, progress: Progress, dry_run: bool) -> str:
    """Write the lowered graphs only, for engines that build from the graph when they load it."""
    target, manifest = request.target, read_bundle(request.bundle, request.verify)
    files = ", ".join(target.file(graph.file) for graph in manifest.graphs.values())
    done = "there already" if lowered(manifest, target) else "written"
    if dry_run:
        check_graphs(request.bundle, manifest, target)
        return f"{target.name}: nothing to build; would write {files}"
    lower_bundle(request.bundle, manifest, target, progress)
    engine = PEOPLE[target.flavour]
    return f"{target.name}: {engine} builds nothing beforehand; {done}: {files}"


def _build_graph(
    tensorrt: TensorRtBuilder, plan: EnginePlan, name: str, folder: Path, stage: Stage
) -> EngineGraph:
    request, graph = plan.request, plan.manifest.graphs[name]
    source = request.target.file(graph.file)
    profile = plan.profiles[name]
    ahead = plan.gpu is None
    settings = BuildSettings(
        shapes=shapes(graph, profile, static_capacity(plan.manifest).per_layer),
        weights=plan.shared,
        greedy=name == "decode",
        sms=plan.sms if ahead else (),
        workspace=request.workspace,
        flags=("VERSION_COMPATIBLE",) if request.version_compatible else (),
        hardware_compatible=request.hardware_compatible,
        timing_cache=_read_cache(plan.timing_cache),
    )
    try:
        built = tensorrt.build(request.bundle / source, settings, stage.show)
    except (BackendError, BuildError) as error:
        raise type(error)(f"{source}: {error}") from None
    if plan.timing_cache is not None and built.timing_cache is not None:
        _write_cache(plan.timing_cache, built.timing_cache)
    file = f"{name}.engine"
    with (folder / file).open("wb") as out:
        out.write(built.engine)
    return EngineGraph(
        file=file,
        sha256=hashlib.sha256(built.engine).hexdigest(),
        bytes=built.engine.nbytes,
        source=source,
        profile=profile,
        weights=tuple(built.weights),
        activations=built.activations,
    )


def _load_plugins(
    tensorrt: TensorRtBuilder, plan: EnginePlan, folder: Path
) -> PluginLibrary | None:
    """The plugin library, which goes beside the engines: they run with no other."""
    if plan.library is None:
        return None
    tensorrt.load_plugins(plan.library, _plugin_names(plan))
    copy = folder / plan.library.name
    shutil.copyfile(plan.library, copy)
    return PluginLibrary(copy.name, sha256_of(copy))


def _plugin_names(plan: EnginePlan) -> list[str]:
    """The lvlm ops of the lowered graphs, none of which has a function any more."""
    bundle, target = plan.request.bundle, plan.request.target
    names: dict[str, None] = {}
    for graph in plan.manifest.graphs.values():
        model = read_proto(bundle / target.file(graph.file))
        names |= {node.op_type: None for node in model.graph.node if node.domain == NAMESPACE}
    return list(names)


def _identity(manifest: Manifest, plan: EnginePlan) -> dict[str, str]:
    """Identity of what the engines were built from: the canonical graphs, and the weights they
    read."""
    names = [graph.file for graph in manifest.graphs.values()]
    names += sorted({w.file for weights in plan.stored.values() for w in weights.values()})
    return {name: manifest.files[name].sha256 for name in names}


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename, with what was there before out of the way first."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def _read_cache(path: Path | None) -> bytes | None:
    if path is None:
        return None
    return path.read_bytes() if path.is_file() else b""


def _write_cache(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, BuildError) as partial:
        partial.write_bytes(data)

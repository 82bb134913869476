"""The plan of a build: which engines, for which GPU, with which lengths: all that is known before
any work."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lvlm.core import nvidia
from lvlm.core.errors import BackendError, BuildError, ParameterError
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines.engine_request import BuildRequest
from lvlm.plugins_trt.engines.held_weights import held_weights
from lvlm.plugins_trt.engines.lowered_graphs import check_graphs
from lvlm.plugins_trt.engines.memory_estimate import MemoryEstimate, check_memory, estimate
from lvlm.plugins_trt.engines.shape_profiles import Profile, profiles
from lvlm.plugins_trt.engines.shared_weights import shared_matrices, stored_weights
from lvlm.plugins_trt.engines.tensorrt_builder import TensorRtBuilder, open_tensorrt
from lvlm.runtime.bundle.engine_sets import FILE, FOLDER, EngineWeight
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle


@dataclass(frozen=True)
class EnginePlan:
    """Everything known before any work.

    gpu      name of the GPU to build on; None: ahead of time, for ``sms``
    library  of plugins, for a target that has them
    blocked  why it cannot be built here, of a plan that is only looked at
    memory   estimates of what the engines take when they run
    stored   weights of every graph; ``shared`` those of them that become inputs
    """

    request: BuildRequest
    manifest: Manifest
    version: str
    gpu: str | None
    sms: tuple[int, ...]
    library: Path | None
    timing_cache: Path | None
    folder: Path
    profiles: dict[str, Profile]
    stored: dict[str, dict[str, EngineWeight]]
    shared: dict[str, EngineWeight]
    memory: MemoryEstimate
    blocked: str | None = None


def make_plan(request: BuildRequest, *, dry_run: bool = False) -> EnginePlan:
    """Check everything that can be checked before building. Raises LvlmError.

    ``dry_run``: a plan for another machine, too, where this one lacks TensorRT, the GPU or the
    plugins.
    """
    manifest = read_bundle(request.bundle, request.verify)
    _check_dtype(request.target, manifest.dtype)
    _check_storage(request.target, manifest)
    unlowered = _check_graphs(request, manifest, dry_run=dry_run)
    found = profiles(manifest, request.limits)
    _check_topk(request.target, found)
    place = _place(request, dry_run=dry_run)
    gpu = None if place.gpu is None else place.gpu.name
    made_for = _slug(gpu or "+".join(f"sm{sm}" for sm in place.sms))
    made_for += f"-{request.target.flavour}-{place.version}"
    folder = request.output or request.bundle / FOLDER / made_for
    if folder.exists() and not request.force:
        raise BuildError(f"{folder} exists; give --force to replace it, or another -o")
    if folder.exists() and not (folder / FILE).is_file():
        raise BuildError(f"{folder} is no folder of engines; give another -o or remove it")
    stored = stored_weights(request.bundle, manifest)
    shared = {} if request.weights == "embedded" else shared_matrices(stored)
    signed = request.target.signed if manifest.quantization is not None else None
    inside = {
        name: held_weights(request.bundle / graph.file, stored[name], shared, signed)
        for name, graph in manifest.graphs.items()
    }
    memory = estimate(manifest, found, stored, shared, inside, request.workspace)
    int4 = request.target.signed is not None and 4 in request.target.signed.blocks
    if request.memory is not None:
        check_memory(manifest, memory, request.memory, "a device", int4=int4)
    elif place.gpu is not None:
        check_memory(manifest, memory, place.gpu.memory, place.gpu.name, int4=int4)
    return EnginePlan(
        request=request,
        manifest=manifest,
        version=place.version,
        gpu=gpu,
        sms=place.sms,
        library=place.library,
        timing_cache=None if gpu is None else request.timing_cache or _timing_cache(made_for),
        folder=folder,
        profiles=found,
        stored=stored,
        shared=shared,
        memory=memory,
        blocked=place.blocked or unlowered,
    )


@dataclass(frozen=True)
class BuildHost:
    """The machine where engines are built: TensorRT's ``version``, the GPU, or None to build ahead
    of time for ``sms``, the plugin library, and why this is not here."""

    version: str
    gpu: nvidia.Gpu | None
    sms: tuple[int, ...]
    library: Path | None
    blocked: str | None = None


def _place(request: BuildRequest, *, dry_run: bool) -> BuildHost:
    """This machine; with ``dry_run``, where it is not one to build on, the target's own."""
    target = request.target
    if dry_run and request.plugins is not None:
        request.library()  # what is named must be there
    try:
        library = request.library()
        tensorrt = open_tensorrt(target.flavour)
        _check_version(target, tensorrt)
        gpu, sms = _gpu(request)
        return BuildHost(tensorrt.version, gpu, sms, library)
    except BackendError as error:
        if not dry_run:
            raise
        version = ".".join(map(str, target.version))
        return BuildHost(version, None, request.sm or target.sms, None, str(error))


def _gpu(request: BuildRequest) -> tuple[nvidia.Gpu | None, tuple[int, ...]]:
    """The GPU to build on and its architecture, or None and the architectures to build for."""
    target = request.target
    if target.flavour == "tensorrt-rtx":
        return None, request.sm or target.sms
    gpus = nvidia.driver().gpus
    if not gpus:
        raise BackendError("the NVIDIA driver sees no GPU; TensorRT builds on the one that runs it")
    gpu = gpus[0]
    if target.sms and gpu.sm not in target.sms:
        raise BackendError(
            f"target {target.name} is for {target.platform} (sm_{target.sms[0]}), this GPU is "
            f"{gpu.name} (sm_{gpu.sm}); run this there, or choose another target (--list-targets)"
        )
    return gpu, (gpu.sm,)


def _check_dtype(target: Target, dtype: str) -> None:
    if dtype not in target.matmul_types:
        raise ParameterError(
            f"target {target.name} computes in {', '.join(sorted(target.matmul_types))} only, this "
            f"bundle is in {dtype}; export it with --dtype fp16"
        )


def _check_storage(target: Target, manifest: Manifest) -> None:
    """Weights and cache of lower precision than is computed in, as far as the manifest says: what
    scales are like is in the graphs."""
    if manifest.cache_dtype != manifest.dtype and not target.low_precision:
        raise ParameterError(
            f"target {target.name} does not take a cache of lower precision than it computes in; "
            "export without --cache"
        )
    if (how := manifest.quantization) is None:
        return
    if (refusal := target.refusal(how.bits, how.block, whole=True)) is not None:
        raise ParameterError(refusal)


def _check_graphs(request: BuildRequest, manifest: Manifest, *, dry_run: bool) -> str | None:
    """Raise what lowering would raise; with ``dry_run`` the reason why it cannot be done here."""
    try:
        check_graphs(request.bundle, manifest, request.target)
    except BuildError as error:
        if not dry_run:
            raise
        return str(error)
    return None


def _check_version(target: Target, tensorrt: TensorRtBuilder) -> None:
    parts = tuple(int(p) for p in tensorrt.version.split(".")[: len(target.version)])
    if parts != target.version:
        wanted = ".".join(map(str, target.version))
        raise BackendError(
            f"target {target.name} is for {tensorrt.name} {wanted}, here is {tensorrt.version}; "
            "choose another target (--list-targets) or install that version"
        )


def _check_topk(target: Target, found: dict[str, Profile]) -> None:
    """Without plugins entries and tokens are ranked by TensorRT's own TopK."""
    if target.plugins or target.topk_limit is None:
        return
    for profile in found.values():
        for dim, extent in profile.items():
            if dim.startswith(("kept_", "entries_")) and extent.max > target.topk_limit:
                raise BuildError(
                    f"{dim} goes up to {extent.max}, target {target.name} ranks at most "
                    f"{target.topk_limit} without plugins; lower --max-prompt"
                )


def _slug(text: str) -> str:
    """NVIDIA GeForce RTX 4090 -> geforce-rtx-4090."""
    words = re.sub(r"[^a-z0-9+]+", "-", text.lower()).strip("-")
    return words.removeprefix("nvidia-")


def _timing_cache(made_for: str) -> Path:
    """The file that keeps what TensorRT measures from one build to the next."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lvlm" / f"timing-{made_for}.cache"

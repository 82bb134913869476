"""One graph to one engine, by TensorRT's own parser and builder, of either package.

TensorRT-RTX builds ahead of time without a GPU, full TensorRT on the GPU that is to run the engine.
What the parser *ignores* is found too: it drops an input it cannot use (``nonpad_kv_seqlen`` of
``Attention``) without a word, and the engine then computes something else. So every input of a
network must reach a layer.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lvlm.core.errors import BackendError, BuildError
from lvlm.core.held_signals import held_signals
from lvlm.core.installing import install
from lvlm.core.progress import size
from lvlm.plugins_trt.engines.graph_protos import read_proto
from lvlm.plugins_trt.engines.greedy_choice import add_best
from lvlm.plugins_trt.engines.shared_weights import with_inputs
from lvlm.runtime.bundle.engine_sets import EngineWeight

# flavour -> (name for people, module, how to install it)
PACKAGES = {
    "tensorrt": (
        "TensorRT",
        "tensorrt",
        f"{install('tensorrt')}; on a Jetson use JetPack's own, in a virtual "
        "environment made with --system-site-packages",
    ),
    "tensorrt-rtx": ("TensorRT-RTX", "tensorrt_rtx", install("tensorrt-rtx")),
}
PREVIEW_FEATURES = (
    "ALIASED_PLUGIN_IO_10_03",  # plugins write the cache in place: an output is its input's memory
    "RUNTIME_ACTIVATION_RESIZE_10_10",  # one prompt pays for the workspace of one, not of --batch
)
NAMESPACE, PLUGIN_VERSION = "lvlm", "1"  # of the plugins
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")
Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
Show = Callable[[str], None]
# What the builders say of memory
NO_ROOM = re.compile(r"workspace limit|insufficient workspace", re.IGNORECASE)
NO_MEMORY = re.compile(
    r"Requested amount of (?:GPU )?memory \((\d+) bytes\)|out ?of ?memory|MemoryAllocation"
    r"|insufficient (?:memory|workspace)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BuildSettings:
    """Settings of the build of one engine.

    shapes   (min, opt, max) shape of every input with a dynamic axis; others may be left out
    weights  initializers that become inputs
    greedy   give logits' greedy choice as an output of its own
    sms      architectures to build for ahead of time; (): the GPU of this machine
    workspace  most bytes of scratch memory; None: all there is
    flags    of the builder, by name
    """

    shapes: Shapes = field(default_factory=dict)
    weights: Mapping[str, EngineWeight] = field(default_factory=dict)
    greedy: bool = False
    sms: tuple[int, ...] = ()
    workspace: int | None = None
    flags: tuple[str, ...] = ()
    hardware_compatible: bool = False
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class Built:
    """A serialized engine, the weights it takes as inputs, what timing was learned, and bytes of
    memory that it computes in at its longest lengths; None: the builder did not say."""

    engine: memoryview
    weights: list[EngineWeight]
    timing_cache: bytes | None
    activations: int | None = None


class TensorRtBuilder:
    """One of the two packages; ``open_tensorrt`` gives the one of this process."""

    def __init__(self, flavour: str) -> None:
        self.name, module, mend = PACKAGES[flavour]
        try:
            self.trt: Any = importlib.import_module(module)
        except (ImportError, OSError) as error:
            raise BackendError(f"{self.name} is missing ({error}): {mend}") from None
        self.version = str(self.trt.__version__)
        self.log = _logger(self.trt)

    def build(
        self, model: Path | bytes, settings: BuildSettings | None = None, show: Show | None = None
    ) -> Built:
        """Parse ``model``, require that every input is consumed, and build an engine.

        model  path of an ONNX file (external data beside it is found), or a model's bytes
        show   is told what the builder is doing
        Raises BackendError with the parser's message, or naming unconsumed inputs; BuildError with
        the builder's.
        """
        settings = settings or BuildSettings()
        builder, network, parser, weights = self._parse(model, settings)
        if unused := _unconsumed(network):
            raise BackendError(
                f"{self.name} leaves {', '.join(unused)} of the graph unused: it would compute "
                "something else than the graph says; lower the node that reads it"
            )
        config = self._config(builder, settings)
        with held_signals() as came:
            config.progress_monitor = _monitor(self.trt, show or (lambda _: None), came)
            engine = builder.build_serialized_network(network, config)
        del parser  # holds weights that the network refers to until here
        if engine is None:
            raise failure(self.name, self.log.text(), settings.workspace)
        cache = settings.timing_cache is not None and config.get_timing_cache()
        learned = bytes(cache.serialize()) if cache else None
        return Built(memoryview(engine), weights, learned, self.log.activations)

    def load_plugins(self, library: Path, needed: Iterable[str]) -> None:
        """Make the plugins of a library known. Raises BackendError if it cannot be loaded or does
        not have all ``needed`` ones."""
        registry = self.trt.get_plugin_registry()
        self.log.clear()
        if registry.load_library(str(library)) is None:
            raise BackendError(
                f"{library} cannot be loaded as a plugin library ({self.log.text()}); build it "
                "with lvlm-build plugins"
            )
        missing = [n for n in needed if registry.get_creator(n, PLUGIN_VERSION, NAMESPACE) is None]
        if missing:
            raise BackendError(
                f"{library} lacks the plugin{'s' * (len(missing) > 1)} {', '.join(missing)} that "
                "the graphs need; it is of another build: lvlm-build plugins makes one of this "
                "version"
            )

    def _parse(
        self, model: Path | bytes, settings: BuildSettings
    ) -> tuple[Any, Any, Any, list[EngineWeight]]:
        trt = self.trt
        self.log.clear()
        try:
            builder = trt.Builder(self.log)
        except TypeError:  # its constructor gave nothing
            raise BackendError(
                f"{self.name} does not start: {self.log.text()}; see lvlm-doctor"
            ) from None
        # Precision comes from the graph's own types; from TensorRT 11 on there is no other way.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, self.log)
        weights: list[EngineWeight] = []
        if isinstance(model, bytes):
            parsed = parser.parse(model)
        elif settings.weights or settings.greedy:
            proto = read_proto(model)
            if settings.greedy:
                add_best(proto)
            weights = with_inputs(proto, settings.weights)
            parsed = parser.parse(proto.SerializeToString(), path=str(model))
        else:
            parsed = parser.parse_from_file(str(model))
        if not parsed:
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            told = "; ".join(f"{e.desc()} ({e.node_operator()} {e.node_name()})" for e in errors)
            raise BackendError(f"{self.name} cannot parse this graph: {told or self.log.text()}")
        return builder, network, parser, weights

    def _config(self, builder: Any, settings: BuildSettings) -> Any:
        trt, config = self.trt, builder.create_builder_config()
        if settings.shapes:
            profile = builder.create_optimization_profile()
            for name, shapes in settings.shapes.items():
                profile.set_shape(name, *map(tuple, shapes))
            if config.add_optimization_profile(profile) < 0:
                raise BackendError(f"{self.name} refuses the shape profile: {self.log.text()}")
        if settings.sms:
            config.num_compute_capabilities = len(settings.sms)
            for index, sm in enumerate(settings.sms):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        for flag in settings.flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        # fp32 means fp32: TF32, which is on by default, has products of 10 bits.
        config.clear_flag(trt.BuilderFlag.TF32)
        # TensorRT-RTX captures an engine into a CUDA graph only if it allocates nothing itself.
        if (captured := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
            config.set_flag(captured)
        for feature in PREVIEW_FEATURES:  # of versions that do not have one, nothing needs it
            if (found := getattr(trt.PreviewFeature, feature, None)) is not None:
                config.set_preview_feature(found, True)
        if settings.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if settings.timing_cache is not None:
            cache = config.create_timing_cache(settings.timing_cache)
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                raise BuildError(
                    f"the timing cache is not one of {self.name} {self.version} and this GPU; "
                    "give another --timing-cache"
                )
        return config


def failure(name: str, text: str, workspace: int | None) -> BuildError:
    """The error for what the builder of the package ``name`` has logged."""
    lower = "lower --batch or --max-prompt"
    if workspace is not None and NO_ROOM.search(text):
        return BuildError(
            f"{name} finds no way to compute it within --workspace {size(workspace)}; "
            f"give more, or {lower}"
        )
    if found := NO_MEMORY.search(text):
        asked = f" ({size(int(found[1]))} were asked for)" if found[1] else ""
        return BuildError(
            f"not enough GPU memory to build it{asked}; close what else uses the GPU, {lower}, or "
            "set --workspace below what is free"
        )
    return BuildError(f"{name} cannot build this graph: {text}")


@cache
def open_tensorrt(flavour: str) -> TensorRtBuilder:
    """The package for a flavour; its first logger stays in use as long as the process lives."""
    return TensorRtBuilder(flavour)


def _unconsumed(network: Any) -> list[str]:
    read = set()
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        tensors = (layer.get_input(i) for i in range(layer.num_inputs))
        read |= {tensor.name for tensor in tensors if tensor is not None}
    names = (network.get_input(i).name for i in range(network.num_inputs))
    return [name for name in names if name not in read]


def _monitor(trt: Any, show: Show, came: Sequence[int]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the innermost phase; a signal that ``came`` makes the builder stop."""

        def __init__(self) -> None:
            super().__init__()
            self.phases: list[tuple[str, int]] = []

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self.phases.append((name, steps))

        def step_complete(self, name: str, step: int) -> bool:
            total = dict(self.phases).get(name, 0)
            show(f"{name} ({step + 1} of {total})")
            return not came

        def phase_finish(self, name: str) -> None:
            self.phases = [phase for phase in self.phases if phase[0] != name]

    return Monitor()


def _logger(trt: Any) -> Any:
    class BuildLogger(trt.ILogger):  # type: ignore[misc]
        """Prints nothing; remembers errors and how much memory an engine takes, since the builder
        reports them in no other way."""

        errors: list[str]
        activations: int | None

        def __init__(self) -> None:
            super().__init__()
            self.clear()

        def log(self, severity: Any, message: str) -> None:
            if found := ACTIVATIONS.search(message):
                self.activations = int(found[1])
            # Without a GPU the builder also reports, and does without, a CUDA driver.
            failed = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            if failed and "catchCudaError" not in message:
                self.errors.append(" ".join(message.split()))

        def clear(self) -> None:
            self.errors, self.activations = [], None

        def text(self) -> str:
            return "; ".join(self.errors) or "no reason given"

    return BuildLogger()

"""TensorRT and TensorRT-RTX, which share one Python interface: engines over device buffers."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.core.errors import BackendError, DeviceMemoryError, ParameterError
from lvlm.core.installing import install, require
from lvlm.core.integrity import sha256_of
from lvlm.runtime.backends import Gate, host_dtype
from lvlm.runtime.backends.trt import driver
from lvlm.runtime.backends.trt.driver import DeviceArray, DeviceBuffer
from lvlm.runtime.backends.trt.engine_session import EngineSession, Shared, Workspace
from lvlm.runtime.backends.trt.engine_weights import Weights
from lvlm.runtime.bundle.engine_sets import EngineSet
from lvlm.runtime.bundle.manifest import Manifest


class TensorRtBackend:
    """One GPU, one stream, and whatever of a bundle's engines fits both.

    Memory that is in use belongs to this object (weights, workspace), to its sessions (inputs and
    outputs) and to the cache. Not thread-safe: one call at a time.
    """

    static_capacity = True

    def __init__(self, name: str, threads: int | None) -> None:
        """``name``: tensorrt or tensorrt-rtx, the package's name, too."""
        if threads is not None:
            raise ParameterError(f"device {name} takes no number of threads; leave --threads out")
        self.name = name
        self.driver = driver.open_driver()
        self.trt = require(name.replace("-", "_"), install(name))
        self.log = _logger(self.trt)
        self.runtime = self.trt.Runtime(self.log)
        self.shared = Shared(self.trt, self.driver, Workspace(self.driver), self.log)
        self.weights = Weights(self.driver)
        self._engines: dict[Path, EngineSet] = {}

    def load(self, folder: Path, manifest: Manifest, name: str) -> EngineSession:
        engines = self.engines_of(folder, manifest)
        built = engines.graphs.get(name)
        if built is None:
            raise BackendError(f"{engines.folder} has no {name} engine; {engines.mend}")
        engine = self._deserialize(engines.folder / built.file)
        weights = self.weights.of(folder, built.weights)
        return EngineSession(self.shared, name, engine, manifest.graphs[name], weights)

    def engines_of(self, folder: Path, manifest: Manifest) -> EngineSet:
        """The set of a bundle's engines that runs here. Raises BackendError where none does."""
        if folder not in self._engines:
            self._engines[folder] = self._choose(folder, manifest)
        return self._engines[folder]

    def gate(self) -> Gate | None:
        return None

    def room(self) -> int | None:
        return None

    def allocate(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        size = math.prod(shape) * np.dtype(host_dtype(dtype)).itemsize
        buffer = DeviceBuffer(self.driver, size, "a buffer", "give fewer prompts at once")
        self.driver.clear(buffer.address, size)
        return DeviceArray(buffer, shape, dtype)

    def rows(self, buffer: DeviceArray, start: int, stop: int) -> DeviceArray:
        offset = buffer.offset + start * _row(buffer)
        return replace(buffer, shape=(stop - start, *buffer.shape[1:]), offset=offset)

    def copy_row(self, buffer: DeviceArray, source: int, target: int, used: int) -> None:  # noqa: ARG002
        size = _row(buffer)
        self.driver.copy(buffer.address + target * size, buffer.address + source * size, size)

    def clear_row(self, buffer: DeviceArray, row: int) -> None:
        size = _row(buffer)
        self.driver.clear(buffer.address + row * size, size)

    def _choose(self, folder: Path, manifest: Manifest) -> EngineSet:
        """The first of the bundle's sets that fits; with none, what is wrong with the nearest."""
        gpu, reason = self.driver.device, None
        found = EngineSet.find(folder, self.name)
        for engines in sorted(found, key=lambda s: gpu.sm not in s.sms):
            try:
                library = engines.plugin_library()
                engines.check(
                    gpu_sm=gpu.sm,
                    gpu_name=gpu.name,
                    version=self.trt.__version__,
                    plugin_hash=None if library is None else sha256_of(library),
                    manifest=manifest,
                )
                EngineSet.read(engines.folder)  # are the files whole?
            except BackendError as error:
                reason = reason or error
                continue
            if library is not None:
                self._load_plugins(library)
            if engines.version_compatible:
                # They bring a small runtime of their own, which TensorRT asks leave for; the
                # files' hashes have just been compared.
                self.runtime.engine_host_code_allowed = True
            return engines
        assert reason is not None
        raise reason

    def _load_plugins(self, library: Path) -> None:
        self.log.errors.clear()
        try:
            handle = self.trt.get_plugin_registry().load_library(str(library))
        except Exception as error:
            handle, self.log.errors = None, [*self.log.errors, str(error)]
        if handle is None:
            raise BackendError(
                f"TensorRT cannot load the plugins of {library}: {self.log.text()}; build them for "
                "this machine (lvlm-build plugins)"
            )

    def _deserialize(self, file: Path) -> Any:
        self.log.errors.clear()
        # Mapped, not read: with memory shared between CPU and GPU a copy would count twice.
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        engine = self.runtime.deserialize_cuda_engine(data)
        if engine is not None:
            return engine
        if "out of memory" in " ".join(self.log.errors).lower():
            free = self.driver.free_memory()
            raise DeviceMemoryError(
                f"{file} needs about {driver.in_mib(file.stat().st_size)} of GPU memory, "
                f"{driver.in_mib(free)} are free; close what else uses the GPU, or export with a "
                "smaller --dtype",
                free,
            )
        raise BackendError(
            f"{self.name} cannot load {file}: {self.log.text()}; build the engines again"
        )


def _row(buffer: DeviceArray) -> int:
    """Bytes of one row."""
    return math.prod(buffer.shape[1:]) * np.dtype(host_dtype(buffer.dtype)).itemsize


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Prints nothing; remembers errors, since TensorRT reports them in no other way."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def text(self) -> str:
            """The first error; what follows are its consequences."""
            return self.errors[0] if self.errors else "no reason given"

    return Logger()

"""A request to ``lvlm-build engine``, and whether the target can have it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lvlm.core.discovery import discover, nearest
from lvlm.core.errors import BackendError, ParameterError
from lvlm.core.integrity import Verify
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines.shape_profiles import EngineLimits, parse_batch
from lvlm.runtime.bundle.engine_sets import PLUGINS

Weights = Literal["inputs", "embedded"]
DEFAULT_BATCH = "1..4"
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

# Flags that mean nothing to a kind of engine: they are refused, not ignored.
RTX = {
    "plugins": "TensorRT-RTX runs no plugins; its graphs do without",
    "version_compatible": "TensorRT-RTX engines are for one version",
    "hardware_compatible": "name the GPUs with --sm instead",
    "timing_cache": "TensorRT-RTX measures nothing while it builds",
}
FULL = {"sm": "TensorRT builds for the GPU it runs on; do that on the machine that is meant"}
LOWERED = dict.fromkeys(
    (
        *("sm", "batch", "max_prompt", "workspace", "plugins", "weights", "timing_cache"),
        *("version_compatible", "hardware_compatible", "output", "force", "memory"),
    ),
    "its graphs are only lowered, nothing is built",
)
REFUSED = {"tensorrt-rtx": RTX, "tensorrt": FULL, "onnxruntime": LOWERED, "openvino": LOWERED}


@dataclass(frozen=True)
class BuildRequest:
    """The flags, None or False where not given. ``sm``, ``workspace`` and ``memory`` are parsed."""

    bundle: Path
    target: Target
    sm: tuple[int, ...] | None = None
    batch: str | None = None
    max_prompt: int | None = None
    workspace: int | None = None
    plugins: Path | None = None
    weights: Weights | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None
    output: Path | None = None
    force: bool = False
    verify: Verify = "sample"
    memory: int | None = None

    def __post_init__(self) -> None:
        """Raises ParameterError for a flag that the target has no use for."""
        for name, reason in REFUSED[self.target.flavour].items():
            if getattr(self, name):
                flag = "-o" if name == "output" else f"--{name.replace('_', '-')}"
                raise ParameterError(f"{flag} is not for --target {self.target.name}: {reason}")
        for sm in self.sm or ():
            if sm not in self.target.sms:
                raise self._no_architecture(sm)
        if not self.target.plugins and self.plugins:
            raise ParameterError(f"--plugins: target {self.target.name} does without plugins")
        if self.target.plugins and self.hardware_compatible and 87 in self.target.sms:
            raise ParameterError("--hardware-compatible: TensorRT has no such thing on a Jetson")

    def _no_architecture(self, sm: int) -> ParameterError:
        targets: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
        for other in targets.values():
            if other.flavour == self.target.flavour and sm in other.sms:
                return ParameterError(f"--sm {sm} is for --target {other.name}")
        return nearest("architecture", str(sm), map(str, self.target.sms))

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(parse_batch(self.batch or DEFAULT_BATCH), self.max_prompt)

    def library(self) -> Path | None:
        """The plugin library for a target with plugins. Raises BackendError if there is none."""
        if not self.target.plugins:
            return None
        named = self.plugins or os.environ.get(PLUGINS)
        mend = "lvlm-build plugins makes liblvlm_plugins.so; give it with --plugins"
        if not named:
            raise BackendError(f"target {self.target.name} needs the plugin library; {mend}")
        path = Path(named)
        if not path.is_file():
            raise BackendError(f"the plugin library {path} does not exist; {mend}")
        return path

    def options(self) -> tuple[str, ...]:
        """The flags that matter to whoever builds the same again, but for the architectures."""
        words: list[str] = []
        for name in ("batch", "max_prompt", "workspace", "plugins", "weights"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        for name in ("version_compatible", "hardware_compatible"):
            words += [f"--{name.replace('_', '-')}"] if getattr(self, name) else []
        return tuple(words)


def parse_architectures(text: str) -> tuple[int, ...]:
    """Numbers from 86,89, from sm_86 or 8.6. Raises ParameterError."""
    words = [word.strip().lower().removeprefix("sm_").replace(".", "") for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise ParameterError(f"--sm {text}: give architectures as 86,89")
    return tuple(sorted({int(word) for word in words}))


def parse_size(text: str, flag: str = "--workspace") -> int:
    """Bytes from 4GB, 512 MiB or 1000000. Raises ParameterError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]i?)?B?", text.strip())
    unit = (found[2] or "").replace("K", "k").replace("ki", "Ki") if found else ""
    if found is None or unit not in UNITS or float(found[1]) <= 0:
        raise ParameterError(f"{flag} {text}: give a size as 4GB or 512MiB")
    size = int(float(found[1]) * UNITS[unit])
    if size < UNITS["k"]:  # 4 was meant as 4GB
        raise ParameterError(f"{flag} {text} is {size:,} bytes; give a size as 4GB or 512MiB")
    return size

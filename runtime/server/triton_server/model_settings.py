"""Settings of a model: flags of ``lvlm-build triton``, which config.pbtxt keeps as parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError, shown
from lvlm.runtime.backends import MEANT, devices

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

    from lvlm.runtime.bundle.manifest import Manifest
    from lvlm.runtime.engine import Engine
    from lvlm.runtime.engine.memory_plan import Memory

KINDS = {int: "an integer", float: "a number", str: "a text"}


def setting(default: Any, kind: type, help: str, metavar: str = "N") -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """Settings that a model is opened with. None: as the engine, or the bundle, has it.

    Raises ParameterError.
    """

    bundle: str = field(default="bundle", metadata={"kind": str})  # in the version's folder
    device: str = setting("cpu", str, f"what to run on: {', '.join(devices())}", "NAME")
    threads: int | None = setting(None, int, "CPU threads (default: the backend's choice)")
    slots: int | None = setting(None, int, "requests that are answered at once (default 4)")
    memory_budget: str | None = setting(None, str, "as many slots as fit, as 2GB", "SIZE")
    max_text_len: int | None = setting(None, int, "shorter prompts and answers: smaller slots")
    max_images: int | None = setting(None, int, "images of a prompt (default: as exported)")
    keep: float | None = setting(
        None, float, "image tokens to keep, where a request says nothing", "R"
    )
    kv_keep: float | None = setting(None, float, "cache entries to keep, likewise", "G")
    defaults: str | None = setting(
        None,
        str,
        "model: draw as the checkpoint's generation_config.json says, where a request says "
        "nothing (default: temperature 0)",
        "NAME",
    )
    chat_template: str | None = field(default=None, metadata={"kind": str})  # beside the bundle
    queue: int = setting(256, int, "requests that may wait")
    image_cache: str = setting("64MB", str, "features of images that are kept", "SIZE")
    media_bytes: int = setting(32 << 20, int, "bytes of an image or a video")
    media_pixels: int = setting(32_000_000, int, "pixels of an image")

    def __post_init__(self) -> None:
        if self.device not in devices():
            raise nearest("device", self.device, devices(), MEANT)
        for name in ("queue", "media_bytes", "media_pixels"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} is {getattr(self, name)}; give 1 or more")

    @property
    def parameters(self) -> dict[str, str]:
        """Those that say something, as texts."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: str(value) for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Self:
        """From the parameters of config.pbtxt; names in capitals are Triton's own."""
        kinds = {each.name: each.metadata["kind"] for each in fields(cls)}
        found: dict[str, Any] = {}
        for name, text in parameters.items():
            if name.isupper():
                continue
            if name not in kinds:
                raise nearest("parameter", name, kinds)
            try:
                found[name] = kinds[name](text)
            except ValueError:
                wanted = KINDS[kinds[name]]
                raise ParameterError(f"{name} is {shown(text)}; give {wanted}") from None
        return cls(**found)

    def usual(self, version: Path | None = None) -> dict[str, Any]:
        """Options where a request says nothing; ``version`` is the folder that a chat template's
        file lies in. Raises ParameterError."""
        from lvlm.runtime.options.generation_options import GenerationOptions
        from lvlm.runtime.options.option_flags import read_text

        given: dict[str, Any] = {"max_image_pixels": self.media_pixels}
        given |= {} if self.defaults is None else {"defaults": self.defaults}
        if self.chat_template is not None and version is not None:
            given["chat_template"] = read_text("chat_template", version / self.chat_template)
        GenerationOptions(**given)  # a mistake shows here
        return given

    def plan(self, manifest: Manifest) -> Memory:
        """The memory that an engine takes, as far as the manifest tells. Raises ParameterError."""
        from lvlm.runtime.engine.memory_plan import plan_memory, slot_capacity
        from lvlm.runtime.generate.call_plan import read_options

        self.usual()
        ratios = read_options(manifest, None, {"keep": self.keep, "kv_keep": self.kv_keep})
        capacity = slot_capacity(
            manifest, self.max_text_len, self.max_images, ratios.keep, ratios.kv_keep
        )
        return plan_memory(manifest, capacity, self.slots, self.memory_budget, self.image_cache)

    def open(self, folder: Path) -> Engine:
        """The engine over the bundle in ``folder``. Raises what Engine raises."""
        from lvlm.runtime.engine import Engine

        return Engine(
            folder,
            device=self.device,
            threads=self.threads,
            slots=self.slots,
            memory_budget=self.memory_budget,
            max_text_len=self.max_text_len,
            max_images=self.max_images,
            keep=self.keep,
            kv_keep=self.kv_keep,
            queue_limit=self.queue,
            image_cache=self.image_cache,
        )

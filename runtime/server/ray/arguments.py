"""Arguments of the application: ``serve run lvlm.runtime.server.ray:app bundle=out/ …``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError, shown
from lvlm.core.integrity import Verify

ENGINE, INGRESS = "Engine", "Ingress"  # the deployments, as files of configuration name them
ROOM = 16  # requests of a replica besides those that its queue and slots take: lists, pages, probes


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_listed)]


class Arguments(BaseModel):
    """Arguments of the application; those that lvlm-serve has, too, mean the same.

    Args:
        bundle: a folder made by lvlm-export, at the same place on every node.
        name: what clients call the model by; None: the folder's name.
        replicas: of the engine; with max_replicas the fewest.
        max_replicas: more are started as requests come, up to so many; None: no autoscaling.
        cpus: that a replica takes, and threads of its engine.
        gpus: that a replica takes, as a part of one, too.
        routing: image: questions about an image go to the replica that has its features;
            load: Ray's own, to the less loaded of two.
        drain: seconds for running answers when a replica is stopped.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    bundle: str = Field(min_length=1)
    name: str | None = None
    replicas: int = Field(default=1, ge=0)
    max_replicas: int | None = Field(default=None, ge=1)
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    routing: Literal["image", "load"] = "image"
    drain: float = Field(default=30, gt=0)

    device: str = "cpu"
    slots: int | None = Field(default=None, ge=1)
    memory_budget: int | str | None = None
    max_text_len: int | None = None
    max_images: int | None = None
    keep: float | None = None
    kv_keep: float | None = None
    defaults: Literal["model"] | None = None
    chat_template: str | None = None
    queue: int = Field(default=256, ge=1)
    image_cache: int | str = "64MB"
    verify: Verify = "sample"

    api_key: Texts = []
    allow_media_domain: Texts = []
    allow_media_path: Texts = []
    allow_origin: Texts = []
    media_bytes: int = Field(default=32 << 20, gt=0)
    media_pixels: int = Field(default=32_000_000, gt=0)
    media_seconds: float = Field(default=10, gt=0)
    body_bytes: int = Field(default=64 << 20, gt=0)
    body_seconds: float = Field(default=60, gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def served_name(self) -> str:
        return self.name or Path(self.bundle).resolve().name

    @property
    def max_slots(self) -> int:
        """Slots that routing and scaling count with: a guess where memory decides."""
        return self.slots or 4

    @property
    def max_ongoing(self) -> int:
        """Requests that Ray sends to a replica: its own queue says when it is full."""
        return self.max_slots + self.queue + ROOM


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Arguments from texts or a file's values. Raises ParameterError."""
    for name in given:
        if name not in Arguments.model_fields:
            raise nearest("argument", name, Arguments.model_fields)
    if "bundle" not in given:
        raise ParameterError("bundle is missing; give a folder made by lvlm-export, bundle=out/")
    try:
        made = Arguments(**given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ParameterError(f"{place} is {shown(first['input'])}: {first['msg']}") from None
    if made.replicas == 0 and made.max_replicas is None:
        raise ParameterError("replicas is 0: nothing would answer; give max_replicas, too")
    if made.max_replicas is not None and made.max_replicas < made.replicas:
        raise ParameterError(
            f"max_replicas is {made.max_replicas}, below replicas, {made.replicas}; give more"
        )
    # Replicas may run elsewhere: what is there here is named by its whole path
    named = {"bundle": made.bundle, "chat_template": made.chat_template}
    whole = {n: os.path.abspath(path) for n, path in named.items() if path and os.path.exists(path)}
    return made.model_copy(update=whole)

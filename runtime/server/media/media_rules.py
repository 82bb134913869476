"""Rules of what a server fetches for its clients, and how much of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lvlm.core.errors import ParameterError, shown
from lvlm.runtime.server.media.web_url import Domain


@dataclass(frozen=True)
class MediaRules:
    """Rules of what a server fetches. Made without arguments: nothing, ``data:`` URLs alone.

    Args:
        allow_domains: hosts to download from. ``example.com`` is that host alone and
            ``*.example.com`` every host below it, both on ports 80 and 443; with a port,
            ``example.com:8443``, on that port alone.
        allow_paths: folders; files in them, at any depth, may be named by their absolute path or
            ``file://`` URL.
        max_bytes: of one image or video.
        seconds: for one download, from the name's resolution to the last byte.

    Raises ParameterError if one of them cannot be used.
    """

    allow_domains: Sequence[str] = ()
    allow_paths: Sequence[str | os.PathLike[str]] = ()
    max_bytes: int = 64 << 20
    seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("allow_domains", "allow_paths"):
            value = getattr(self, name)
            if isinstance(value, str | bytes | os.PathLike):
                raise ParameterError(f"{name} is {shown(value)}; give a list of them")
        if isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int):
            raise ParameterError(f"max_bytes is {shown(self.max_bytes)}; give an integer")
        if self.max_bytes < 1:
            raise ParameterError(f"max_bytes is {self.max_bytes}; give at least 1")
        number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not number or not 0 < self.seconds < math.inf:
            raise ParameterError(f"seconds is {shown(self.seconds)}; give a number above 0")
        _ = self.domains

    @cached_property
    def domains(self) -> tuple[Domain, ...]:
        """``allow_domains``, read."""
        return tuple(Domain.of(text) for text in self.allow_domains)

"""Image processors, one a file: from images to what a bundle's vision graph takes.

A processor module has ``PROCESSOR``, a class with a ``name`` (the module's) that is made from the
bundle's processor config. The modules are found by their file names; only the one that a bundle
needs is imported.
"""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import numpy as np
import numpy.typing as npt

from lvlm.core.discovery import added, loaded, names, nearest
from lvlm.core.errors import BundleError
from lvlm.runtime.media.prepared_image import PreparedImage

if TYPE_CHECKING:
    from PIL import Image


class Processor(Protocol):
    """An image processor. Without state: any thread may call it.

    Where the model's processor in transformers adds to a prompt's text, it has a method
    ``prompt_text`` (prompt, images: how many) that gives the whole, the token that begins a text in
    it.
    """

    name: ClassVar[str]

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """The images uint8 [H_i, W_i, 3] of one prompt, prepared; else ``ImageError``. How many
        tokens each gives depends only on its height and width and on whether it is alone."""


class SquareProcessor(Processor, Protocol):
    """One whose images all become the same grid of patches (Images.grid)."""

    def fit(self, image: npt.NDArray[np.uint8]) -> Image.Image:
        """An image uint8 [H_i, W_i, 3] cut to the vision graph's size, before normalisation."""


def load_processor(config: Mapping[str, object]) -> Processor:
    """The processor that ``config["name"]`` names, made from ``config``, a manifest's (untrusted).

    Raises ``BundleError`` if the name is unknown or the config is not one that the processor takes.
    """
    name = config.get("name")
    if not isinstance(name, str):
        raise BundleError(
            f"the bundle's processor has name {reprlib.repr(name)}, not text; export it again"
        )
    points = added(__name__)
    known = [*names(__name__), *points]
    if name not in known:
        raise BundleError(f"{nearest('processor', name, known)} (a newer lvlm-deploy may know it)")
    module = (
        loaded(points[name]) if name in points else importlib.import_module(f"{__name__}.{name}")
    )
    return cast(Processor, module.PROCESSOR(config))

"""Values of a processor's config: a bundle's, which nobody vouches for, or a checkpoint's."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.core.errors import BundleError, ImageError, ParameterError
from lvlm.runtime.media.images import MAX_PIXELS

MAX_OUTPUT_SIDE = 8_192  # of what a vision graph takes

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def check_keys(config: Mapping[str, object], keys: Collection[str]) -> None:
    """BundleError unless ``config`` has exactly these keys."""
    for key in sorted(set(keys) ^ config.keys()):
        problem = "lacks" if key in keys else "has an unknown key,"
        raise BundleError(f"the processor config {problem} {reprlib.repr(key)}; export again")


def check_growth(image: Image.Image, height: int, width: int) -> None:
    """ImageError if an image is so long and thin that it would get too many pixels on the way."""
    if height * width > MAX_PIXELS:
        ratio = max(image.size) / min(image.size)
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels (aspect ratio {ratio:.0f}:1) "
            f"would grow to {width} x {height} pixels on the way to the model; crop it first"
        )


def pixel_table(factor: object, mean: object, std: object) -> npt.NDArray[np.float32]:
    """float32 [3, 256]: what the 256 levels of each channel become, rounded as by transformers."""
    levels = np.arange(256, dtype=np.float64)
    if factor is not None:
        levels = levels * numbers("rescale_factor", [factor], 1, low=1e-6)[0]
    table = np.repeat(levels.astype(np.float32)[None], 3, axis=0)
    if mean is not None or std is not None:
        shift = np.array(numbers("mean", mean, 3, low=-1e6), np.float32)
        scale = np.array(numbers("std", std, 3, low=1e-6), np.float32)
        table = (table - shift[:, None]) / scale[:, None]
    return table


def planes(
    table: npt.NDArray[np.float32], pixels: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """Pixels [H, W, 3] → float32 [3, H, W], every level as the table says."""
    return np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)])


def height_width(key: str, value: object) -> tuple[int, int]:
    if not isinstance(value, Mapping) or value.keys() != {"height", "width"}:
        raise wrong(key, value, "a height and a width")
    height, width = (
        integer(f"{key} {side}", value[side], 1, MAX_OUTPUT_SIDE) for side in ("height", "width")
    )
    return height, width


def colour(key: str, value: object) -> tuple[int, int, int]:
    if not isinstance(value, Sequence) or len(value) != 3:
        raise wrong(key, value, "three numbers")
    red, green, blue = (integer(key, level, 0, 255) for level in value)
    return red, green, blue


def numbers(key: str, value: object, count: int, low: float) -> list[float]:
    wanted = f"a list of {count}, from {low:g} to 1e+06"
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise wrong(key, value, wanted)
    for number in value:
        usable = isinstance(number, int | float) and not isinstance(number, bool)
        need(usable and low <= number <= 1e6, key, value, wanted)
    return [float(number) for number in value]


def integer(key: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong(key, value, f"an integer from {low} to {high}")
    return value


def text(key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > 1_000:
        raise wrong(key, value, "text")
    return value


def need(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise wrong(key, value, wanted)


def wrong(key: str, value: object, wanted: str) -> BundleError:
    return BundleError(
        f"the processor config has {key} = {reprlib.repr(value)}, but it must be {wanted}"
    )


# Of a checkpoint's preprocessor_config.json


def processor_kind(preprocessor: Mapping[str, object], known: Collection[str]) -> str:
    """The class of an image processor, of any age and backend, as ``known`` has it."""
    named = preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type")
    if not isinstance(named, str):
        raise ParameterError("the checkpoint's image processor names no image_processor_type")
    kind = named.removesuffix("Fast").removesuffix("Pil")
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    if kind not in known:
        supported = ", ".join(known)
        raise ParameterError(
            f"image processor {named!r} is not supported; supported are {supported}"
        )
    return kind


def with_defaults(
    preprocessor: Mapping[str, object], defaults: Mapping[str, object]
) -> dict[str, object]:
    """Absent keys and nulls mean the class's default, as they do in transformers."""
    return {**defaults, **{key: value for key, value in preprocessor.items() if value is not None}}


def size_of(value: object, square: bool) -> object:
    """Old configs have a number or [height, width]; new ones name sides, some with nulls."""
    if isinstance(value, Mapping):
        return {key: side for key, side in value.items() if side is not None}
    if isinstance(value, Sequence) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    return {"height": value, "width": value} if square else {"shortest_edge": value}


def per_channel(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value] * 3


def pixel_options(given: Mapping[str, object]) -> dict[str, object]:
    """Scaling and normalisation of pixels; None: that step is left out."""
    normalised = bool(given["do_normalize"])
    return {
        "resample": given["resample"],
        "rescale_factor": given["rescale_factor"] if given["do_rescale"] else None,
        "mean": per_channel(given["image_mean"]) if normalised else None,
        "std": per_channel(given["image_std"]) if normalised else None,
    }


@contextmanager
def judging(kind: str) -> Iterator[None]:
    """Context in which a processor's error about a checkpoint's config is a ParameterError."""
    try:
        yield
    except BundleError as error:
        raise ParameterError(f"{kind} of the checkpoint cannot be used: {error}") from None

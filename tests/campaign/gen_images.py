"""Images of all formats and modes: whole, damaged, cut short, of sizes that are not theirs."""

from __future__ import annotations

import base64
import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

from campaign.case import Base, Case

WEIGHT = 20
WARM = ("lvlm.runtime.model",)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF", "ICO", "TGA")
DTYPES = ("uint8", "int8", "uint16", "int64", "float32", "float64", "float16", "bool", "object")

_models: dict[Path, Any] = {}


def model_of(bundle: Path) -> Any:
    """Loaded once in a process."""
    from lvlm.runtime.model import load

    if bundle not in _models:
        _models[bundle] = load(bundle)
    return _models[bundle]


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    if rng.random() < 0.25:
        source = _object(rng)
        return Case("generate", (repr(source)[:200],), lambda: _ask(base, source))
    from campaign.mutate import mutate_bytes

    data, suffix = _bomb(rng) if rng.random() < 0.1 else _file(rng)
    if rng.random() < 0.6:
        data = mutate_bytes(rng, data)
    path = folder / f"image.{suffix}"
    path.write_bytes(data)
    given: Any = rng.choice((path, str(path), data, bytearray(data), io.BytesIO(data), "url"))
    if isinstance(given, str) and given == "url":
        given = f"data:image/{suffix.lower()};base64,{base64.b64encode(data).decode()}"
    if rng.random() < 0.15:
        question = (str(base.bundle), "Read it.", "--image", str(path), "--max-new-tokens", "1")
        return Case("lvlm-run", question)
    return Case("generate", (str(path), type(given).__name__), lambda: _ask(base, given))


def _ask(base: Base, source: Any) -> None:
    model_of(base.bundle).generate("What is it?", images=[source], max_new_tokens=1)


def _image(rng: random.Random) -> Any:
    from PIL import Image

    sizes = ((1, 1), (1, 700), (3000, 2), (7, 5), (64, 64), (640, 480), (33, 200))
    width, height = rng.choice(sizes)
    mode = rng.choice(MODES)
    gray = Image.frombytes("L", (width, height), rng.randbytes(width * height))
    if mode == "I;16":
        return gray.convert("I").point(lambda i: i * 256).convert("I;16")
    if mode == "LAB":
        return Image.new("LAB", (width, height))
    return gray.convert("RGBA").convert("LA") if mode == "PA" else gray.convert("RGB").convert(mode)


def _file(rng: random.Random) -> tuple[bytes, str]:
    for _ in range(20):
        image, kind = _image(rng), rng.choice(FORMATS)
        options: dict[str, Any] = {}
        if rng.random() < 0.3:
            exif = image.getexif()
            exif[0x0112] = rng.choice((1, 3, 6, 8, 9, 0))
            options["exif"] = exif
        if rng.random() < 0.2 and kind != "AVIF":  # Pillow 13 ends writing such with signal 11
            options |= {"save_all": True, "append_images": [image.copy()]}
        file = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.save(file, kind, **options)
        except Exception:  # a format that has not this mode
            continue
        return file.getvalue(), kind.lower()
    return b"", "png"


def _bomb(rng: random.Random) -> tuple[bytes, str]:
    """Small files that announce much, or hold much."""
    from PIL import Image

    side = rng.choice((1000, 9000, 20_000, 33_000, 2**31 - 1, 0))
    if rng.random() < 0.5:
        return _png(side, side, zlib.compress(bytes(10_000))), "png"
    if rng.random() < 0.5:
        return b"GIF89a" + struct.pack("<HH", side & 0xFFFF, side & 0xFFFF) + rng.randbytes(
            40
        ), "gif"
    file = io.BytesIO()
    size = min(side, 6000) or 1
    Image.new("L", (size, size)).save(file, rng.choice(("PNG", "WEBP", "TIFF")))
    return file.getvalue(), "png"


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _object(rng: random.Random) -> Any:
    import numpy as np

    if rng.random() < 0.4:
        return _image(rng)
    others = (None, 1, 2.5, "", "http://example.com/a.png", "data:,", "data:image/png;base64,@@")
    if rng.random() < 0.2:
        return rng.choice((*others, [], {}, object(), float("nan"), "\0", "a" * 5000, b""))
    shapes = ((5, 7, 3), (3, 5, 7), (5, 7), (5, 7, 4), (5, 7, 1), (0, 5, 3), (1, 5, 7, 3), (), (9,))
    array = np.random.default_rng(rng.randrange(2**32)).random(rng.choice(shapes)) * rng.choice(
        (1, 255, -3, float("nan"), float("inf"))
    )
    with np.errstate(all="ignore"):
        array = np.asarray(array).astype(rng.choice(DTYPES))
    return array[::-1] if array.ndim and rng.random() < 0.2 else array

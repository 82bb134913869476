"""The atlas of letters and digits that scenes are drawn with: glyphs.png, one row for each font.

    python scripts/draw_glyphs.py --fonts /usr/share/fonts/truetype/dejavu

The fonts are DejaVu's (Debian: fonts-dejavu); their licence lets anybody use what they draw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvlm.calibration.datasets.scenes.glyphs import ATLAS, CHARACTERS, FONTS, TILE

DRAWN = 96  # pixels of the large glyph that a tile is made from


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fonts", type=Path, required=True, help="folder of the .ttf files")
    args = parser.parse_args()
    rows = [
        np.hstack(
            [tile(ImageFont.truetype(args.fonts / f"{font}.ttf", DRAWN), c) for c in CHARACTERS]
        )
        for font in FONTS
    ]
    Image.fromarray(np.vstack(rows)).save(ATLAS, optimize=True)


def tile(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """uint8 [TILE, TILE]: the glyph as high as the tile, in its middle."""
    left, top, right, bottom = font.getbbox(character)
    glyph = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(glyph).text((1 - left, 1 - top), character, 255, font)
    glyph = glyph.crop(glyph.getbbox())
    width = min(TILE, max(1, round(glyph.width * TILE / glyph.height)))
    out = np.zeros((TILE, TILE), np.uint8)
    start = (TILE - width) // 2
    out[:, start : start + width] = np.asarray(
        glyph.resize((width, TILE), Image.Resampling.LANCZOS)
    )
    return out


if __name__ == "__main__":
    main()

"""An image of what token merging keeps: one panel per reduction, patch by patch."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from lvlm.core.errors import ParameterError
from lvlm.runtime.bundle.manifest import Images, Manifest
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.media.images import PILLOW_MAX_PIXELS, ImageSource, open_image
from lvlm.runtime.model import Model
from lvlm.runtime.processors import SquareProcessor

PANEL = 280  # the least height and width of a panel, in pixels
MARGIN, GAP, LINE = 20, 16, 24
BACKGROUND, INK, GRAY = (255, 255, 255), (32, 33, 36), (110, 113, 118)
KEPT_OUTLINE = (186, 192, 200)
DARK = 0.16  # brightness of what was dropped
TINT = 0.62  # how much of a merged patch is its centre's colour

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class PatchToken:
    """A token that is still there: the prompt tokens in it.

    ``members`` are all of them, ``centres`` those whose place it may have kept. A map does not say
    which of the tokens that became one is the centre; their order often does, as places rise from
    token to token. Where it does not, ``centres`` has more than one.
    """

    centres: tuple[int, ...]
    members: tuple[int, ...]


def merge_image(model: Model, images: Sequence[ImageSource], generation: Generation) -> Image.Image:
    """A row of panels per image: the image as the vision tower sees it, then each reduction.

    ``images`` are those that ``generation`` answered about, in order. In a panel, patches that kept
    their token are bright with a thin outline, those that became one token are tinted in one
    colour, with the centre that absorbed the others bright and outlined where it is known, and what
    was dropped is dark. A class token is counted but not drawn.

    Raises ``ParameterError`` for a bundle that merges nothing, or without images; ``ImageError``.
    """
    check_shows(model.manifest)
    processor = cast(SquareProcessor, model.processor)  # there is a grid
    count = int(generation.image_id.max(initial=0))
    if count == 0 or count != len(images):
        raise ParameterError(
            f"the answer is about {count} images and {len(images)} were given; give those"
        )
    states = after_each_reduction(generation)
    palette = _palette(states)
    layers = [r.layer for r in model.manifest.reductions]
    rows = []
    for number, source in enumerate(images, 1):
        seen = processor.fit(open_image(source, PILLOW_MAX_PIXELS))
        scale = -(-PANEL // min(seen.size))
        large = seen.resize((seen.width * scale, seen.height * scale), Image.Resampling.BICUBIC)
        places = np.flatnonzero(generation.image_id == number)
        panels = [(large, f"image {number}: {len(places)} tokens")]
        for layer, tokens in zip(layers, states, strict=True):
            mine = [t for t in tokens if generation.image_id[t.members[0]] == number]
            panel = _panel(large, model.manifest.images, mine, int(places[0]), palette)
            panels.append((panel, f"block {layer}: {len(mine)} of {len(places)} tokens"))
        rows.append(panels)
    return _sheet(rows)


def check_shows(manifest: Manifest) -> None:
    """Raise ``ParameterError`` for a bundle of whose merging no image can be made."""
    if not manifest.reductions:
        raise ParameterError(
            f"recipe '{manifest.recipe}' merges no image tokens, so there is nothing to draw; "
            "export with a recipe that merges (lvlm-export --help-recipe lists them)"
        )
    if manifest.encoder is not None:
        raise ParameterError(
            f"recipe '{manifest.recipe}' drops image tokens before the language model, which are "
            "not drawn; export with one that merges inside it (lightvlm)"
        )
    images = manifest.images
    if not images.grid:
        raise ParameterError(
            f"family {manifest.family} has no fixed grid of patches; its merging cannot be drawn"
        )
    if abs(images.tokens - images.grid[0] * images.grid[1]) > 1:
        raise ParameterError(
            f"{images.tokens} image tokens are not a grid of {images.grid[0]} x {images.grid[1]} "
            "patches; their merging cannot be drawn"
        )


def after_each_reduction(generation: Generation) -> list[list[PatchToken]]:
    """The tokens left after each reduction, in order: a prompt token is named by its index."""
    tokens = [PatchToken((i,), (i,)) for i in range(len(generation.image_id))]
    states = []
    for full in generation.merge_maps:
        tokens = _reduce(tokens, full[: len(tokens)])
        states.append(tokens)
    return states


def _reduce(tokens: Sequence[PatchToken], new_index: np.ndarray) -> list[PatchToken]:
    """``tokens`` after a reduction, whose map is ``new_index`` [len(tokens)]."""
    groups = [
        np.flatnonzero(new_index == j).tolist() for j in range(int(new_index.max(initial=-1)) + 1)
    ]
    # A token's place is above the one before and below the one after: the least and the largest
    low, high = [0] * len(groups), [0] * len(groups)
    last = -1
    for j, group in enumerate(groups):
        last = low[j] = min(i for i in group if i > last)
    last = len(tokens)
    for j in reversed(range(len(groups))):
        last = high[j] = max(i for i in groups[j] if i < last)
    reduced = []
    for group, smallest, largest in zip(groups, low, high, strict=True):
        centres = [c for i in group if smallest <= i <= largest for c in tokens[i].centres]
        members = [m for i in group for m in tokens[i].members]
        reduced.append(PatchToken(tuple(centres), tuple(sorted(members))))
    return reduced


def _palette(states: Sequence[Sequence[PatchToken]]) -> dict[int, Colour]:
    """A colour for each centre, the same in all panels; hues far apart one after another."""
    merged = [t.centres[0] for tokens in states for t in tokens if len(t.members) > 1]
    palette = {}
    for number, centre in enumerate(dict.fromkeys(merged)):
        lightness = (0.55, 0.68)[number % 2]
        red, green, blue = colorsys.hls_to_rgb(0.02 + number * 0.618034 % 1, lightness, 0.9)
        palette[centre] = (round(255 * red), round(255 * green), round(255 * blue))
    return palette


def _panel(
    image: Image.Image,
    images: Images,
    tokens: Sequence[PatchToken],
    first: int,
    palette: dict[int, Colour],
) -> Image.Image:
    """``image`` with its patches as kept, merged or dropped; ``first``: its first token in
    the prompt."""
    rows, columns = images.grid
    # Pixels beyond the last whole patch reach no token
    high, wide = (
        side // count * (shown // side)
        for side, count, shown in zip(images.size, images.grid, image.size[::-1], strict=True)
    )
    panel = ImageEnhance.Brightness(image).enhance(DARK)
    draw = ImageDraw.Draw(panel)
    shift = first + images.tokens - rows * columns

    def box(token: int) -> tuple[int, int, int, int] | None:
        patch = token - shift
        if patch < 0:
            return None  # a class token
        top, left = patch // columns * high, patch % columns * wide
        return left, top, left + wide, top + high

    outlines: list[tuple[tuple[int, int, int, int], Colour, int]] = []
    for token in tokens:
        colour = palette[token.centres[0]] if len(token.members) > 1 else None
        for member in token.members:
            if (place := box(member)) is None:
                continue
            patch = image.crop(place)
            left, top, right, bottom = place
            edges = (left, top, right - 1, bottom - 1)
            if colour is None:
                outlines.append((edges, KEPT_OUTLINE, 1))
            elif token.centres == (member,):
                outlines.append((edges, colour, max(2, min(high, wide) // 8)))
            else:
                patch = Image.blend(patch, Image.new("RGB", patch.size, colour), TINT)
            panel.paste(patch, place)
    for edges, colour, width in sorted(outlines, key=lambda outline: outline[2]):
        draw.rectangle(edges, outline=colour, width=width)
    return panel


def _sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Panels with their captions, row by row, and a legend below."""
    font = ImageFont.load_default(size=15)
    width = max(sum(p.width + GAP for p, _ in row) - GAP for row in rows) + 2 * MARGIN
    height = sum(max(p.height for p, _ in row) + LINE + GAP for row in rows) + LINE + 2 * MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row in rows:
        left, tallest = MARGIN, max(p.height for p, _ in row)
        for panel, caption in row:
            sheet.paste(panel, (left, top))
            draw.text((left, top + panel.height + 5), caption, INK, font)
            left += panel.width + GAP
        top += tallest + LINE + GAP
    _legend(draw, MARGIN, top + 4, font)
    return sheet


def _legend(
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    colour = (214, 72, 60)
    blend = tuple(round(TINT * c + (1 - TINT) * 150) for c in colour)
    for fill, outline, text in (
        ((150, 150, 150), GRAY, "kept as it was"),
        (blend, None, "one colour: merged into one token"),
        ((150, 150, 150), colour, "its centre, where known"),
        ((36, 36, 36), None, "dropped"),
    ):
        width = 3 if outline == colour else 1
        draw.rectangle((left, top, left + 15, top + 15), fill, outline, width)
        draw.text((left + 22, top - 1), text, GRAY, font)
        left += 22 + round(draw.textlength(text, font)) + 26

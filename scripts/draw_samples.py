"""The pictures of assets/samples: nine digits, and four on a quieter canvas, all held out.

python scripts/draw_samples.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lvlm.calibration.datasets.scenes.drawing import Density, Scene, draw_scene
from lvlm.calibration.datasets.scenes.glyphs import DIGITS

FOLDER = Path(__file__).parents[1] / "assets/samples"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pictures: tuple[tuple[Density, int], ...] = (("dense", 9), ("middle", 4))
    for number, (density, things) in enumerate(pictures, 1):
        scene = of_digits(density, things)
        print(", ".join(f"{t.colour} {t.name}" for t in scene.things))
        Image.fromarray(scene.image).save(FOLDER / f"digits-{number}.png", optimize=True)


def of_digits(density: Density, things: int) -> Scene:
    """The first scene drawn that has so many things, digits that differ, in several colours."""
    for seed in range(10_000):
        scene = draw_scene(np.random.default_rng(seed), "heldout", density)
        names = {t.name for t in scene.things}
        colours = {t.colour for t in scene.things}
        if len(scene.things) != things or not names <= set(DIGITS):
            continue
        if len(names) > things * 0.7 and len(colours) > things / 2:
            return scene
    raise LookupError("no scene of digits")


if __name__ == "__main__":
    main()

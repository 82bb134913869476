"""The images of assets/samples: nine digits, and five on a quieter canvas, all held out.

python scripts/draw_samples.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lvlm.calibration.datasets.scenes.drawing import Density, draw_scene

FOLDER = Path(__file__).parents[1] / "assets/samples"
# Of the scenes that hold digits alone, of several colours: two that lightvlm reads as well
DRAWN: tuple[tuple[Density, int], ...] = (("dense", 164), ("middle", 204))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for number, (density, seed) in enumerate(DRAWN, 1):
        scene = draw_scene(np.random.default_rng(seed), "heldout", density)
        print(", ".join(f"{t.colour} {t.name}" for t in scene.things))
        Image.fromarray(scene.image).save(FOLDER / f"digits-{number}.png", optimize=True)


if __name__ == "__main__":
    main()

"""What fewer image tokens cost ``tiny-llava``: exact answers by how much is left and how dense a
picture is, for every way to shorten images.

    python scripts/eval_reductions.py --work /tmp/reductions
    python scripts/eval_reductions.py --work /tmp/reductions --rows none divprune

What is left is the mean over the blocks of the image tokens that enter them, of those of the whole
picture, so that rows compare at equal memory and about equal work. Bundles are exported once, below
--work; each cell is written to results.jsonl there when it is done, and is not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lvlm
from lvlm.calibration.datasets.scenes.drawing import DENSITIES, Scene, draw_scene
from lvlm.calibration.datasets.scenes.questions import KINDS, ask
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.kv.image_tokens import keep_ratios, tokens_per_layer

LEFT = (0.33, 0.22, 0.11, 0.06)
ROWS: dict[str, tuple[str, ...]] = {
    "none": ("none",),
    "visionzip": ("visionzip",),
    "divprune": ("divprune",),
    "divprune, closed up": ("divprune", "places=closed"),
    "random": ("random",),
    "strided": ("strided",),
    "hybrid": ("hybrid",),
    "hybrid of visionzip": ("hybrid", "encoder=visionzip"),
    "lightvlm": ("lightvlm", "kv=none"),
    "lightvlm, drop": ("lightvlm", "kv=none", "merge=drop"),
    "lightvlm, nearest": ("lightvlm", "kv=none", "merge=nearest"),
    "lightvlm, last": ("lightvlm", "kv=none", "importance=last"),
    "lightvlm, both": ("lightvlm", "kv=none", "importance=both"),
    "lightvlm at 2, last": ("lightvlm", "kv=none", "stages=[2]", "importance=last"),
    "lightvlm at 2, 4": ("lightvlm", "kv=none", "stages=[2,4]"),
    "lightvlm at 2, 4, last": ("lightvlm", "kv=none", "stages=[2,4]", "importance=last"),
    "lightvlm at 2, 4, 6": ("lightvlm", "kv=none", "stages=[2,4,6]"),
    "lightvlm at 2, 4, 6, last": ("lightvlm", "kv=none", "stages=[2,4,6]", "importance=last"),
    "fastv": ("fastv",),
    "pyramiddrop": ("pyramiddrop",),
}
ASKED = tuple(kind for kind in KINDS if kind not in ("pictures", "turns"))
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=420, help="of each cell's three densities")
    parser.add_argument("--left", nargs="+", type=float, default=list(LEFT), help="parts of tokens")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(r["row"], r["left"], r["questions"]): r for r in map(json.loads, lines)}
    asked = list(questions(args.questions))
    for row in args.rows:
        with lvlm.load(exported(row, args.work)) as model:
            for left in (1.0,) if row == "none" else args.left:
                if (row, left, args.questions) in done:
                    continue
                keep = keep_for(model.manifest, left)
                result = {"row": row, "left": left, "questions": args.questions, "keep": keep}
                if keep is not None:
                    result |= {"right": measured(model, keep, asked)}
                with file.open("a") as out:
                    print(json.dumps(result), file=out)
                done[row, left, args.questions] = result
    print(table([done[key] for key in done if key[0] in args.rows and key[2] == args.questions]))


def questions(count: int) -> Iterator[tuple[Scene, str, str]]:
    """Held-out pictures of each density with a question and its answer, the kinds in turn."""
    rng = np.random.default_rng([17, count])
    for number in range(count):
        scene = draw_scene(rng, "heldout", DENSITIES[number % 3])
        ((question, answer),) = ask((scene,), ASKED[number // 3 % len(ASKED)], rng)
        yield scene, question, answer


def exported(row: str, work: Path) -> Path:
    recipe, *settings = ROWS[row]
    folder = work / "-".join(ROWS[row]).replace("=", "_")
    if not (folder / "lvlm.json").exists():
        command = [sys.executable, "-m", "lvlm", "export", "-m", "tiny-llava", "-r", recipe]
        command += [word for setting in settings for word in ("--set", setting)]
        command += ["-o", str(folder), "--dtype", "fp32", "--no-validate", "--quiet"]
        subprocess.run(command, check=True)
    return folder


def keep_for(manifest: Manifest, left: float) -> float | None:
    """The ``keep`` by which that part of the image tokens enters the blocks, on average; None where
    even none at all would leave more."""
    tokens, layers = manifest.images.tokens, manifest.text.layers

    def entering(keep: float) -> float:
        ratios = keep_ratios(manifest.shortenings, manifest.keep, keep)
        counts = tokens_per_layer(manifest.shortenings, ratios, tokens, layers)
        return sum(counts) / layers / tokens

    if left == 1 or not manifest.shortenings:
        return 1.0
    low, high = 1e-6, 1.0
    if entering(low) > left:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if entering(middle) <= left else (low, middle)
    return low


def measured(
    model: lvlm.Model, keep: float, asked: Sequence[tuple[Scene, str, str]]
) -> dict[str, list[int]]:
    """By density: answers that are right, and all."""
    found: dict[str, list[int]] = {density: [0, 0] for density in DENSITIES}
    given: dict[str, Any] = {} if keep == 1 else {"keep": keep}
    for first in range(0, len(asked), BATCH):
        some = asked[first : first + BATCH]
        texts, images = [question for _, question, _ in some], [[s.image] for s, _, _ in some]
        answers = model.generate(texts, images, max_new_tokens=240, **given)
        for (scene, _, wanted), answer in zip(some, answers, strict=True):
            found[scene.density][0] += answer.text.strip() == wanted
            found[scene.density][1] += 1
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Percent of exact answers, with the half width of the 95 % interval."""
    lines = [
        f"| reduction | left | {' | '.join(DENSITIES)} | all |",
        "| --- | --: " + "| --: " * 4 + "|",
    ]
    for result in results:
        cells = ["not reached"] * 4
        if "right" in result:
            parts = [result["right"][density] for density in DENSITIES]
            cells = [
                share(*part)
                for part in (*parts, [sum(column) for column in zip(*parts, strict=True)])
            ]
        lines.append(f"| {result['row']} | {100 * result['left']:.0f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(right: int, count: int) -> str:
    """Wilson's interval, rounded outwards."""
    z, part = 1.96, right / count
    half = z / (1 + z * z / count) * math.sqrt(part * (1 - part) / count + z * z / (4 * count**2))
    return f"{100 * part:.1f} ± {100 * half:.1f}"


if __name__ == "__main__":
    main()

"""Answers of a bundle to held-out digit questions: exact matches per kind and keep ratio.

    python scripts/accuracy_digits.py out/none out/lightvlm --keep 0.35 0.15 0.03

A bundle without token merging is asked once, one with merging once per keep ratio.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import lvlm
from lvlm.calibration.datasets import digits

KINDS: tuple[digits.Kind, ...] = ("cell", "row", "count", "describe")
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.35, 0.15, 0.03])
    parser.add_argument("--questions", type=int, default=400)
    args = parser.parse_args()
    print(
        f"{args.questions} held-out questions, greedy; exact matches; digits: of all digits named"
    )
    print("| recipe | image tokens by block | all | " + " | ".join(KINDS) + " | digits |")
    print("| --- " * (len(KINDS) + 4) + "|")
    for bundle in args.bundles:
        with lvlm.load(bundle) as model:
            keeps = args.keep if model.manifest.shortenings else [1.0]
            for keep in keeps:
                name = model.manifest.recipe + (f" keep {keep}" if keep != 1.0 else "")
                print(f"| {name} | {row(model, keep, args.questions)} |", flush=True)


def row(model: lvlm.Model, keep: float, questions: int) -> str:
    right: dict[str, list[bool]] = defaultdict(list)
    digit_right: list[bool] = []
    entering: tuple[int, ...] = ()
    samples = list(digits.samples("heldout", questions, seed=11))
    for first in range(0, len(samples), BATCH):
        some = samples[first : first + BATCH]
        answers = model.generate(
            [q.question for _, q in some],
            [[g.image] for g, _ in some],
            max_new_tokens=96,
            keep=keep,
        )
        for (_, question), answer in zip(some, answers, strict=True):
            said = answer.text.strip()
            right[question.kind].append(said == question.answer)
            wanted = [c for c in question.answer if c.isdigit()]
            given = [c for c in said if c.isdigit()][: len(wanted)]
            given += [""] * (len(wanted) - len(given))
            digit_right += [a == b for a, b in zip(wanted, given, strict=True)]
            entering = answer.stats.image_tokens_per_layer
    flat = [ok for kind in KINDS for ok in right[kind]]
    pyramid = " ".join(map(str, entering))
    cells = [pyramid, share(flat), *(share(right[k]) for k in KINDS), share(digit_right)]
    return " | ".join(cells)


def share(values: list[bool]) -> str:
    return f"{100 * sum(values) / max(1, len(values)):.1f} %"


if __name__ == "__main__":
    main()

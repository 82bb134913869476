"""Ask bundles one question about one image and print what each took, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import lvlm
from lvlm.runtime.generate.answers import Generation

RUNS = 7  # medians of these, after one to warm up
SAMPLE = Path(__file__).parents[1] / "assets/samples/digits-1.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--image", type=Path, default=SAMPLE)
    parser.add_argument("--question", default="Describe the picture.")
    args = parser.parse_args()
    print(f"\n{args.image.name}: {args.question}\n")
    print(
        f"{'recipe':9} {'image tokens':>22} {'prefill ms':>11} {'decode tok/s':>13} {'cache kB':>9}"
    )
    answers = []
    for bundle in args.bundles:
        with lvlm.load(bundle) as model:
            runs = [model.generate(args.question, [args.image]) for _ in range(RUNS + 1)][1:]
        answer = runs[-1]
        answers.append((bundle.name, answer))
        prefill = median(run.stats.prefill_ms for run in runs)
        speed = median(run.stats.decode_tokens_per_second for run in runs)
        print(
            f"{bundle.name:9} {stages(answer):>22} {prefill:11.1f} {speed:13.0f} "
            f"{answer.stats.cache_bytes_used / 1e3:9.0f}"
        )
    for name, answer in answers:
        print(f"\n{name}: {answer.text.strip()}")


def stages(answer: Generation) -> str:
    """576 → 406 → 286 → 202: image tokens, each time they change from block to block."""
    counts = answer.stats.image_tokens_per_layer
    return " → ".join(str(n) for i, n in enumerate(counts) if i == 0 or n != counts[i - 1])


if __name__ == "__main__":
    main()

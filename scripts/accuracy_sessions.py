"""What keeping a compressed cache from turn to turn costs: the second question about an image.

    lvlm-export -m tiny-llava -r snapkv --set kv_keep=1.0 --sessions -o out/snapkv
    python scripts/accuracy_sessions.py out/snapkv --kv-keep 0.5 0.2 0.1

Every image is asked two questions in one conversation. The second one is answered behind what the
first turn left in the cache (a session), and with the whole conversation read anew, whose cache is
then chosen by the second question. Counted are exact matches of second answers, greedy, and how
many of the answers are the same. A bundle with recipe none shows what the model itself can do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.calibration.datasets import digits
from lvlm.calibration.datasets.digits import Question
from lvlm.runtime.engine import Engine, Session

FIRST: tuple[digits.Kind, ...] = ("row", "cell", "count")
SECOND: tuple[digits.Kind, ...] = ("cell", "row", "count", "cell")
Message = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--kv-keep", nargs="+", type=float, default=[0.5, 0.2, 0.1])
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    print("| recipe | kv_keep | with a session | read anew | same answers | reused tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    for folder in args.bundles:
        with Engine(folder, slots=2, verify="none") as engine:
            compressed = engine.manifest.cache_policy is not None
            for kv_keep in args.kv_keep if compressed else [None]:
                print(f"| {engine.manifest.recipe} | {kv_keep} | {row(engine, kv_keep, args)}")


def row(engine: Engine, kv_keep: float | None, args: argparse.Namespace) -> str:
    """The cells of one ratio."""
    rng = np.random.default_rng(5)
    right = np.zeros((args.images, 2), bool)
    same = reused = 0
    for number in range(args.images):
        grid = digits.draw_grid(rng, "heldout")
        first, second = (
            digits.ask(grid, kinds[number % len(kinds)], rng) for kinds in (FIRST, SECOND)
        )
        with engine.session() as session:
            talk = [user(first, grid.image)]
            answer = ask(engine, talk, kv_keep, session)[0]
            talk += [{"role": "assistant", "content": answer}, user(second)]
            kept, tokens = ask(engine, talk, kv_keep, session)
        anew, _ = ask(engine, talk, kv_keep, None)
        right[number] = kept == second.answer, anew == second.answer
        same += kept == anew
        reused += tokens
    cells = [f"{share:.1%}" for share in (*right.mean(0), same / args.images)]
    return f"{' | '.join(cells)} | {reused / args.images:.0f} |"


def ask(
    engine: Engine, talk: list[Message], kv_keep: float | None, session: Session | None
) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were not read for it."""
    answer = engine.generate(talk, session=session, kv_keep=kv_keep, max_new_tokens=80)
    return answer.text.strip(), answer.stats.reused_tokens


def user(question: Question, image: np.ndarray | None = None) -> Message:
    """A question as a message, which shows an image."""
    shown = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*shown, {"type": "text", "text": question.question}]}


if __name__ == "__main__":
    main()

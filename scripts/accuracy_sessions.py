"""Cost of keeping a compressed cache from turn to turn: the second question about an image.

    lvlm-export -m tiny-llava -o out/none
    lvlm-export -m tiny-llava -r snapkv --set kv_keep=1.0 --sessions -o out/snapkv
    python scripts/accuracy_sessions.py out/none out/snapkv --kv-keep 0.5 0.2

Every image is asked two questions in one conversation. The second one is answered behind what the
first turn left in the cache (a session), and with the whole conversation read anew, whose cache is
then chosen by the second question. Both are compared with the answer of the first bundle, which
compresses nothing: whether the first token is the same, and how many tokens are before the first
other one.
Left out are conversations that no session goes on with: an answer that is tokenized otherwise.
"""

from __future__ import annotations

import argparse
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.calibration.datasets.scenes.drawing import DENSITIES, draw_scene
from lvlm.calibration.datasets.scenes.questions import Kind, ask
from lvlm.runtime.engine import Engine, Session
from lvlm.runtime.generate.answers import Generation

FIRST: tuple[Kind, ...] = ("row", "read", "count")
SECOND: tuple[Kind, ...] = ("read", "row", "list", "count")
Message = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("none", type=Path, help="the bundle that compresses nothing")
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--kv-keep", nargs="+", type=float, default=[0.5, 0.2])
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    print("| recipe | kv_keep | of | session: first token | tokens | anew: first token | tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with Engine(args.none, slots=1, verify="none") as whole:
        for folder in args.bundles:
            with Engine(folder, slots=1, verify="none") as engine:
                for kv_keep in args.kv_keep:
                    cells = row(whole, engine, kv_keep, args.images)
                    print(f"| {engine.manifest.recipe} | {kv_keep} | {cells}", flush=True)


def row(whole: Engine, engine: Engine, kv_keep: float, images: int) -> str:
    """The cells of one ratio."""
    rng, alike = np.random.default_rng(5), list[tuple[int, int]]()
    for number in range(images):
        scene = draw_scene(rng, "heldout", DENSITIES[number % 3])
        (first, _), (second, _) = (
            ask((scene,), kinds[number % len(kinds)], rng)[0] for kinds in (FIRST, SECOND)
        )
        with engine.session() as session:
            talk = [user(first, scene.image)]
            said = answer(engine, talk, kv_keep, session).text
            talk += [{"role": "assistant", "content": said}, user(second)]
            kept = answer(engine, talk, kv_keep, session)
        if not kept.stats.reused_tokens:
            continue
        anew = answer(engine, talk, kv_keep, None)
        wanted = answer(whole, talk, None, None)
        alike.append((common(kept, wanted), common(anew, wanted)))
    counts = np.array(alike)
    cells = (f"{np.mean(n > 0):.0%} | {np.mean(n):.1f}" for n in counts.T)
    return f"{len(alike)} | {' | '.join(cells)} |"


def common(one: Generation, other: Generation) -> int:
    """The number of first tokens that are the same."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def answer(
    engine: Engine, talk: list[Message], kv_keep: float | None, session: Session | None
) -> Generation:
    """The answer to the last message."""
    found: Generation = engine.generate(talk, session=session, kv_keep=kv_keep, max_new_tokens=40)
    return found


def user(question: str, image: np.ndarray | None = None) -> Message:
    """A question as a message, which shows an image."""
    shown = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*shown, {"type": "text", "text": question}]}


if __name__ == "__main__":
    main()

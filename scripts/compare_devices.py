"""Does a bundle answer on this machine's device as it answered elsewhere, token for token?

    python scripts/compare_devices.py out/none out/lightvlm --device cpu --write tokens.json
    python scripts/compare_devices.py out/none out/lightvlm --device cuda --expect tokens.json

Greedy answers of tiny-llava's kind: one picture, none, and a ragged batch with both. --write keeps
them; --expect compares, and ends with 1 if a token differs. The GPU need not be where the file was
written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import resources
from pathlib import Path

import lvlm

NEW = 64
QUESTIONS = ("Describe the picture.", "Read row 1:", "What is in the middle?")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--device", default="cpu", help="as lvlm-run takes it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--expect", type=Path, metavar="FILE")
    args = parser.parse_args()
    expected = json.loads(args.expect.read_text()) if args.expect else {}
    found: dict[str, list[list[int]]] = {}
    differ = 0
    for bundle in args.bundles:
        began = time.perf_counter()
        try:
            tokens = found[bundle.name] = answers(bundle, args.device)
        except lvlm.LvlmError as error:
            print(f"{bundle.name}: {error}", flush=True)
            differ += 1
            continue
        seconds = time.perf_counter() - began
        if args.expect is None:
            print(f"{bundle.name}: {sum(map(len, tokens))} tokens, {seconds:.1f} s", flush=True)
            continue
        right = expected[bundle.name]
        wrong = sum(
            first_difference(ours, theirs) < max(len(ours), len(theirs))
            for ours, theirs in zip(tokens, right, strict=True)
        )
        places = [first_difference(a, b) for a, b in zip(tokens, right, strict=True)]
        print(
            f"{bundle.name}: {len(right) - wrong} of {len(right)} answers equal, "
            f"equal tokens {places} of {[len(r) for r in right]}, {seconds:.1f} s",
            flush=True,
        )
        differ += wrong
    if args.write is not None:
        args.write.write_text(json.dumps(found))
    return 1 if differ else 0


def answers(bundle: Path, device: str) -> list[list[int]]:
    picture = (resources.files("lvlm.assets") / "samples/digits-1.png").read_bytes()
    with lvlm.load(bundle, device=device) as model:
        alone = [model.generate(q, images=[picture], max_new_tokens=NEW) for q in QUESTIONS]
        batch = model.generate(
            ["Hello", *QUESTIONS[:2]], images=[[], [picture], [picture]], max_new_tokens=NEW
        )
        return [list(answer.token_ids) for answer in (*alone, *batch)]


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """How many tokens at the start are equal."""
    equal = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        equal += 1
    return equal


if __name__ == "__main__":
    sys.exit(main())

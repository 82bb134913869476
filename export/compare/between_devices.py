"""A bundle's answers on this machine's device beside those elsewhere, token for token."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lvlm.core.errors import LvlmError, ParameterError
from lvlm.runtime.model import load

NEW = 64
QUESTIONS = ("Describe the picture.", "Read row 1:", "What is in the middle?")


def compare(
    bundles: Sequence[Path], device: str, *, write: Path | None, expect: Path | None
) -> int:
    """The exit status of ``lvlm-compare devices``: 1 if a token differs or a bundle cannot run.

    Greedy answers of tiny-llava's kind: one image, none, and a ragged batch with both. Raises
    ParameterError where the file of ``expect`` has not these bundles' tokens.
    """
    expected = _expected(expect, bundles) if expect else {}
    found: dict[str, list[list[int]]] = {}
    differ = 0
    for bundle in bundles:
        began = time.perf_counter()
        try:
            tokens = found[bundle.name] = answers(bundle, device)
        except LvlmError as error:
            print(f"{bundle.name}: {error}", flush=True)
            differ += 1
            continue
        seconds = time.perf_counter() - began
        if expect is None:
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
    if write is not None:
        write.write_text(json.dumps(found))
    return 1 if differ else 0


def answers(bundle: Path, device: str) -> list[list[int]]:
    image = (resources.files("lvlm.assets") / "samples/digits-1.png").read_bytes()
    with load(bundle, device=device) as model:
        alone = [model.generate(q, images=[image], max_new_tokens=NEW) for q in QUESTIONS]
        batch = model.generate(
            ["Hello", *QUESTIONS[:2]], images=[[], [image], [image]], max_new_tokens=NEW
        )
        return [list(answer.token_ids) for answer in (*alone, *batch)]


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """Number of tokens at the start that are equal."""
    equal = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        equal += 1
    return equal


def _expected(file: Path, bundles: Sequence[Path]) -> dict[str, list[list[int]]]:
    try:
        found: dict[str, list[list[int]]] = json.loads(file.read_text())
        missing = {bundle.name for bundle in bundles} - set(found)
    except (ValueError, TypeError):
        raise ParameterError(f"{file} is no file that --write made") from None
    if missing:
        raise ParameterError(f"{file} has no tokens of {min(missing)}; make them with --write")
    return found

"""A recipe whose entries do not depend on the question: those of an image serve the next one.

The recipe is one file, this one; nothing else knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from engine_tools import same_images
from exports import share_traces
from filelock import FileLock
from parity_tools import IMAGES

import lvlm
from lvlm.core.progress import Progress
from lvlm.export import exporter
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.parts.pyramid import Pyramid
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.recipes.recipe import Recipe, TokenReduction, parameter
from lvlm.export.standard_ops import Tap
from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.model import Model

OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "chat_template": False, "ignore_eos": True}
FIRST = "USER: <image>\nDescribe the picture. ASSISTANT:"
SECOND = "USER: <image>\nWhich digit is in the top row? ASSISTANT:"
BOTH = "USER: <image>\nDescribe <image>\nit. ASSISTANT:"


@dataclass(frozen=True)
class Loudest(Pyramid):
    """Image tokens by the size of their own hidden states, which later tokens have no part in."""

    def scores(
        self, state: TokenSequence, tap: Tap, inputs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        del tap, inputs
        return state.hidden.float().abs().mean(dim=-1)


@dataclass(frozen=True)
class KeepLoudest(Recipe):
    """Half of the image tokens, from the third block on."""

    name: ClassVar[str] = "loudest"
    summary: ClassVar[str] = "the loudest image tokens stay"
    source: ClassVar[str] = "this test"
    question_free: ClassVar[bool] = True

    keep: float = parameter(0.5, "fraction of the image tokens that stays")

    def token_reduction(self) -> TokenReduction:
        return Loudest((2,), None, "last", "drop", recycle=0.5, absorb=1)


@pytest.fixture(scope="module")
def folder(shared: Path, checkpoint: Callable[[str], Path]) -> Path:
    """A bundle with that recipe, which its export has compared with its torch reference."""
    folder = shared / "loudest"
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return folder
        plan = make_plan(
            ExportOptions(
                str(checkpoint("digits-llava")), KeepLoudest(), folder, dtype="fp32", max_images=2
            )
        )
        with pytest.MonkeyPatch.context() as patch:
            share_traces(patch, shared)
            exporter.export(plan, Progress(0, quiet=True))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with lvlm.load(folder) as model:
        yield model


def answer(engine: Engine | Model, text: str, *images: int, **options: Any) -> Generation:
    found: Generation = engine.generate(text, [IMAGES[i] for i in images], **(OPTIONS | options))
    return found


def equal(ours: Generation, theirs: Generation) -> None:
    assert ours.token_ids == theirs.token_ids
    assert ours.stats.kept_per_layer == theirs.stats.kept_per_layer
    assert ours.stats.tokens_per_layer == theirs.stats.tokens_per_layer
    assert ours.stats.cache_bytes_used == theirs.stats.cache_bytes_used
    same_images(ours, theirs)


def test_an_image_is_read_once_for_many_questions(model: Model) -> None:
    tokens = model.manifest.images.tokens
    with Engine(model.folder, slots=3) as engine:
        assert answer(engine, FIRST, 0).stats.reused_tokens == 0
        for text in (SECOND, FIRST, "USER: <image>\nWhy? ASSISTANT:"):
            ours = answer(engine, text, 0)
            equal(ours, answer(model, text, 0))
            assert ours.stats.reused_tokens > tokens
            assert len(set(ours.stats.tokens_per_layer)) == 2
        drawn = {"n": 2, "temperature": 0.7, "seed": 3}
        several, theirs = answer(engine, SECOND, 0, **drawn), answer(model, SECOND, 0, **drawn)
        assert several.stats.reused_tokens
        for one, other in zip(several.others, theirs.others, strict=True):
            equal(one, other)


def test_what_is_read_as_a_whole(model: Model) -> None:
    """Another image; one more, which would be merged, too; another ratio."""
    with Engine(model.folder, slots=3) as engine:
        answer(engine, FIRST, 0)
        for text, images, options in (
            (FIRST, (1,), {}),
            (BOTH, (0, 1), {}),
            (SECOND, (0,), {"keep": 0.25}),
        ):
            ours = answer(engine, text, *images, **options)
            equal(ours, answer(model, text, *images, **options))
            assert ours.stats.reused_tokens == 0
    with Engine(model.folder, slots=2, reuse_prefixes=False) as engine:
        answer(engine, FIRST, 0)
        assert answer(engine, SECOND, 0).stats.reused_tokens == 0


def test_a_conversation_goes_on(model: Model) -> None:
    """A session's turn, and another question about its image beside it."""
    with Engine(model.folder, slots=4) as engine, engine.session() as session:
        said = answer(engine, FIRST, 0, session=session)
        text = f"{FIRST}{said.text}</s>USER: Why? ASSISTANT:"
        ours = answer(engine, text, 0, session=session)
        equal(ours, answer(model, text, 0))
        assert ours.stats.reused_tokens >= said.stats.prompt_tokens  # up to what is written anew
        equal(answer(engine, SECOND, 0), answer(model, SECOND, 0))

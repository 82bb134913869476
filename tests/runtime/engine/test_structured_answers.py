"""Answers of a structure from a model and an engine, alone and beside others."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, one_line
from engine_tools import IMAGES, OTHERS, QUESTION, WAIT, answers, idle, same

import lvlm
from lvlm.core.errors import ParameterError
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.model import Model
from lvlm.runtime.run_cli import main

pytest.importorskip("llguidance", reason="llguidance (extra structured) is not installed")

SCHEMA = {
    "type": "object",
    "properties": {
        "row": {"type": "string", "pattern": "^[0-9]{1,3}$"},
        "sure": {"type": "boolean"},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["row", "sure", "colour"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {"prompt": QUESTION, "images": IMAGES[:1]}
DRAWN: dict[str, Any] = {"temperature": 1.2, "seed": 5}
NO_END = 'start: "a" b\nb: b "c"'  # passes at first, and cannot be followed then


def check_json(answer: Generation) -> None:
    value = json.loads(answer.text)
    assert list(value) == ["row", "sure", "colour"]
    assert re.fullmatch("[0-9]{1,3}", value["row"])
    assert isinstance(value["sure"], bool)
    assert value["colour"] in ("red", "green")
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


Both = tuple[Model, Engine]


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[Both]:
    with lvlm.load(folder) as model, Engine(folder, slots=4) as engine:
        yield model, engine
        idle(engine)


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_json_that_fits(both: Both, options: dict[str, Any]) -> None:
    model, engine = both
    alone = model.generate(**ASKED, schema=SCHEMA, **options)
    check_json(alone)
    same(engine.generate(**ASKED, schema=json.dumps(SCHEMA), **options), alone)
    stream = engine.stream(**ASKED, schema=SCHEMA, **options)
    assert "".join(stream) == alone.text
    assert stream.result is not None
    check_json(stream.result)


def test_several_answers_and_a_list_of_prompts(both: Both) -> None:
    model, _ = both
    alone = [
        model.generate(**ASKED, schema=SCHEMA, temperature=1.2, seed=seed) for seed in range(2)
    ]
    for who in both:
        two = who.generate(**ASKED, schema=SCHEMA, temperature=1.2, seed=0, n=2)
        for ours, theirs in zip((two, *two.others), alone, strict=True):
            check_json(ours)
            assert ours.token_ids == theirs.token_ids
        listed = who.generate([QUESTION, "Hi"], [IMAGES[:1], []], schema=SCHEMA)
        for one in listed:
            check_json(one)


def test_other_structures(both: Both) -> None:
    texts = ["a cat", "a dog", "7 of them"]
    for who in both:
        for seed in range(3):
            options: dict[str, Any] = {"temperature": 3.0, "seed": seed}
            one = who.generate(**ASKED, choice=texts, **options)
            assert one.text in texts
            number = who.generate(**ASKED, regex="[0-9]{2}(,[0-9]{2}){0,3}", **options)
            assert re.fullmatch("[0-9]{2}(,[0-9]{2}){0,3}", number.text)
            sums = who.generate(**ASKED, grammar='start: /[0-9]/ (" + " /[0-9]/){2}', **options)
            assert re.fullmatch(r"\d( \+ \d){2}", sums.text)
            assert sums.finish_reason == "stop"


def test_an_answer_that_is_cut(both: Both) -> None:
    for who in both:
        cut = who.generate(**ASKED, schema=SCHEMA, max_new_tokens=3)
        assert cut.finish_reason == "length"
        assert cut.text.startswith("{")


def test_what_runs_beside_it_is_as_if_alone(engine: Engine, expected: list[Generation]) -> None:
    with answers(engine, OTHERS, expected):
        check_json(engine.generate(**ASKED, schema=SCHEMA))


def test_logprobs_are_those_of_the_model(both: Both) -> None:
    """Of all tokens, what the structure forbids among them."""
    model, _ = both
    free = model.generate(**ASKED, max_new_tokens=1, logprobs=1).scores[0]
    for who in both:
        told = who.generate(**ASKED, schema=SCHEMA, logprobs=1)
        scored = model.score(**ASKED, answer=told.token_ids, schema=SCHEMA).scores
        np.testing.assert_allclose(
            [one.logprob for one in told.scores], [one.logprob for one in scored], atol=1e-3
        )
        assert told.scores[0].top[0][0] == free.top[0][0]
        assert min(one.logprob for one in told.scores) < -1


def test_what_ends_other_answers_ends_these(both: Both) -> None:
    for who in both:
        stopped = who.generate(**ASKED, schema=SCHEMA, stop=['"sure"'])
        assert stopped.stop_reason == '"sure"'
        assert stopped.text.startswith("{")


# Mistakes


def test_a_wrong_structure_is_told_before_any_work(both: Both) -> None:
    model, engine = both
    wrong: Any
    for wrong, said in (
        ({"schema": {"type": "objekt"}}, r"schema is not valid \(Invalid type: objekt\)"),
        ({"regex": "("}, r"regex is not valid \(unclosed group\)"),
        ({"grammar": "start: none"}, "grammar is not valid .*unknown name"),
        ({"choice": []}, "choice is .*; give a list of texts"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice are given"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos does not go with regex"),
    ):
        for who in both:
            for call in (who.generate, who.stream, who.count_tokens):
                with pytest.raises(ParameterError, match=said):
                    call(**ASKED, **wrong)
        with pytest.raises(ParameterError, match=said):
            engine.submit(**ASKED, **wrong)
    assert model.count_tokens(**ASKED, schema=SCHEMA) == model.count_tokens(**ASKED)


def test_one_that_cannot_be_followed_fails_alone(
    engine: Engine, expected: list[Generation], folder: Path
) -> None:
    with answers(engine, OTHERS, expected):
        handle = engine.submit(**ASKED, grammar=NO_END)
        with pytest.raises(ParameterError, match="grammar cannot be followed"):
            handle.result(WAIT)
    check_json(engine.generate(**ASKED, schema=SCHEMA))
    with lvlm.load(folder) as model:
        with pytest.raises(ParameterError, match="grammar cannot be followed"):
            model.generate(**ASKED, grammar=NO_END)
        check_json(model.generate(**ASKED, schema=SCHEMA))


# Other ways to ask


def test_asyncio(engine: Engine) -> None:
    async def ask() -> None:
        together = AsyncEngine(engine)
        one, two = await asyncio.gather(
            together.generate(**ASKED, schema=SCHEMA),
            together.generate(**ASKED, choice=["yes", "no"]),
        )
        check_json(one)
        assert two.text in ("yes", "no")
        with pytest.raises(ParameterError, match="regex is not valid"):
            await together.generate(**ASKED, regex="(")

    asyncio.run(ask())


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


def test_on_the_command_line(run: Run, folder: Path, tmp_path: Path) -> None:
    ask = (folder, QUESTION, "--image", IMAGES[0])
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA, indent=1))
    (tmp_path / "a.lark").write_text('start: "ab"')
    code, out, err = run(*ask, "--schema", tmp_path / "schema.json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)) == ["row", "sure", "colour"]
    assert run(*ask, "--choice", "yes", "--choice", "yes")[1] == "yes\n"
    assert run(*ask, "--grammar", tmp_path / "a.lark")[1] == "ab\n"
    code, out, err = run(*ask, "--regex", "(")
    assert (code, out) == (2, "")
    assert "regex is not valid (unclosed group)" in one_line(err, "lvlm-run")

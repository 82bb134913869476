"""Structures of answers: what comes of any logits fits them, and what cannot be followed is refused
before it costs anything."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from settings import ASSETS

from lvlm.core.errors import BackendError, ParameterError
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.options.structure_kinds import Asked, Kind
from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.sampling.sampler import Sampler
from lvlm.runtime.sampling.settings import Sampling
from lvlm.runtime.sampling.structure import Structure
from lvlm.runtime.sampling.structure_compiler import KEPT, StructureCompiler

pytest.importorskip("llguidance", reason="llguidance (extra structured) is not installed")

VOCAB = 512  # the tokenizer has fewer
END, OTHER_END = 2, 0
OBJECT = {
    "type": "object",
    "properties": {
        "digits": {"type": "string", "pattern": "^[0-9]{1,4}$"},
        "sure": {"type": "boolean"},
        "kind": {"enum": ["row", "é", 'a "quoted" one\n']},
        "list": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["digits", "sure", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ASSETS / "digits-llava/tokenizer.json", [END, OTHER_END])


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> StructureCompiler:
    return StructureCompiler(tokenizer.to_json, VOCAB, tokenizer.eos_ids)


Answer = Callable[..., str]


@pytest.fixture(scope="module")
def answer(tokenizer: Tokenizer) -> Answer:
    """The text that is chosen from logits of chance, at temperature 1 for odd seeds."""

    def choose(structure: Structure, seed: int, most: int = 400, **options: Any) -> str:
        random = np.random.default_rng(seed)
        given = GenerationOptions(temperature=float(seed % 2), seed=seed, **options)
        sampler = Sampler(Sampling.of(given, 0), [1], structure=structure)
        tokens: list[int] = []
        while not sampler.complete and len(tokens) < most:
            logits = random.normal(size=VOCAB).astype(np.float32) * 3
            before = logits.copy()
            token = sampler.choose(logits)
            np.testing.assert_array_equal(logits, before)
            if token in tokenizer.eos_ids:
                break
            tokens.append(token)
        return tokenizer.decode(tokens)

    return choose


def fits(value: Any) -> bool:
    """Whether it is one of OBJECT's."""
    return (
        set(value) - {"list"} == {"digits", "sure", "kind"}
        and re.fullmatch("[0-9]{1,4}", value["digits"]) is not None
        and isinstance(value["sure"], bool)
        and value["kind"] in OBJECT["properties"]["kind"]["enum"]  # type: ignore[index]
        and 1 <= len(value.get("list", [0])) <= 3
        and all(type(one) is int for one in value.get("list", []))
    )


@pytest.mark.parametrize("lead", ["", " "])
def test_json_fits_its_schema(compiler: StructureCompiler, answer: Answer, lead: str) -> None:
    structure = compiler.compiled(Asked("schema", json.dumps(OBJECT)), lead)
    texts = [answer(structure, seed) for seed in range(20)]
    assert all(fits(json.loads(text)) for text in texts)
    assert any(text.startswith(" ") for text in texts) == bool(lead)


TEXTS = ("yes", "no", "yes, but", 'a "b"\\n\n\t/', "é☃😀", "\x07", " {}")


@pytest.mark.parametrize("lead", ["", "\n"])
def test_one_of_some_texts(compiler: StructureCompiler, answer: Answer, lead: str) -> None:
    structure = compiler.compiled(Asked("choice", TEXTS), lead)
    found = {answer(structure, seed).removeprefix(lead) for seed in range(120)}
    assert found == set(TEXTS)


def test_as_many_texts_as_there_may_be(compiler: StructureCompiler, answer: Answer) -> None:
    texts = tuple(str(i * 7919) for i in range(10_000))
    assert answer(compiler.compiled(Asked("choice", texts), ""), 1) in texts


@pytest.mark.parametrize(
    "regex", ["[0-9]{3}-[0-9]{4}", r"a/b\/c|\\", "(?i)yes|no{2,3}", "é+.", "x|y\nz", r"\d{2}|\w"]
)
def test_all_of_a_regular_expression_matches(
    compiler: StructureCompiler, answer: Answer, regex: str
) -> None:
    structure = compiler.compiled(Asked("regex", regex), "")
    for seed in range(10):
        assert re.fullmatch(regex, answer(structure, seed, most=60)[:60])


def test_a_text_of_a_grammar(compiler: StructureCompiler, answer: Answer) -> None:
    grammar = 'start: sum\nsum: NUMBER | "(" sum " + " sum ")"\nNUMBER: /[0-9]/\n'
    structure = compiler.compiled(Asked("grammar", grammar), " ")
    for seed in range(10):
        text = answer(structure, seed).lstrip(" ")
        assert re.fullmatch(r"[0-9()+ ]+", text)
        if len(text) < 300:
            eval(text)


def test_white_space_between_parts_has_an_end(compiler: StructureCompiler) -> None:
    """A model that never stops writing it would have no answer at all."""

    def begun(asked: str, wanted: str) -> str:
        tokens = compiler._tokens
        sampler = Sampler(Sampling(), [], structure=compiler.compiled(Asked("schema", asked), ""))
        logits = only(*tokens.tokenize_str(wanted))
        return str(tokens.decode_str([sampler.choose(logits) for _ in range(60)]))

    asked: dict[str, Any] = {"type": "array", "items": {"type": "null"}, "minItems": 20}
    assert begun(json.dumps(asked), " ").startswith("[ null , null")
    assert begun(json.dumps(asked), "\t\n").startswith("[\n" + "\t" * 24 + "null\n\t")
    asked["x-guidance"] = {"whitespace_flexible": False}
    assert begun(json.dumps(asked), " ").startswith("[null,null")


def only(*tokens: int) -> np.ndarray:
    logits = np.zeros(VOCAB, np.float32)
    logits[list(tokens)] = 5
    return logits


def test_every_end_of_text_may_come_where_an_end_may(compiler: StructureCompiler) -> None:
    structure = compiler.compiled(Asked("regex", "a+"), "")
    (a,) = compiler._tokens.tokenize_str("a")
    for end in (END, OTHER_END):
        sampler = Sampler(Sampling(), [], structure=structure)
        assert sampler.choose(only(end)) == a
        assert not sampler.complete
        assert sampler.choose(only(end)) == end


def test_the_structure_wins_over_what_else_forbids_tokens(compiler: StructureCompiler) -> None:
    (a,) = compiler._tokens.tokenize_str("a")
    for temperature in (0.0, 1.0):
        options = GenerationOptions(
            min_new_tokens=9, stop_token_ids=[a], temperature=temperature, seed=0
        )
        structure = compiler.compiled(Asked("regex", "a{3}"), "")
        sampler = Sampler(Sampling.of(options, 0), [], structure=structure)
        assert [sampler.choose(only()) for _ in range(3)] == [a] * 3
        assert sampler.complete


def test_answers_have_places_of_their_own(compiler: StructureCompiler, answer: Answer) -> None:
    structure = compiler.compiled(Asked("choice", TEXTS), "")
    alone = [answer(structure, seed) for seed in range(8)]
    assert [answer(structure, seed) for seed in range(8)] == alone


def test_the_last_ones_are_kept(compiler: StructureCompiler) -> None:
    first = compiler.compiled(Asked("regex", "kept"), "")
    assert compiler.compiled(Asked("regex", "kept"), "") is first
    assert compiler.compiled(Asked("regex", "kept"), " ") is not first
    assert compiler.compiled(Asked("choice", ("kept",)), "") is not first
    assert compiler._kept.cache_info().maxsize == KEPT


def test_fewer_logits_than_tokens(tokenizer: Tokenizer) -> None:
    small = StructureCompiler(tokenizer.to_json, 100, tokenizer.eos_ids)
    logits = np.zeros(100, np.float32)
    sampler = Sampler(Sampling(), [], structure=small.compiled(Asked("regex", "[a-z]"), ""))
    assert small._tokens.decode_str([sampler.choose(logits)]).islower()
    outside = small.compiled(Asked("grammar", "start: <[300]>"), "")
    with pytest.raises(ParameterError, match="the model lacks every token that may come next"):
        Sampler(Sampling(), [], structure=outside).choose(logits)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("schema", '{"type": "objekt"}', "Invalid type: objekt"),
        ("schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("schema", '{"$ref": "https://example.com/a.json"}', "retrieving it failed"),
        ("schema", '{"$ref": "#/$defs/none"}', "does not exist"),
        ("schema", '{"type": "integer", "minimum": 2, "maximum": 1}', "Unsatisfiable schema"),
        ("schema", '{"type": "string", "pattern": "(?=a)b"}', "regex parse error: look-around"),
        ("schema", '{"$ref": "#"}', "there is no text that fits it"),
        ("schema", '{"items": ' * 500 + "{}" + "}" * 500, "recursion limit exceeded"),
        ("regex", "(", "unclosed group"),
        ("regex", "a{2,1}", "invalid repetition count range"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("grammar", "start: none", 'at 1(8): unknown name: "none"'),
        ("grammar", "hello", "Expected token ':'"),
        ("grammar", "start: <|none|>", 'unknown special token: "<|none|>")'),
        ("grammar", 'start: start "a"', "there is no text that fits it"),
        ("grammar", "start: " + "(" * 9_000 + '"a"' + ")" * 9_000, "too deeply nested"),
    ],
)
def test_what_is_not_valid_is_one_line(
    compiler: StructureCompiler, kind: Kind, value: str, said: str
) -> None:
    with pytest.raises(ParameterError, match=rf"^{kind} is not valid \(.*{re.escape(said)}") as e:
        compiler.compiled(Asked(kind, value), " ")
    assert str(e.value).endswith("; give one that llguidance takes (docs/prompts.md)")
    assert len(str(e.value)) < 500


def chain(rules: int) -> str:
    return (
        "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(rules)) + f'\nr{rules}: ""'
    )


def references(count: int) -> str:
    defs: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "array"}]} for i in range(count)
    }
    return json.dumps({"$defs": defs | {f"d{count}": {}}, "$ref": "#/$defs/d0"})


def patterns(count: int) -> str:
    return json.dumps(
        {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(count)]}
    )


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("grammar", chain(6_000)),  # overflows the stack
        ("schema", references(8_000)),
        ("schema", patterns(40)),  # minutes
        ("schema", json.dumps({"properties": {f"p{i}": {} for i in range(30_000)}})),
    ],
    ids=["chain", "references", "patterns", "properties"],
)
def test_bombs_end_in_a_process_of_their_own(
    compiler: StructureCompiler, kind: Kind, value: str
) -> None:
    began = time.monotonic()
    with pytest.raises(ParameterError, match=rf"^{kind} takes too much time or memory to compile"):
        compiler.compiled(Asked(kind, value), "")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "regex",
    ["(((a{1,1000}){1,1000}){1,1000}){1,1000}", "(?s:.*a.{200}b.{200})", "(a?){5000}a{5000}"],
)
def test_bombs_that_llguidance_bears_or_refuses(
    compiler: StructureCompiler, answer: Answer, regex: str
) -> None:
    try:
        answer(compiler.compiled(Asked("regex", regex), ""), 1, most=30)
    except ParameterError as error:
        assert "too many expressions" in str(error)  # noqa: PT017


def test_what_turns_out_to_have_no_end(compiler: StructureCompiler) -> None:
    structure = compiler.compiled(Asked("grammar", 'start: "a" b\nb: b "c"'), "")
    sampler = Sampler(Sampling(), [], structure=structure)
    sampler.choose(only())
    with pytest.raises(ParameterError, match=r"^grammar cannot be followed \(.*; give a simpler"):
        sampler.choose(only())


def test_a_panic_is_an_error_like_others() -> None:
    class PanicException(BaseException):
        pass

    class Matcher:
        def deep_copy(self) -> Matcher:
            return self

        def compute_bitmask(self) -> bytes:
            raise PanicException("index out of bounds")

    structure = Structure("regex", Matcher(), (END,))
    with pytest.raises(ParameterError, match=r"regex cannot be followed \(index out of bounds"):
        Sampler(Sampling(), [], structure=structure).choose(only())


def test_a_tokenizer_that_llguidance_does_not_take(tokenizer: Tokenizer) -> None:
    text = json.dumps(json.loads(tokenizer.to_json()) | {"decoder": None})
    compiler = StructureCompiler(lambda: text, VOCAB, [END])
    with pytest.raises(BackendError, match=r"regex cannot be had from this bundle, whose token.*"):
        compiler.compiled(Asked("regex", "a"), "")


def test_without_llguidance(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = StructureCompiler(tokenizer.to_json, VOCAB, [END])
    with pytest.raises(BackendError, match=r"llguidance cannot be imported .*\[structured\]"):
        compiler.compiled(Asked("regex", "a"), "")

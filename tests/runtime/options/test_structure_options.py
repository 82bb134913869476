"""Options that give an answer its structure: what they take, and as what they are kept."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest

from lvlm.core.errors import ParameterError
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.options.option_flags import add_option_flags, given_options
from lvlm.runtime.options.structure_kinds import (
    LONGEST_SCHEMA,
    LONGEST_TEXT,
    MAX_CHOICES,
    Asked,
)

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}


def test_a_schema_is_kept_as_its_text_in_its_own_order() -> None:
    text = '{"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}'
    for given in (SCHEMA, types.MappingProxyType(SCHEMA), json.dumps(SCHEMA, indent=4), text):
        options = GenerationOptions(schema=given)
        assert options.schema == text
        assert options == GenerationOptions(schema=text)
        assert hash(options) == hash(GenerationOptions(schema=text))
        assert dataclasses.replace(options, seed=1).schema == text
        assert options.structure == Asked("schema", text)
    assert GenerationOptions().structure is None
    assert GenerationOptions(choice=["b", "a"]).structure == Asked("choice", ("b", "a"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", "{"),
        ("schema", "[]"),
        ("schema", "true"),
        ("schema", '{"const": NaN}'),
        ("schema", {"const": float("inf")}),
        ("schema", {"const": {1}}),
        ("schema", {"const": b"a"}),
        ("schema", {"const": "\ud800"}),
        ("schema", '{"items": ' * 100_000),
        ("schema", "9" * 10_000),
        ("schema", {"const": "a" * LONGEST_SCHEMA}),
        ("schema", json.dumps({"const": "a" * LONGEST_SCHEMA})),
        ("schema", True),
        ("schema", ["type"]),
        ("regex", ""),
        ("regex", b"a"),
        ("regex", "\ud800"),
        ("regex", "a" * (LONGEST_TEXT + 1)),
        ("grammar", ""),
        ("grammar", Path("a.lark")),
        ("grammar", "a" * (LONGEST_TEXT + 1)),
        ("choice", "a"),
        ("choice", []),
        ("choice", ["a", ""]),
        ("choice", ["a", 1]),
        ("choice", {"a"}),
        ("choice", ["\ud800"]),
        ("choice", ["a" * LONGEST_TEXT, "b"]),
        ("choice", [str(i) for i in range(MAX_CHOICES + 1)]),
    ],
)
def test_what_is_no_structure_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^{name} is .*; give ") as caught:
        GenerationOptions(**{name: value})
    assert len(str(caught.value)) < 250


def test_a_schema_too_deep_to_be_written_out() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(ParameterError, match=r"^schema is .*; give a JSON schema"):
        GenerationOptions(schema=deep)


def test_one_structure_at_most() -> None:
    with pytest.raises(ParameterError, match="schema and regex are given, but an answer has one"):
        GenerationOptions(schema={}, regex="a")
    with pytest.raises(ParameterError, match="regex, choice and grammar are given"):
        GenerationOptions(regex="a", grammar="start: A", choice=["a"])
    base = GenerationOptions(regex="a")
    with pytest.raises(ParameterError, match="regex and choice are given"):
        GenerationOptions.of(base, {"choice": ["a"]})
    assert GenerationOptions.of(base, {"choice": ["a"], "regex": None}).choice == ("a",)


def test_a_structure_ends_the_answer() -> None:
    with pytest.raises(ParameterError, match="ignore_eos does not go with grammar: such an answer"):
        GenerationOptions(grammar="start: A", ignore_eos=True)


def flags(*argv: str) -> GenerationOptions:
    parser = argparse.ArgumentParser()
    add_option_flags(parser)
    return given_options(parser.parse_args(argv))


def test_flags(tmp_path: Path) -> None:
    assert flags("--regex", "[0-9]+").regex == "[0-9]+"
    assert flags("--choice", "yes", "--choice", "no").choice == ("yes", "no")
    text = ' {"type": "object"}'
    assert flags("--schema", text).schema == text.strip()
    (tmp_path / "schema.json").write_text(text)
    assert flags("--schema", str(tmp_path / "schema.json")).schema == text.strip()
    (tmp_path / "a.lark").write_text('start: "a"\n')
    assert flags("--grammar", str(tmp_path / "a.lark")).grammar == 'start: "a"\n'


def test_files_that_are_none(tmp_path: Path) -> None:
    for flag in ("--schema", "--grammar"):
        with pytest.raises(ParameterError, match=f"{flag} .*none cannot be read: No such file"):
            flags(flag, str(tmp_path / "none"))
        (tmp_path / "empty").touch()
        with pytest.raises(ParameterError, match=f"{flag} .*empty is empty"):
            flags(flag, str(tmp_path / "empty"))
    (tmp_path / "long").write_text(json.dumps({"const": "a" * LONGEST_SCHEMA}))
    with pytest.raises(ParameterError, match=r"schema is .*; give a JSON schema"):
        flags("--schema", str(tmp_path / "long"))

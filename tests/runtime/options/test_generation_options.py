"""The options of a call: kinds, ranges, numpy's scalars, the same ones everywhere."""

from __future__ import annotations

import argparse
import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lvlm.core.errors import ParameterError
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions, OptionValues
from lvlm.runtime.options.option_flags import add_option_flags, given_options
from lvlm.runtime.sampling.settings import Sampling

NAMES = [each.name for each in dataclasses.fields(GenerationOptions)]


def test_calls_take_the_same_names_and_types() -> None:
    given = {name: hint.__forward_arg__ for name, hint in OptionValues.__annotations__.items()}
    for name, hint in given.items():
        given[name] = hint.replace("Whole", "int").replace("Number", "float")
    assert given == {name: GenerationOptions.__annotations__[name] for name in NAMES}


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("max_new_tokens", np.int64(4), 4),
        ("max_new_tokens", np.array(4), 4),
        ("temperature", np.float16(0.5), 0.5),
        ("temperature", 1, 1.0),
        ("temperature", Fraction(1, 2), 0.5),
        ("top_k", np.uint8(3), 3),
        ("top_p", np.float32(0.5), 0.5),
        ("repetition_penalty", np.float64(2), 2.0),
        ("min_p", np.float32(0.5), 0.5),
        ("min_new_tokens", np.int16(0), 0),
        ("frequency_penalty", np.float16(-2), -2.0),
        ("presence_penalty", np.array(1), 1.0),
        ("stop_token_ids", np.array([5, 0], np.int32), (5, 0)),
        ("stop_token_ids", [np.int64(2), 7], (2, 7)),
        ("stop_token_ids", None, ()),
        ("seed", np.int64(7), 7),
        ("seed", 2**70, 2**70),
        ("logprobs", np.int32(0), 0),
        ("ignore_eos", np.bool_(True), True),
        ("keep", np.float32(1), 1.0),
        ("keep", np.array([0.5, 0.25], np.float32), (0.5, 0.25)),
        ("keep", [1, np.float32(0.5)], (1.0, 0.5)),
        ("kv_keep", np.float32(0.5), 0.5),
        ("stop", "a", ("a",)),
        ("stop", ["a", np.str_("b")], ("a", "b")),
        ("stop", None, ()),
        ("chat_template", "{{ 1 }}", "{{ 1 }}"),
        ("system", np.str_("Be brief"), "Be brief"),
        ("frames", np.int16(2), 2),
        ("regex", np.str_("a+"), "a+"),
        ("choice", ["a", np.str_("b"), "a"], ("a", "b")),
        ("grammar", 'start: "a"', 'start: "a"'),
    ],
)
def test_values_are_kept_as_pythons_own(name: str, value: Any, kept: object) -> None:
    taken = getattr(GenerationOptions(**{name: value}), name)
    assert taken == kept
    assert type(taken) is type(kept)


NUMBERS = (
    *("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "seed"),
)
FRACTIONS = ("keep", "kv_keep")


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", b"1", [1, "1"], {1: 1}, {1}, 1j])
@pytest.mark.parametrize("name", [*NUMBERS, *FRACTIONS, "logprobs", "frames"])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^{name} is .*; give "):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("min_new_tokens", -1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", None),
        ("presence_penalty", -2.1),
        ("presence_penalty", float("nan")),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", np.array([True])),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [0.5]),
        ("stop_token_ids", {5}),
        ("logit_bias", [(5, 1)]),
        ("logit_bias", {"5": 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: True}),
        ("logit_bias", {5: 100.1}),
        ("logit_bias", {5: float("nan")}),
        ("defaults", "checkpoint"),
        ("defaults", True),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", 10**400),
        ("logprobs", -1),
        ("ignore_eos", "false"),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", {"a"}),
        ("stop", b"a"),
        ("keep", 0),
        ("keep", [0.5, 2]),
        ("keep", object()),
        ("kv_keep", [0.5]),
        ("chat_template", 1),
        ("chat_template", None),
        ("chat_template", " "),
        ("system", 5),
        ("system", ["Be brief"]),
        ("frames", 0),
    ],
)
def test_values_out_of_their_range(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^{name} is .*; give ") as caught:
        GenerationOptions(**{name: value})
    assert len(str(caught.value)) < 200


def test_biases_are_a_mapping_that_options_can_be_hashed_with() -> None:
    options = GenerationOptions(logit_bias={np.int64(7): np.float32(1.5), 5: -100})
    assert options.logit_bias == {5: -100.0, 7: 1.5}
    assert [type(x) for pair in (options.logit_bias or {}).items() for x in pair] == [
        int,
        float,
    ] * 2
    again = GenerationOptions(logit_bias={7: 1.5, 5: -100.0})
    assert again == options
    assert hash(again) == hash(options)
    assert dataclasses.replace(options, seed=1).logit_bias == options.logit_bias
    assert repr(options.logit_bias) == "{5: -100.0, 7: 1.5}"
    assert GenerationOptions(logit_bias={}).logit_bias == {}


def test_a_number_that_cannot_be_written_out() -> None:
    with pytest.raises(ParameterError, match=r"^seed is of type int; give"):
        GenerationOptions(seed=10**5000)


def test_unknown_names_get_the_nearest_known_one() -> None:
    with pytest.raises(ParameterError, match=r"option 'max_tokens'; did you mean max_new_tokens"):
        GenerationOptions.of(None, {"max_tokens": 3})


def test_options_and_names_together() -> None:
    base = GenerationOptions(temperature=0.5, seed=1)
    assert GenerationOptions.of(base, {"seed": np.int64(2)}) == dataclasses.replace(base, seed=2)
    assert GenerationOptions.of(base, {}) == base
    with pytest.raises(ParameterError, match=r"options is \{.*lvlm.GenerationOptions"):
        GenerationOptions.of({"seed": 1}, {})  # type: ignore[arg-type]


def test_a_seeded_row_draws_from_its_own_seed() -> None:
    options = GenerationOptions(seed=np.int64(7))  # type: ignore[arg-type]
    assert [Sampling.of(options, row).seed for row in range(3)] == [7, 8, 9]
    assert Sampling.of(GenerationOptions(), 3).seed is None


def test_what_the_call_says_comes_before_what_the_bundle_says() -> None:
    says = GenerationConfig(repetition_penalty=1.3, top_k=5, sampling={"temperature": 0.7})
    assert Sampling.of(GenerationOptions(), 0, says) == Sampling(repetition_penalty=1.3, top_k=5)
    given = GenerationOptions(repetition_penalty=1.0, top_k=0)
    assert Sampling.of(given, 0, says) == Sampling()


def test_flags_are_those_options() -> None:
    parser = argparse.ArgumentParser()
    add_option_flags(parser)
    assert given_options(parser.parse_args([])) == GenerationOptions()
    argv = "--max-new-tokens 3 --stop a --stop b --keep 0.5,0.25 --ignore-eos --no-chat-template"
    assert given_options(parser.parse_args(argv.split())) == GenerationOptions(
        max_new_tokens=3, stop=["a", "b"], keep=(0.5, 0.25), ignore_eos=True, chat_template=False
    )
    argv = "--logit-bias 5=-100,7=2.5 --stop-token-ids 2,32000 --min-p 0.1 --presence-penalty -1"
    assert given_options(parser.parse_args(argv.split())) == GenerationOptions(
        logit_bias={5: -100, 7: 2.5}, stop_token_ids=[2, 32000], min_p=0.1, presence_penalty=-1
    )
    with pytest.raises(ParameterError, match="temperature is -1"):
        given_options(parser.parse_args(["--temperature", "-1"]))


@pytest.mark.parametrize(
    "argv", ["--logit-bias 5", "--logit-bias 5=x", "--logit-bias 5=1=2", "--stop-token-ids 2,x"]
)
def test_flags_that_do_not_read(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_option_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(argv.split())
    assert f"'{argv.split()[1]}' is not a" in capsys.readouterr().err


def test_a_template_in_a_file(tmp_path: Any) -> None:
    parser = argparse.ArgumentParser()
    add_option_flags(parser, ["chat_template"])
    file = tmp_path / "own.jinja"
    file.write_text("{{ 1 }}")
    flags = ["--chat-template", str(file)]
    assert given_options(parser.parse_args(flags)) == GenerationOptions(chat_template="{{ 1 }}")
    file.write_bytes(b"\xff")
    with pytest.raises(ParameterError, match="is not text in UTF-8"):
        given_options(parser.parse_args(flags))
    with pytest.raises(ParameterError, match="cannot be read: No such file"):
        given_options(parser.parse_args(["--chat-template", str(tmp_path / "none")]))

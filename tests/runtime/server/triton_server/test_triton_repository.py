"""lvlm-build triton: what it writes, and what it refuses."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm.plugins_trt.build_cli import main
from lvlm.runtime.server.engine_figures import COUNTERS, GAUGES
from lvlm.runtime.server.triton_server.model_settings import Settings
from lvlm.runtime.server.triton_server.repository import INPUTS, OUTPUTS, config

TOKEN = re.compile(r'\s*(?:#.*\n)*\s*("(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]:,])')


def parsed(text: str) -> dict[str, list[Any]]:
    """Protobuf's text format, as strict as it is: fields by name, each with all of its values."""
    tokens, place = [], 0
    while text[place:].strip():
        found = TOKEN.match(text, place)
        assert found, text[place:][:40]
        tokens.append(found[1])
        place = found.end()
    message, rest = _message(tokens)
    assert not rest
    return message


def _message(tokens: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    made: dict[str, list[Any]] = {}
    while tokens and tokens[0] != "}":
        name, *tokens = tokens
        assert name.isidentifier(), name
        if tokens[0] == ":":
            tokens = tokens[1:]
        else:
            assert tokens[0] in "{[", tokens[0]  # a colon may be left out before messages
        values, tokens = _values(tokens)
        made.setdefault(name, []).extend(values)
    return made, tokens


def _values(tokens: list[str]) -> tuple[list[Any], list[str]]:
    first, *tokens = tokens
    if first == "{":
        inner, tokens = _message(tokens)
        assert tokens[0] == "}"
        return [inner], tokens[1:]
    if first != "[":
        assert first not in "}],:"
        return [ast.literal_eval(first) if first[0] in '"-0123456789' else first], tokens
    found: list[Any] = []
    while True:
        values, tokens = _values(tokens)
        found += values
        mark, *tokens = tokens
        if mark == "]":
            return found, tokens
        assert mark == ","


def model_config(text: str) -> Any:
    """As tritonclient reads it; by a reader of this test's where it is not installed."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        return None
    return text_format.Parse(text, ModelConfig())


def test_config_pbtxt() -> None:
    settings = Settings(slots=3, keep=0.5, memory_budget='2"GB\\')
    text = config("digits-llava", settings)
    made = parsed(text)
    assert made["name"] == ["digits-llava"]
    assert made["backend"] == ["python"]
    assert made["max_batch_size"] == [0]
    assert made["model_transaction_policy"] == [{"decoupled": ["true"]}]
    assert made["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    assert [one["name"] for one in made["input"]] == [[port.name] for port in INPUTS]
    assert all(one["optional"] == ["true"] for one in made["input"])
    assert [one["dims"] for one in made["output"]] == [list(port.dims) for port in OUTPUTS]
    given = {one["key"][0]: one["value"][0]["string_value"][0] for one in made["parameters"]}
    assert Settings.of(given) == settings
    assert set(made) == {
        *("name", "backend", "max_batch_size", "model_transaction_policy", "instance_group"),
        *("input", "output", "parameters"),
    }
    if (other := model_config(text)) is not None:
        assert other.model_transaction_policy.decoupled
        assert {key: value.string_value for key, value in other.parameters.items()} == given
        assert [list(one.dims) for one in other.output] == [list(port.dims) for port in OUTPUTS]


def test_a_gpu_is_left_to_the_engine() -> None:
    made = parsed(config("x", Settings(device="cuda")))
    assert made["instance_group"] == [{"count": [1], "kind": ["KIND_MODEL"]}]


@pytest.mark.parametrize(
    "text", ["a: ", "a: [1", "a { b: 1", "a: 1 }", "a: 'x'", "1: 2", "a: [1 2]"]
)
def test_the_reader_of_this_test_is_strict(text: str) -> None:
    with pytest.raises((AssertionError, IndexError, ValueError)):
        parsed(text)


def test_a_repository(
    bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy and a link beside each other; nothing else is left there."""
    folder = bundle("digits-llava", max_images=2)
    place = tmp_path / "models"
    command = ["triton", str(folder), "-o", str(place), "--name"]
    assert main([*command, "a", "--slots", "2", "--max-text-len", "512"]) == 0
    assert re.match(rf"{place / 'a'}: 2 slots on cpu, \d+ MB at most\n", capsys.readouterr().out)
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}é")
    assert main([*command, "b-1.2", "--link", "--chat-template", str(template)]) == 0
    assert (place / "b-1.2/1/chat_template.jinja").read_text() == template.read_text()
    named = {"string_value": ["chat_template.jinja"]}
    made = parsed((place / "b-1.2/config.pbtxt").read_text())
    assert {"key": ["chat_template"], "value": [named]} in made["parameters"]
    assert sorted(path.name for path in place.iterdir()) == ["a", "b-1.2"]
    assert sorted(path.name for path in (place / "a").iterdir()) == ["1", "config.pbtxt"]
    copied, linked = place / "a/1/bundle", place / "b-1.2/1/bundle"
    assert linked.readlink() == folder.resolve()
    assert not copied.is_symlink()
    for file in folder.iterdir():
        if file.is_file():
            assert (copied / file.name).read_bytes() == file.read_bytes()
    made = parsed((place / "a/config.pbtxt").read_text())
    assert {"key": ["max_text_len"], "value": [{"string_value": ["512"]}]} in made["parameters"]
    model = ast.parse((place / "a/1/model.py").read_text())
    (kind,) = (node for node in model.body if isinstance(node, ast.ClassDef))
    assert kind.name == "TritonPythonModel"
    assert {one.name for one in kind.body if isinstance(one, ast.FunctionDef)} == {
        *("initialize", "execute", "finalize")
    }


MISTAKES = [
    (("nowhere", "-o", "models"), "nowhere does not exist"),
    (("empty", "-o", "models"), "is not a bundle"),
    (("BUNDLE",), "-o/--output"),
    (("BUNDLE", "-o", "models", "--name", "a/b"), "--name is 'a/b'; give letters"),
    (("BUNDLE", "-o", "models", "--name", ".x"), "--name is '.x'; give letters"),
    (("BUNDLE", "-o", "models", "--name", "taken"), "taken exists; remove it, or give"),
    (("BUNDLE", "-o", "file"), "-o file is no folder"),
    (("BUNDLE", "-o", "missing/models"), "does not exist; make it first"),
    (("BUNDLE", "-o", "models", "--device", "cpuu"), "did you mean cpu"),
    (("BUNDLE", "-o", "models", "--slots", "0"), "slots is 0"),
    (("BUNDLE", "-o", "models", "--slots", "two"), "invalid int value"),
    (("BUNDLE", "-o", "models", "--memory-budget", "1MB"), "memory_budget is 1 MB"),
    (("BUNDLE", "-o", "models", "--keep", "2"), "keep is 2"),
    (("BUNDLE", "-o", "models", "--max-images", "9"), "max_images is 9"),
    (("BUNDLE", "-o", "models", "--queue", "0"), "queue is 0"),
    (("BUNDLE", "-o", "models", "--defaults", "mine"), "defaults is 'mine'"),
    (("BUNDLE", "-o", "models", "--image-cache", "lots"), "image_cache is 'lots'"),
    (("BUNDLE", "-o", "models", "--chat-template", "no.jinja"), "no.jinja cannot be read"),
    (("BUNDLE", "-o", "models", "--slot", "1"), "did you mean --slots"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_mistakes(
    arguments: tuple[str, ...],
    says: str,
    bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/taken").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    folder = str(bundle("digits-llava", max_images=2))
    try:
        status: Any = main(["triton", *(folder if x == "BUNDLE" else x for x in arguments)])
    except SystemExit as ended:  # of argparse
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert says in said
    assert len(said.splitlines()) == 1, said
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["taken"]


def test_the_page_has_every_name() -> None:
    """Inputs and outputs with their types, metrics, and files that are written."""
    page = (Path(__file__).parents[4] / "docs/triton.md").read_text()
    kinds = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL", "TYPE_INT32": "INT32"}
    for port in (*INPUTS, *OUTPUTS):
        assert re.search(rf"^\| `{port.name}` \| {kinds[port.kind]} \[", page, re.MULTILINE), port
    for name in (*GAUGES, *(f"{name}_total" for name in COUNTERS)):
        assert f"`{name}`" in page, name

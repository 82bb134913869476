"""What ``import lvlm`` gives: names, types, errors, the version."""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from pathlib import Path

import mypy.api
import pytest

import lvlm
from lvlm.core import errors
from lvlm.main import run_verb
from lvlm.verbs import MODULES

PROGRAM = """
import lvlm
import numpy as np
from lvlm import Engine, GenerationOptions, QueueFullError

model = lvlm.load("out/")
reveal_type(model)  # says "lvlm.runtime.model.Model"
reveal_type(model.generate("Hi", temperature=0.5))  # says generate.answers.Generation"
reveal_type(model.generate(["Hi"], options=GenerationOptions(seed=1)))  # says "list[lvlm.
talk = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
reveal_type(model.generate(talk))  # says generate.answers.Generation"
reveal_type(model.generate([talk, "Hi"]))  # says "list[lvlm.
reveal_type(model.generate([talk, talk]))  # says "list[lvlm.
reveal_type(Engine("out/").count_tokens(talk, keep=0.5))  # says token_count.TokenCount"
reveal_type(Engine("out/").submit("Hi").result().stop_reason)  # says "str | int | None"
try:
    lvlm.Engine("out/").stats().running
except QueueFullError as error:
    reveal_type(error)  # says "lvlm.core.errors.QueueFullError"
model.generate("Hi", temprature=0.5)  # says did you mean "temperature"
model.stream("Hi", temperature="0.5")  # says expected "float |
Engine("out/").generate("Hi", max_tokens=3)  # says did you mean "max_new_tokens"
model.generate("Hi", seed=np.int64(3), temperature=np.float32(0.5), keep=[np.float64(0.5)])
GenerationOptions(seed=np.int64(3), top_p=np.float32(0.5), kv_keep=np.int32(1))
reveal_type(GenerationOptions(seed=np.int64(3)).seed)  # says "int | None"
GenerationOptions(seed=np.float64(3))  # says expected "int | integer[Any] | None"
GenerationOptions(max_tokens=3)  # says did you mean "max_new_tokens"
lvlm.Modell  # says maybe "Model"
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_api(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    argv = ["--strict", "--follow-imports=silent", "--config-file=", f"{program}"]
    said, _, _ = mypy.api.run([*argv, f"--cache-dir={tmp_path / 'cache'}"])
    about = re.findall(r"program\.py:(\d+): (?:error|note): (.*)$", said, re.MULTILINE)
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        found = [text for at, text in about if int(at) == number]
        expected = line.partition("  # says ")[2]
        assert bool(found) == bool(expected), said
        assert not expected or any(expected in text for text in found), said


def test_names_are_listed() -> None:
    assert set(lvlm.__all__) <= set(dir(lvlm))
    assert "__version__" in dir(lvlm)
    assert {name for name in dir(lvlm) if not name.startswith("_")} == set(lvlm.__all__)
    for name in lvlm.__all__:
        assert getattr(lvlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(lvlm, "nonsense")  # noqa: B009 - as a user would write it


def test_errors_of_the_runtime_are_public() -> None:
    tools = {"CheckpointError", "ExportError", "ValidationError", "BuildError"}
    found = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.LvlmError)
    }
    assert found - tools <= set(lvlm.__all__)


def test_version() -> None:
    assert lvlm.__version__ == metadata.version("lvlm-deploy")


@pytest.mark.parametrize("verb", MODULES)
def test_every_command_says_its_version(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_verb(verb, ["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lvlm-deploy {lvlm.__version__}\n"

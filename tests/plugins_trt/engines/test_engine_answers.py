"""lvlm-build engine --validate: engines that are there, beside what the export recorded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import Make
from recording import record

from lvlm.core import own_process
from lvlm.core.integrity import describe
from lvlm.plugins_trt.build_cli import main
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine.batch import Batch
from lvlm.runtime.tools.recorded_answers import FIELD, FILE, RecordedAnswer

pytestmark = pytest.mark.usefixtures("trt")
VALIDATE = ("--target", "trt-rtx", "--validate")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """In this process, which has the fakes."""

    def work(program: str, function: Callable[..., None], *arguments: Any) -> int:
        del program
        function(*arguments)
        return 0

    monkeypatch.setattr(own_process, "in_own_process", work)

    def call(*argv: object) -> tuple[int, str, str]:
        code = main(["engine", *map(str, argv)])
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def leave(folder: Path, *answers: RecordedAnswer) -> None:
    """As an export leaves them."""
    (folder / FILE).write_text(json.dumps({"checks": [], FIELD: [asdict(a) for a in answers]}))
    manifest = read_bundle(folder, "none")
    files = manifest.files | {FILE: describe(folder / FILE)}
    dataclasses.replace(manifest, files=files).write(folder)


@pytest.mark.parametrize("recipe", ["none", "prefixkv"])
def test_engines_that_answer_as_recorded(recipe: str, with_engines: Make, run: Any) -> None:
    folder = with_engines(recipe, weights="inputs")
    leave(folder, record(folder))
    code, out, err = run(folder, *VALIDATE)
    assert (code, err) == (0, "")
    assert out.startswith(f"{folder / 'engines/sm89-fake'}, beside what was recorded")
    assert "✓ samples/digits-1.png: 4 of 4 tokens" in out


def test_engines_that_do_not(with_engines: Make, run: Any) -> None:
    folder = with_engines()
    answer = record(folder)
    steps = tuple(
        dataclasses.replace(step, ids=(*step.ids[1:], step.ids[0])) for step in answer.steps
    )
    leave(folder, answer, dataclasses.replace(answer, steps=steps))
    code, out, err = run(folder, *VALIDATE)
    assert code == 2
    assert "✓ samples/digits-1.png: 4 of 4 tokens" in out
    assert "✗ samples/digits-1.png: 0 of 4 tokens" in out
    assert "does not answer as the bundle did when it was exported" in err
    assert err.count("\n") == 1


def test_a_decode_engine_that_chooses_wrongly(
    with_engines: Make, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its logits are right."""
    folder = with_engines()
    leave(folder, record(folder))
    monkeypatch.setattr(Batch, "best", np.array([0]))
    code, out, _ = run(folder, *VALIDATE)
    assert code == 2
    assert "✗ samples/digits-1.png: 1 of 4 tokens, logits at most" in out


def test_engines_that_cannot_be_asked(with_engines: Make, run: Any) -> None:
    """Built for other calls than one short prompt: nothing says that they answer wrongly."""
    folder = with_engines(max_prompt=145)
    leave(folder, record(folder))
    code, _, err = run(folder, *VALIDATE)
    assert code == 2
    assert "cannot be compared with what was recorded: the prefill engine takes 1 to 145" in err
    assert "do not use" not in err
    for given, said in (
        (("--batch", "2..4"), "one prompt at a time"),
        (("--max-prompt", "145"), "give --max-prompt as many"),
    ):
        code, out, err = run(folder, *VALIDATE, "--force", *given)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err


def test_engines_for_another_target_are_not_what_is_asked(with_engines: Make, run: Any) -> None:
    """Those for this one are to be built."""
    folder = with_engines(target="trt-rtx-turing")
    leave(folder, record(folder))
    code, out, err = run(folder, *VALIDATE)
    assert (code, out) == (2, "")
    assert "there is no GPU here" in err  # so that none are built


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--dry-run",), "--dry-run builds nothing"),
        (("-o", "elsewhere"), "leave -o out"),
        ((), "holds no recorded answers: it was exported with --no-validate"),
    ],
)
def test_mistakes(given: tuple[str, ...], said: str, with_engines: Make, run: Any) -> None:
    folder = with_engines()
    files = dict(read_bundle(folder).files)
    files.pop(FILE, None)
    dataclasses.replace(read_bundle(folder), files=files).write(folder)
    code, out, err = run(folder, *VALIDATE, *given)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1

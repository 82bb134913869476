"""lvlm-run: mistakes, each one line and status 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, one_line
from model_tools import IMAGE, OTHER, QUESTION
from PIL import Image
from settings import ASSETS, LIGHTVLM

from lvlm.runtime.run_cli import main
from lvlm.runtime.sampling.sampler import Sampler


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", *LIGHTVLM, max_images=2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["BUNDLE"], "required: PROMPT"),
        ([], "required: BUNDLE, PROMPT"),
        (["BUNDLE", "--chat", "Hi"], "too many arguments: 'Hi'"),
        (["BUNDLE", "--chat", "--json"], "--json does not go with --chat; leave it out"),
        (["BUNDLE", "--chat", "--show-merge", "x.png"], "--show-merge does not go with --chat"),
        (["BUNDLE", "--chat", "--no-chat-template"], "--no-chat-template does not go with --ch"),
        (["BUNDLE", "--chat", "--n", "2"], "--n does not go with --chat"),
        (["BUNDLE", "--chat", "--image", "no.png"], "'no.png' does not exist"),
        (["BUNDLE", "Hi", "--imge", "x"], "unknown argument --imge; did you mean --image"),
        (["BUNDLE", "Hi", "--temp", "1"], "unknown argument --temp; did you mean --temperature?"),
        (["BUNDLE", "--", "-5", "--top-k", "2"], "error: --top-k comes after --; put it before"),
        (["BUNDLE", "-5+3?"], "text that begins with - comes last, after --: -- '-5+3?'"),
        (["BUNDLE", "Hi", "--device", "gpu"], "unknown device 'gpu'; did you mean cuda?"),
        (["BUNDLE", "Hi", "--max-new=3"], "unknown argument --max-new=3; did you mean --max-new-t"),
        (["BUNDLE", "Hi", "there"], "too many arguments: 'there'; put text with spaces in q"),
        (["BUNDLE", "Hi", "-v", "-q"], "not allowed with"),
        (["BUNDLE", "Hi", "--threads", "two"], "--threads"),
        (["BUNDLE", "Hi", "--threads", "0"], "threads is 0"),
        (["BUNDLE", "Hi", "--keep", "half"], "'half' is not a number or a list like 0.7,0.5,0.3"),
        (["BUNDLE", "Hi", "--keep", "0.5,0.4"], "2 fractions for 3 reductions"),
        (["BUNDLE", "Hi", "--keep", "0"], "above 0"),
        (["BUNDLE", "Hi", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["BUNDLE", "Hi", "--temperature", "-1"], "temperature is -1"),
        (["BUNDLE", "Hi", "--top-p", "0.9"], "--top-p has no effect at temperature 0"),
        (["BUNDLE", "Hi", "--min-p", "0.9"], "--min-p has no effect at temperature 0"),
        (["BUNDLE", "Hi", "--logit-bias", "5=101"], "logit_bias is {5: 101.0}; give a dict"),
        (["BUNDLE", "Hi", "--seed", "0", "--temperature", "0"], "--seed has no effect"),
        (["BUNDLE", "Hi", "--regex", "a", "--choice", "b"], "regex and choice are given, but an"),
        (["BUNDLE", "Hi", "--regex", "a", "--ignore-eos"], "ignore_eos does not go with regex"),
        (["BUNDLE", "Hi", "--schema", "no.json"], "--schema no.json cannot be read: No such file"),
        (["BUNDLE", "Hi", "--schema", "{"], "schema is '{'; give a JSON schema, as a dict or"),
        (["BUNDLE", "Hi", "--grammar", "no.lark"], "--grammar no.lark cannot be read"),
        (["BUNDLE", "Hi", "--device", "cuda:0"], "unknown device 'cuda:0'"),
        (["BUNDLE", "Hi", "--image", "no.png"], "'no.png' does not exist"),
        (["BUNDLE", "Hi", "--image", __file__], "is not an image"),
        (["BUNDLE", ""], "the prompt is empty"),
        (["BUNDLE", "Hi", "--stop", ""], "stop is ['']"),
        (["BUNDLE", "Hi", "--no-chat-template", "--system", "x"], "system needs the chat template"),
        (["BUNDLE", "<image> Hi", "--no-chat-template"], "1 image placeholder for 0 images"),
        (["BUNDLE", "Hi", *["--image", IMAGE] * 3], "--max-images 2"),
        (["nowhere", "Hi"], "nowhere does not exist; make one with lvlm-export"),
        ([ASSETS, "Hi"], "is not a bundle"),
        ([ASSETS / "digits-llava", "Hi"], "is a checkpoint; make a bundle of it"),
        (["BUNDLE", "Hi", "--chat-template", os.devnull], f"{os.devnull} is empty"),
        (["BUNDLE", "Hi", "--show-merge", "a.png"], "--show-merge draws on an image"),
        (["BUNDLE", "Hi", "--image", IMAGE, "--show-merge", "a.jpg"], "ending in .png"),
        (["BUNDLE", "Hi", "--image", IMAGE, "--show-merge", "no/a.png"], "no does not exist"),
    ],
    ids=lambda x: "-".join(map(str, x[1:3])).replace("/", "") if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(
    run: Run, light: Path, argv: list[object], said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(light if a == "BUNDLE" else a for a in argv))
    assert (code, out) == (2, "")
    assert said in one_line(err, "lvlm-run")
    assert list(tmp_path.iterdir()) == []


def test_show_merge_needs_a_bundle_that_merges(
    run: Run, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    plain = bundle("digits-llava", max_images=2)
    image = tmp_path / "a.png"
    code, out, err = run(plain, QUESTION, "--image", IMAGE, "--show-merge", image)
    assert (code, out) == (2, "")  # before any answer
    assert "recipe 'none' merges no image tokens" in one_line(err, "lvlm-run")


def test_show_merge_writes_an_image(run: Run, light: Path, tmp_path: Path) -> None:
    path = tmp_path / "merge.png"
    argv = (light, QUESTION, "--image", IMAGE, "--image", OTHER, "--max-new-tokens", 2)
    code, _, err = run(*argv, "--show-merge", path)
    assert (code, err) == (0, f"lvlm-run: wrote {path}\n")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100
    path.unlink()
    path.mkdir()
    code, _, err = run(*argv, "--show-merge", path)
    assert code == 2
    assert "cannot be written" in one_line(err, "lvlm-run")


def test_an_error_in_mid_stream_starts_a_new_line(
    run: Run, light: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Sampler.choose, []

    def failing(self: Sampler, logits: Any) -> int:
        calls.append(1)
        return real(self, logits * np.float32(np.nan if len(calls) == 8 else 1))

    monkeypatch.setattr(Sampler, "choose", failing)
    code, out, err = run(light, QUESTION, "--image", IMAGE)
    assert code == 2
    assert len(out) > 1
    assert out.endswith("\n")
    assert "NaN" in one_line(err, "lvlm-run")

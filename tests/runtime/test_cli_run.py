"""lvlm-run as a user meets it: answers, flags, standard input and output."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, one_line
from model_tools import IMAGE, OTHER, QUESTION
from settings import LIGHTVLM

import lvlm
from lvlm import main as dispatcher
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.run_cli import main, make_parser
from lvlm.runtime.sampling.sampler import Sampler


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", *LIGHTVLM, max_images=2)


@pytest.fixture(scope="module")
def expected(light: Path) -> Generation:
    with lvlm.load(light) as model:
        return model.generate(QUESTION, [IMAGE], max_new_tokens=12)


def test_text_on_stdout_and_nothing_else(run: Run, light: Path, expected: Generation) -> None:
    code, out, err = run(light, "--image", IMAGE, QUESTION, "--max-new-tokens", 12)
    assert (code, out, err) == (0, expected.text + "\n", "")


def test_text_comes_in_pieces(
    light: Path, expected: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        flushed: list[str] = []  # noqa: RUF012

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Screen())
    assert main([str(light), QUESTION, "--image", str(IMAGE), "--max-new-tokens", "12"]) == 0
    assert len(set(Screen.flushed)) > 3
    assert Screen.flushed[-1] == expected.text + "\n"


def test_json_is_one_object(run: Run, light: Path, expected: Generation) -> None:
    code, out, err = run(light, QUESTION, "--image", IMAGE, "--max-new-tokens", 12, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    data = json.loads(out)
    assert data["text"] == expected.text
    assert data["token_ids"] == expected.token_ids
    assert data["finish_reason"] == expected.finish_reason
    assert data["stop_reason"] is None
    assert data["stats"]["image_tokens"] == 144
    assert data["stats"]["image_tokens_per_layer"] == [144, 101, 72, 50, 50, 50]
    assert data["stats"]["decode_tokens_per_second"] > 0


def test_stats_go_to_stderr(run: Run, light: Path, expected: Generation) -> None:
    code, out, err = run(light, QUESTION, "--image", IMAGE, "--max-new-tokens", 12, "--stats")
    assert (code, out) == (0, expected.text + "\n")
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in err.splitlines())
    assert rows["prompt tokens"] == f"{expected.stats.prompt_tokens} (144 of them image tokens)"
    assert rows["image tokens"] == "144 → 101 from block 1 → 72 from block 2 → 50 from block 3"
    assert rows["new tokens"] == "12"
    assert rows["finished by"] == "length"
    assert re.fullmatch(r"[\d.]+ tokens/s \(11 steps\)", rows["decode"])
    for name in ("vision", "prefill"):
        assert re.fullmatch(r"[\d.]+ ms", rows[name])
    for name in ("cache allocated", "cache used"):
        bytes_ = getattr(expected.stats, name.replace(" ", "_bytes_"))
        assert rows[name] == f"{bytes_:,} bytes"


def test_which_stop_is_told(run: Run, light: Path) -> None:
    argv = (light, QUESTION, "--image", IMAGE, "--stop", "n", "--json", "--stats")
    code, out, err = run(*argv)
    assert code == 0
    assert json.loads(out)["stop_reason"] == "n"
    assert re.search(r"finished by +stop at 'n'$", err, re.MULTILINE)


def test_prompt_from_standard_input(
    run: Run, light: Path, expected: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    code, out, _ = run(light, "-", "--image", IMAGE, "--max-new-tokens", 12)
    assert (code, out) == (0, expected.text + "\n")
    monkeypatch.setattr(sys, "stdin", open("/dev/zero"))  # noqa: SIM115 - for the whole call
    assert "standard input has over 10,000,000 characters" in one_line(
        run(light, "-")[2], "lvlm-run"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff"), "utf-8"))
    code, _, err = run(light, "-")
    assert code == 2
    assert "not valid text" in one_line(err, "lvlm-run")


def test_flags_reach_the_model(run: Run, light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = lvlm.Model.stream

    def spy(self: Any, prompt: str, images: Any, videos: Any, options: Any) -> Any:
        seen[:] = [prompt, images, options]
        return real(self, prompt, images, videos, options)

    monkeypatch.setattr(lvlm.Model, "stream", spy)
    code, _, err = run(
        *(light, "Hi", "--image", IMAGE, "--image", OTHER, "--threads", 1, "--device", "cpu"),
        *("--max-new-tokens", 3, "--temperature", 0.5, "--top-k", 4, "--top-p", 0.9),
        *("--repetition-penalty", 1.1, "--seed", 5, "--stop", "x", "--stop", "yz"),
        *("--ignore-eos", "--logprobs", 2, "--json"),
        *(
            "--keep",
            "0.7,0.5,0.3",
            "--kv-keep",
            0.9,
            "--system",
            "Be brief.",
            "--verify",
            "none",
            "-q",
        ),
    )
    assert code == 0, err
    assert seen[:2] == ["Hi", [str(IMAGE), str(OTHER)]]
    assert seen[2] == GenerationOptions(
        max_new_tokens=3,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        repetition_penalty=1.1,
        seed=5,
        stop=["x", "yz"],
        ignore_eos=True,
        logprobs=2,
        keep=(0.7, 0.5, 0.3),
        kv_keep=0.9,
        system="Be brief.",
    )
    run(light, "USER: Hi ASSISTANT:", "--no-chat-template", "--max-new-tokens", 1, "--keep", "0.5")
    assert seen[2] == GenerationOptions(max_new_tokens=1, keep=0.5, chat_template=False)
    run(light, "Hi")
    assert seen[2] == GenerationOptions()


def test_every_option_of_the_api_has_a_flag() -> None:
    text = " ".join(make_parser().format_help().split())
    for each in dataclasses.fields(GenerationOptions):
        assert f" --{each.name.replace('_', '-')}" in text
    assert "default 256" in text
    assert "default 0)" in text


def test_verbose_says_what_was_loaded(run: Run, light: Path) -> None:
    code, _, err = run(light, "Hi", "-v", "--max-new-tokens", 1)
    assert code == 0
    assert "recipe lightvlm (keep=0.35" in err
    assert "2048 text tokens and 2 image(s)" in err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--keep", "0.3"], "--max-text-len"),
        (["--keep", "0.5", "--image", IMAGE], "at these ratios the bundle's cache is full"),
    ],
)
def test_an_answer_cut_by_the_capacity_is_told(
    run: Run,
    bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[object],
    said: str,
) -> None:
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: 20)  # noqa: ARG005
    small = bundle("digits-llava", *LIGHTVLM, max_text_len=32)
    code, _, err = run(small, QUESTION, *extra)
    assert code == 0
    assert err.startswith("lvlm-run: note: the answer was cut at ")
    assert said in err
    assert run(small, QUESTION, *extra, "-q")[2] == ""
    assert run(small, QUESTION, *extra, "--max-new-tokens", 1)[2] == ""
    err = run(small, QUESTION, *extra, "--stats")[2]
    assert re.search(r"finished by +length: the answer was cut at", err)
    assert "note" not in err


def test_lvlm_verb_is_the_command(run: Run, light: Path, expected: Generation) -> None:
    argv = (light, QUESTION, "--image", IMAGE, "--max-new-tokens", 12)
    assert run("run", *argv, command=dispatcher.main) == (0, expected.text + "\n", "")
    code, _, err = run("run", "nowhere", "Hi", command=dispatcher.main)
    assert code == 2
    one_line(err, "lvlm-run")

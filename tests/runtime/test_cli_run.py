"""lvlm-run and lvlm as a user meets them: results, mistakes, streams."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from settings import ASSETS

import lvlm
from lvlm import main as dispatcher
from lvlm import verbs
from lvlm.core.console import run_main
from lvlm.core.errors import BundleError, ValidationError
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.run_cli import _parser, main
from lvlm.runtime.sampling.sampler import Sampler

IMAGE = ASSETS / "samples/digits-1.png"
OTHER = ASSETS / "samples/digits-2.png"
QUESTION = "Describe the picture."


class Run:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *argv: object, command: Any = main) -> tuple[int, str, str]:
        try:
            code = command([str(a) for a in argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out = self.capfd.readouterr()
        return code, out.out, out.err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd)


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Path:
    return bundle("tiny-llava", "lightvlm", max_images=2)


@pytest.fixture(scope="module")
def expected(light: Path) -> Generation:
    with lvlm.load(light) as model:
        return model.generate(QUESTION, [IMAGE], max_new_tokens=12)


def one_line(err: str, program: str = "lvlm-run") -> str:
    assert err.startswith(f"{program}: error: ")
    assert err.count("\n") == 1
    return err


# Answers


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
    assert "standard input has over 10,000,000 characters" in one_line(run(light, "-")[2])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff"), "utf-8"))
    code, _, err = run(light, "-")
    assert code == 2
    assert "not valid text" in one_line(err)


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
    text = " ".join(_parser().format_help().split())
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
    small = bundle("tiny-llava", "lightvlm", max_text_len=32)
    code, _, err = run(small, QUESTION, *extra)
    assert code == 0
    assert err.startswith("lvlm-run: note: the answer was cut at ")
    assert said in err
    assert run(small, QUESTION, *extra, "-q")[2] == ""
    assert run(small, QUESTION, *extra, "--max-new-tokens", 1)[2] == ""
    err = run(small, QUESTION, *extra, "--stats")[2]
    assert re.search(r"finished by +length: the answer was cut at", err)
    assert "note" not in err


# Mistakes


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["BUNDLE"], "required: PROMPT"),
        ([], "required: BUNDLE, PROMPT"),
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
        (["BUNDLE", "Hi", "--seed", "0", "--temperature", "0"], "--seed has no effect"),
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
        ([ASSETS / "tiny-llava", "Hi"], "is a checkpoint; make a bundle of it"),
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
    assert said in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_show_merge_needs_a_bundle_that_merges(
    run: Run, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    plain = bundle("tiny-llava", max_images=2)
    image = tmp_path / "a.png"
    code, out, err = run(plain, QUESTION, "--image", IMAGE, "--show-merge", image)
    assert (code, out) == (2, "")  # before any answer
    assert "recipe 'none' merges no image tokens" in one_line(err)


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
    assert "cannot be written" in one_line(err)


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
    assert "NaN" in one_line(err)


# What all commands share


def test_run_main_maps_errors_to_lines_and_statuses(run: Run) -> None:
    def raising(error: BaseException) -> Callable[[Any], int]:
        def body() -> int:
            raise error

        return lambda _: run_main("prog", body)

    assert run(command=raising(BundleError("bad; mend it"))) == (
        *(2, "", "prog: error: bad; mend it\n"),
    )
    checks = ValidationError("the graphs differ", details="  a 1\n  b 2")
    assert str(checks) == "the graphs differ"
    assert run(command=raising(checks))[2] == "prog: error: the graphs differ\n  a 1\n  b 2\n"
    odd = BundleError("bad\nname\x1b[1m \ud800" + "x" * 5000)
    assert len(said := run(command=raising(odd))[2]) < 1000
    assert said.startswith("prog: error: bad name [1m  xxx")
    code, _, err = run(command=raising(MemoryError("Unable to allocate 9 GiB")))
    assert code == 2
    assert "not enough memory (Unable to allocate 9 GiB)" in one_line(err, "prog")
    assert "not enough memory;" in run(command=raising(MemoryError()))[2]
    assert run(command=raising(KeyboardInterrupt())) == (130, "", "")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        raising(ZeroDivisionError())(None)
    assert run_main("prog", lambda: 3) == 3


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, check=False, **options
    )


def test_an_answer_that_the_terminal_cannot_show_is_no_error() -> None:
    code = """
import sys
from lvlm.core.console import run_main
sys.exit(run_main("prog", lambda: print("caf\\u00e9 \\u2192") or 0))
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = python(code, stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout) == (0, "caf? ?\n")


def test_help_imports_neither_numpy_nor_onnxruntime() -> None:
    code = """
import sys
from lvlm.runtime.run_cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print(sorted({"numpy", "onnxruntime", "PIL", "tokenizers", "jinja2"} & set(sys.modules)))
"""
    done = python(code, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert "usage: lvlm-run" in done.stdout
    assert done.stdout.endswith("[]\n")


# lvlm VERB


def test_lvlm_lists_its_verbs(run: Run) -> None:
    code, out, err = run(command=dispatcher.main)
    assert (code, err) == (0, "")
    assert re.search(r"^  run +ask a bundle a question about images$", out, re.MULTILINE)
    assert re.search(r"^  export +a checkpoint and a recipe in", out, re.MULTILINE)
    assert run("--help", command=dispatcher.main) == (0, out, "")


def test_lvlm_verb_is_the_command(run: Run, light: Path, expected: Generation) -> None:
    argv = (light, QUESTION, "--image", IMAGE, "--max-new-tokens", 12)
    assert run("run", *argv, command=dispatcher.main) == (0, expected.text + "\n", "")
    code, _, err = run("run", "nowhere", "Hi", command=dispatcher.main)
    assert code == 2
    one_line(err)


def test_lvlm_unknown_verb(run: Run) -> None:
    code, out, err = run("exprot", "-h", command=dispatcher.main)
    assert (code, out) == (2, "")
    assert "unknown verb 'exprot'; did you mean export?" in one_line(err, "lvlm")


def test_lvlm_version(run: Run) -> None:
    from importlib.metadata import version

    expected = f"lvlm-deploy {version('lvlm-deploy')}\n"
    assert run("--version", command=dispatcher.main) == (0, expected, "")


def test_python_m_lvlm() -> None:
    code = """
import runpy, sys
sys.argv = ["lvlm", "exprot"]
runpy.run_module("lvlm", run_name="__main__", alter_sys=True)
"""
    done = python(code, stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert "did you mean export" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_whose_module_is_gone_is_listed_with_the_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verbs.MODULES, "gone", "lvlm.gone.cli")
    assert (
        "gone       cannot start: there is no module lvlm.gone" in run(command=dispatcher.main)[1]
    )
    code, _, err = run("gone", command=dispatcher.main)
    assert code == 2
    assert "lvlm-gone cannot start: No module named" in one_line(err, "lvlm")

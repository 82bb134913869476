"""lvlm-run --chat: history, images, commands, what is reused; mistakes and Ctrl-C in the middle."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, one_line
from model_tools import IMAGE, OTHER, QUESTION
from settings import CACHED

import lvlm
from lvlm.runtime.engine import Engine
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.run_cli import main
from lvlm.runtime.tools.chat import Chat

OPTIONS = GenerationOptions(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", max_images=2)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, slots=1, threads=1) as engine:
        yield engine


class Talk:
    """A conversation whose output is kept."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.said: list[str] = []
        self.notes: list[str] = []
        self.told: list[str] = []
        self.chat = Chat(
            engine, OPTIONS, self.said.append, self.notes.append, self.told.append, **options
        )

    def __call__(self, *lines: str) -> list[bool]:
        return [self.chat.take(line) for line in lines]


@pytest.fixture
def talk(engine: Engine) -> Talk:
    return Talk(engine, stats=True)


def user(*parts: str | Path) -> dict[str, Any]:
    """A message as a client would send it."""
    kinds: list[dict[str, Any]] = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
        for p in parts
    ]
    return {"role": "user", "content": kinds}


def test_turns_are_those_of_a_conversation(talk: Talk, folder: Path) -> None:
    lines = (
        f"/image {IMAGE}",
        QUESTION,
        "And how often does 7 appear?",
        f"/image '{OTHER}'",
        "Now?",
    )
    assert talk(*lines) == [True] * 5
    with lvlm.load(folder, threads=1) as model:
        messages = [user(IMAGE, QUESTION)]
        answers = [model.generate(messages, options=OPTIONS)]
        for parts in (("And how often does 7 appear?",), (OTHER, "Now?")):
            messages += [{"role": "assistant", "content": answers[-1].text}, user(*parts)]
            answers.append(model.generate(messages, options=OPTIONS))
    assert "".join(talk.said) == "".join(answer.text + "\n" for answer in answers)
    turns = [note for note in talk.notes if note.startswith("prompt ")]
    for note, answer in zip(turns, answers, strict=True):
        stats = answer.stats
        assert note.startswith(
            f"prompt {stats.prompt_tokens} tokens ({stats.image_tokens} of them image tokens), "
        )
        assert re.search(r"; cache [\d,]+ bytes$", note)
    reused = [int(re.findall(r"(\d+) reused", note)[0]) for note in turns]
    assert reused[0] == 0
    assert reused[1] > 144  # the image, and what was said about it


def test_an_image_is_kept_as_it_was(talk: Talk, tmp_path: Path) -> None:
    file = Path(shutil.copy(IMAGE, tmp_path / "a picture.png"))
    talk(f"/image {file}", "Hi")
    file.unlink()
    talk("Again")
    assert not talk.told
    assert len(talk.chat.history) == 4


def test_commands(talk: Talk) -> None:
    assert talk("", "  ", "/help") == [True] * 3
    assert "/image PATH" in talk.told.pop()
    talk(f"/image {IMAGE}", "Hi", "//quit is a command", "/reset")
    assert talk.notes[0].startswith("1") and "room for" in talk.notes[0]  # noqa: PT018
    assert (talk.chat.history, talk.chat.pending) == ([], [])
    talk("//quit?")
    assert talk.chat.history[0] == user("/quit?")
    assert not talk.told
    assert talk("/quit") == [False]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/imge x", "error: unknown command '/imge'; did you mean /image or /video?"),
        ("/image", "error: /image shows a file; write /image PATH"),
        ("/image no.png", "error: image 'no.png' does not exist"),
        ("/image /dev/null", "is not an image that can be read"),
        (f"/image {__file__}", "is not an image that can be read"),
        ("/video x.mp4", "this model takes no video"),
        ("word " * 3000, "export with more; /reset begins anew"),
        ("half \ud800", "not valid Unicode"),
    ],
)
def test_a_mistake_is_a_line_and_the_conversation_goes_on(line: str, said: str, talk: Talk) -> None:
    talk(f"/image {IMAGE}", "Hi", f"/image {OTHER}")
    before = (list(talk.chat.history), list(talk.chat.pending))
    assert talk(line) == [True]
    assert said in talk.told[0]
    assert "\n" not in talk.told[0]
    assert (talk.chat.history, talk.chat.pending) == before
    talk("And now?")
    assert len(talk.chat.history) == 4
    assert talk(f"/image {IMAGE}") == [True]
    assert "3 images, but there is room for --max-images 2" in talk.told[1]


def test_a_file_is_not_read_before_it_is_known_to_be_an_image(talk: Talk, tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 42)  # takes no room on the disk, and more than there is in memory
    assert talk(f"/image {tmp_path / 'huge.png'}") == [True]
    assert "is not an image that can be read" in talk.told[0]


def test_ctrl_c_stops_an_answer(engine: Engine) -> None:
    talk = Talk(engine)

    def interrupted(text: str) -> None:
        talk.said.append(text)
        if len(talk.said) == 2:
            raise KeyboardInterrupt

    talk.chat._say = interrupted
    assert talk("Hi") == [True]
    talk.chat._say = talk.said.append
    said = "".join(talk.said[:2])
    assert talk.chat.history[1] == {"role": "assistant", "content": said}
    assert talk.notes == ["stopped"]
    talk("Go on")
    assert len(talk.chat.history) == 4
    assert engine.stats().running == 0


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


def test_lines_of_a_pipe(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"/image {IMAGE}\n{QUESTION}\n/image no.png\nAnd?\n"
    argv = (folder, "--chat", "--max-new-tokens", 8, "--ignore-eos", "--system", "Be brief.")
    with lvlm.load(folder) as model:
        messages = [{"role": "system", "content": "Be brief."}, user(IMAGE, QUESTION)]
        first = model.generate(messages, options=OPTIONS).text
        messages += [{"role": "assistant", "content": first}, user("And?")]
        second = model.generate(messages, options=OPTIONS).text
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = run(*argv)
    assert (code, out) == (0, f"{first}\n{second}\n")
    assert re.fullmatch(
        r"\[\d+ tokens with it; room for \d+ more\]\n\[\d+ tokens\]\n"
        r"error: image 'no.png' does not exist.*\n\[\d+ tokens\]\n",
        err,
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\r\nAnd?\n/quit\nnever\n"))
    code, out, err = run(*argv, "--image", IMAGE, "-q")
    assert (code, out, err) == (0, f"{first}\n{second}\n", "")


def test_a_session(
    run: Run, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """The compressed cache is kept from turn to turn; a new conversation has one of its own."""
    kept = bundle("digits-llava", *CACHED["snapkv (cached)"], max_images=2, sessions=True)
    lines = "/reset\n".join([f"/image {IMAGE}\n{QUESTION}\nAnd?\n"] * 2)
    reused = {}
    for flags in ((), ("--session",)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        argv = (kept, "--chat", *flags, "--max-new-tokens", 8, "--kv-keep", 0.5, "--stats")
        code, _, err = run(*argv)
        assert code == 0
        reused[flags] = [int(count) > 0 for count in re.findall(r"(\d+) reused", err)]
    assert reused == {(): [False] * 4, ("--session",): [False, True, False, True]}
    code, _, err = run(kept, QUESTION, "--session")
    assert code == 2
    assert "add --chat" in one_line(err, "lvlm-run")
    assert run(folder, "--chat", "--session")[0] == 0  # recipe none always has the graph


def test_the_end_of_a_conversation(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Terminal("/help\n"))
    code, out, err = run(folder, "--chat")
    assert (code, out) == (0, "> > \n")
    assert "/reset" in err
    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert run(folder, "--chat") == (130, "", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff"), "utf-8"))
    code, _, err = run(folder, "--chat")
    assert code == 2
    assert "not valid text" in one_line(err, "lvlm-run")

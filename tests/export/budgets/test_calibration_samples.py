"""Files of samples: what is read, and one line for each way they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from settings import ASSETS

from lvlm.core.errors import ParameterError
from lvlm.export.budgets.calibration_samples import builtin_samples, choose, read_samples
from lvlm.runtime.media.images import open_image

IMAGE = ASSETS / "samples/digits-1.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(IMAGE.read_bytes())
    return tmp_path


def test_lines_become_samples(folder: Path) -> None:
    lines = [
        {"image": "images/a.png", "prompt": "One?"},
        {"image": ["images/b.png", str(IMAGE)], "prompt": "Zwölf?\u2028", "answer": "12"},
        {"image": [], "prompt": "None"},
    ]
    text = "\n\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + "\n"
    path = folder / "d.jsonl"
    path.write_text(text, encoding="utf-8-sig")
    first, second, third = read_samples(path)
    assert (first.images, first.prompt) == ((folder / "images/a.png",), "One?")
    assert second.images == (folder / "images/b.png", IMAGE)
    assert (second.prompt, second.where) == ("Zwölf?\u2028", f"{path}:3")
    assert (third.images, third.where) == ((), f"{path}:5")


GOOD = '{"image": "images/a.png", "prompt": "a"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "d.jsonl holds no samples"),
        ("\n \n", "d.jsonl holds no samples"),
        (GOOD + "\n{", "d.jsonl:2: not JSON"),
        (GOOD + '\n\n["a"]', "d.jsonl:3: no JSON object"),
        ('{"prompt": "a"}', 'd.jsonl:1: "image" is missing'),
        ('{"image": []}', 'd.jsonl:1: "prompt" is missing'),
        ('{"image": [], "prompt": 7}', 'd.jsonl:1: "prompt" is no text'),
        ('{"image": 7, "prompt": "a"}', 'd.jsonl:1: "image" is no path'),
        ('{"image": ["a", 7], "prompt": "a"}', 'd.jsonl:1: "image" is no path'),
        ('{"image": "no.png", "prompt": "a"}', "d.jsonl:1: the image FOLDER/no.png does not"),
        ('{"image": ["images/a.png", ""], "prompt": "a"}', "the image FOLDER does not"),
        ('{"image": "a\\u0000b", "prompt": "a"}', "does not exist"),
        ("[" * 100_000, "d.jsonl:1: not JSON"),
        (b"\xff\xfe\x00", "d.jsonl is not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file(content: str | bytes, message: str, folder: Path) -> None:
    path = folder / "d.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ParameterError) as error:
        read_samples(path)
    assert message.replace("FOLDER", str(folder)) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(ParameterError, match=r"no\.jsonl do not exist"):
        read_samples(folder / "no.jsonl")
    with pytest.raises(ParameterError, match="are not a file"):
        read_samples(folder)


def test_choosing_is_repeatable_and_keeps_order() -> None:
    samples = builtin_samples()
    assert choose(samples, None, 5, "x") == samples
    drawn = choose(samples, 5, 0, "x")
    assert drawn == choose(samples, 5, 0, "x")
    places = [samples.index(s) for s in drawn]
    assert len(places) == 5
    assert places == sorted(set(places))
    assert len({tuple(s.where for s in choose(samples, 5, seed, "x")) for seed in range(9)}) > 3
    for count in (0, -1, 9):
        with pytest.raises(ParameterError, match=rf"{count} samples are asked .* 1 to 8, as x"):
            choose(samples, count, 0, "x")


def test_builtin_samples_can_be_opened() -> None:
    samples = builtin_samples()
    assert len(samples) == len({(s.images, s.prompt) for s in samples}) == 8
    assert len({s.images for s in samples}) == 2
    assert all(open_image(s.images[0]).shape == (336, 336, 3) for s in samples)

"""Data sets: layouts, images, and every mistake named before any model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvlm.calibration.datasets import digits
from lvlm.calibration.datasets.evaluation_samples import (
    DataError,
    Dataset,
    EvaluationSample,
    read_samples,
)
from lvlm.core.discovery import discover
from lvlm.core.errors import LvlmError, ParameterError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("data.jsonl", contents) beside the images a.png, images/b.png and broken.png."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "images/b.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])

    def make(name: str, contents: Any) -> str:
        text = contents if isinstance(contents, str) else json.dumps(contents)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return make


def line(**changes: Any) -> str:
    data = {"image": "a.png", "prompt": "What?", "answer": "Red."} | changes
    return json.dumps({k: v for k, v in data.items() if v is not ...}) + "\n"


def test_data_sets_are_discovered() -> None:
    known: dict[str, Dataset] = discover("lvlm.calibration.datasets", "DATASET")
    assert {"digits", "jsonl", "mm-vet", "llava-detail"} <= set(known)
    assert all(dataset.summary for dataset in known.values())


def test_jsonl(write: Write, tmp_path: Path) -> None:
    several = line(image=["a.png", "images/b.png"], prompt="<image> or <image>?", note="ignored")
    path = write("data.jsonl", "\ufeff" + line() + "\n" + several + line(image=[]))
    first, second, third = read_samples(path)
    assert (first.prompt, first.answer) == ("What?", "Red.")
    assert first.images == (tmp_path / "a.png",)
    assert second.images == (tmp_path / "a.png", tmp_path / "images/b.png")
    assert second.where == f"{path} line 3"
    assert third.images == ()
    assert len(read_samples(path, samples=2)) == 2


def test_images_may_be_elsewhere(write: Write, tmp_path: Path) -> None:
    path = write("data.jsonl", line(image="b.png"))
    (sample,) = read_samples(path, images=tmp_path / "images")
    assert sample.images == (tmp_path / "images/b.png",)


@pytest.mark.parametrize("benchmark", [True, False])
def test_mm_vet(write: Write, tmp_path: Path, benchmark: bool) -> None:
    entry = {"question": "Which colour?", "answer": "blue"}
    own = {"v1_0": entry | {"imagename": "b.png", "capability": ["rec"]}}
    (sample,) = read_samples(
        write("mm.json", own if benchmark else [entry | {"image": "b.png"}]), layout="mm-vet"
    )
    assert sample.prompt == "Which colour?\n<image>"
    assert sample.images == (tmp_path / "images/b.png",)
    assert sample.id == ("v1_0" if benchmark else "1")


def test_mm_vet_keeps_a_place_that_the_question_has(write: Write) -> None:
    data = [{"question": "<image>\nWhich?", "answer": "blue", "image": "b.png"}]
    assert read_samples(write("mm.json", data), layout="mm-vet")[0].prompt == "<image>\nWhich?"


def turns(*texts: str) -> dict[str, Any]:
    return {"image": "a.png", "conversations": [{"from": "x", "value": t} for t in texts]}


def test_llava_detail_takes_the_first_pair_of_turns(write: Write, tmp_path: Path) -> None:
    path = write("d.json", [turns("<image>\nDescribe.", "Red.", "More?", "No."), turns("W", "A")])
    first, second = read_samples(path, layout="llava-detail")
    assert (first.prompt, first.answer) == ("<image>\nDescribe.", "Red.")
    assert (second.prompt, second.answer) == ("W", "A")
    assert first.images == (tmp_path / "a.png",)
    assert second.where == f"{path} entry 2"


@pytest.mark.parametrize(
    ("name", "contents", "options", "message"),
    [
        ("d.jsonl", "", {}, "holds no samples"),
        ("d.jsonl", line() + "{'a'\n", {}, "line 2 is not JSON"),
        ("d.jsonl", line() + "[1]\n", {}, "line 2 is a list; give an object"),
        ("d.jsonl", line() + line(answer=...), {}, "line 2 lacks 'answer'"),
        ("d.jsonl", line(prompt=7), {}, "line 1: 'prompt' is 7"),
        ("d.jsonl", line(prompt=" "), {}, "line 1: the prompt is empty"),
        ("d.jsonl", line(answer=""), {}, "line 1: the answer is empty"),
        ("d.jsonl", line(image="no.png"), {}, "line 1: the image .*no.png does not exist"),
        ("d.jsonl", line(image=["a.png", None]), {}, "line 1: 'image' is null"),
        ("d.jsonl", line(image="images"), {}, "line 1: the image .*images does not exist"),
        ("d.jsonl", line(image="broken.png"), {}, "line 1: image .*broken.png"),
        ("d.jsonl", line(prompt="<image> <image>"), {}, "line 1: 2 <image> in the prompt for 1"),
        ("d.jsonl", line() * 3, {"samples": 4}, "has 3 samples, --samples asks for 4"),
        ("d.jsonl", line(), {"samples": 0}, "--samples is 0"),
        ("d.jsonl", line(), {"layout": "mmvet"}, "did you mean mm-vet"),
        ("d.jsonl", line(), {"layout": "digits"}, "write --data digits"),
        ("d.jsonl", line(), {"kinds": ["read"]}, "'jsonl' has none"),
        ("d.jsonl", line(), {"images": Path("/nowhere")}, "no such folder"),
        ("d.json", [], {}, "which layout.*llava-detail, mm-vet"),
        ("d.json", [], {"layout": "mm-vet"}, "holds no samples"),
        ("d.json", "[\n{]", {"layout": "mm-vet"}, r"is not JSON \(.*line 2 column 2"),
        ("d.json", "3", {"layout": "mm-vet"}, "neither an object nor a list"),
        ("d.json", {"v": {"question": "?", "answer": "!"}}, {"layout": "mm-vet"}, "entry v lacks"),
        ("d.json", {}, {"layout": "llava-detail"}, "is not a list"),
        ("d.json", [turns("?")], {"layout": "llava-detail"}, "entry 1: 'conversations' needs"),
        ("d.json", "[" * 100_000, {"layout": "mm-vet"}, "nested too deeply"),
        ("d.txt", "", {}, "which layout.*jsonl, llava-detail, mm-vet"),
    ],
)
def test_mistakes(
    write: Write, name: str, contents: Any, options: dict[str, Any], message: str
) -> None:
    path = write(name, contents)
    with pytest.raises(LvlmError, match=message) as error:
        read_samples(path, **options)
    assert "\n" not in str(error.value)


def test_mistakes_of_lines_that_are_not_asked_for_count_but_their_images_do_not(
    write: Write,
) -> None:
    assert len(read_samples(write("a.jsonl", line() + line(image="no.png")), samples=1)) == 1
    with pytest.raises(DataError, match="line 2"):
        read_samples(write("b.jsonl", line() + "{\n"), samples=1)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_samples(str(tmp_path / "no.jsonl"))
    with pytest.raises(ParameterError, match="did you mean digits"):
        read_samples("digit")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        read_samples(str(tmp_path / "latin.jsonl"))


def test_digits_are_held_out_and_of_the_kinds_asked_for() -> None:
    samples = read_samples("digits", samples=4, kinds=["describe", "pictures"])
    drawn = digits.samples("heldout", 4, kinds=("describe", "pictures"))
    for sample, asked in zip(samples, drawn, strict=True):
        assert (sample.prompt, sample.answer) == (asked.question, asked.answer)
        for image, scene in zip(sample.images, asked.scenes, strict=True):
            assert np.array_equal(image, scene.image)
    assert [sample.id for sample in samples] == [
        *("1-describe-sparse", "2-pictures-sparse", "3-describe-middle", "4-pictures-middle")
    ]
    assert [len(sample.images) for sample in samples] == [1, 2, 1, 2]


def test_a_second_question_has_the_first_one_before_it() -> None:
    (sample,) = read_samples("digits", samples=1, kinds=["turns"])
    (drawn,) = digits.samples("heldout", 1, kinds=("turns",))
    assert (sample.prompt, sample.answer, sample.before) == (
        *(drawn.question, drawn.answer, drawn.before),
    )
    assert len(sample.before) == 1
    alone = replace(sample, before=())
    assert alone.digest() != sample.digest()
    assert len(sample.images) == 1


@pytest.mark.parametrize(
    ("before", "prompt", "said"),
    [
        ((("", "5"),), "And then?", "an earlier question or answer is empty"),
        ((("Which digit?", " "),), "And then?", "an earlier question or answer is empty"),
        ((("Which digit?", "5"),), "<image> And then?", "whose images come first; leave it out"),
    ],
)
def test_conversations_that_cannot_be(
    before: tuple[tuple[str, str], ...], prompt: str, said: str
) -> None:
    image = np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(DataError, match=f"line 7: .*{said}"):
        EvaluationSample("", (image,), prompt, "a", "line 7", before).check()


def test_mistakes_about_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="did you mean describe"):
        read_samples("digits", kinds=["descibe"])
    with pytest.raises(ParameterError, match="--images is for files"):
        read_samples("digits", images=tmp_path)
    with pytest.raises(ParameterError, match="--format is for files"):
        read_samples("digits", layout="jsonl")
    monkeypatch.setattr(digits, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"needs scikit-learn; pip install"):
        read_samples("digits", samples=1)


def test_a_digest_is_of_contents_not_of_places(write: Write, tmp_path: Path) -> None:
    path = write("d.jsonl", line() + line(answer="Blue.") + line(image="images/b.png"))
    digests = [sample.digest() for sample in read_samples(path)]
    assert len(set(digests)) == 3
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert [s.digest() for s in read_samples(str(tmp_path / "copy/d.jsonl"))] == digests
    array = np.zeros((2, 3, 3), np.uint8)
    shapes = {
        EvaluationSample("", (a,), "p", "a", "").digest() for a in (array, array.reshape(3, 2, 3))
    }
    assert len(shapes) == 2


def test_real_text() -> None:
    """Stretches of the manual in the order of its chapters, none of them twice."""
    found = read_samples("text")
    assert len(found) > 20
    assert len({one.digest() for one in found}) == len(found)
    first = read_samples("text", samples=5)
    assert [one.id for one in first] == [one.id for one in found[:5]]
    assert len({one.id.rpartition("-")[0] for one in first}) == 5
    for one in found:
        assert one.images == ()
        assert 5_000 < len(one.prompt) <= 6_000
        assert 1_000 < len(one.answer) < 1_600
    chapter = [one for one in found if one.id.startswith("specialnames-")]
    text = topics["specialnames"]
    places = [text.index(part) for one in chapter for part in (one.prompt, one.answer)]
    assert places == sorted(places)
    with pytest.raises(ParameterError, match="--images is for files"):
        read_samples("text", images=Path("."))

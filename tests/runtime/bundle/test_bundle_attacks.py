"""Manifests whose hashes are right and whose content is not: a bundle works or is refused in one
line. Nothing else of the machine is opened, nothing hangs, no size is believed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from settings import ASSETS

import lvlm
from lvlm.core.errors import LvlmError
from lvlm.core.integrity import describe
from lvlm.runtime.bundle.reader import read_bundle

DATA = Path(__file__).parents[2] / "data/bundles"
SAMPLE = ASSETS / "samples/digits-1.png"
ROOM = 2 << 30  # more address space than a load of this bundle needs
HUGE, LONG = 10**4000, "x" * 100_000
ROW = {"keep": 0.5, "fractions": [0.5, 0.5]}
Edit = Callable[[Any], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks")
    with zipfile.ZipFile(DATA / "schema-3.zip") as archive:
        archive.extractall(folder)
    read_bundle(folder / "s3").write(folder / "s3")  # as the present schema has it
    return folder / "s3"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(original, copy, copy_function=os.link)
    return copy


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No size in a manifest takes much memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def replace_json(folder: Path, edit: Edit) -> None:
    path = folder / "lvlm.json"
    data = json.loads(path.read_text())
    edit(data)
    path.unlink()
    path.write_text(json.dumps(data))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Another file under its name, with its right hash in the manifest."""
    path = folder / name
    path.unlink()
    path.write_bytes(content)
    found = describe(path)
    replace_json(folder, lambda d: d["files"][name].update(sha256=found.sha256, bytes=found.bytes))


def answer_or_line(folder: Path) -> str | None:
    """The one line that the bundle is refused with; None if it answers."""
    try:
        with lvlm.load(folder) as model:
            for images in ([SAMPLE], []):
                answer = model.generate("Read it.", images=images, max_new_tokens=30)
                assert isinstance(answer.text, str)
    except LvlmError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) <= 1000
        return line
    return None


def put(*keys: str | int, value: object) -> Edit:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


def drop(*keys: str | int) -> Edit:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return edit


WEIGHT = "model.language_model.layers.0.mlp.down_proj.weight"
REDUCTION = {"layer": 1, "exponent": 1.0, "ratio": None, "recycle": 0.1}
ENCODER = {"rule": "divprune", "exponent": 1.0, "ratio": None, "places": "own"}
ENCODER |= {"settings": {}, "scores": 0}
ATTACKS: dict[str, Edit] = {
    # weights
    **{
        f"weight in {name!r:.20}": lambda d, name=name: d["weights"][WEIGHT].update(
            file=name, bytes=0, offset=0, dims=[0]
        )
        for name in ("/etc/passwd", "../x", "fifo", "nowhere", LONG, "a\0b", "\ud800", "", ".")
    },
    "weight in another listed file": put("weights", WEIGHT, "file", value="tokenizer.json"),
    "weight of no bytes": lambda d: d["weights"][WEIGHT].update(bytes=0, dims=[0, 4]),
    "weight of unknown type": put("weights", WEIGHT, "dtype", value="float37"),
    "weight of an object type": put("weights", WEIGHT, "dtype", value="O"),
    "weight of a structured type": put("weights", WEIGHT, "dtype", value="i4,(2,3)f8"),
    "weight of half the type": put("weights", WEIGHT, "dtype", value="float16"),
    "weight of another shape": put("weights", WEIGHT, "dims", value=[1536]),
    "weight of huge dimensions": put("weights", WEIGHT, "dims", value=[HUGE, 0]),
    "weight at a huge offset": put("weights", WEIGHT, "offset", value=HUGE),
    "weight at an odd offset": put("weights", WEIGHT, "offset", value=1),
    "weight that no graph has": lambda d: (
        d["weights"].update(more=d["weights"][WEIGHT]),
        d["graphs"]["decode"]["weights"].append("more"),
    ),
    "weight listed twice": lambda d: d["graphs"]["decode"]["weights"].append(WEIGHT),
    "no weights": lambda d: d["graphs"]["decode"].update(weights=[]),
    # ports
    "port of unknown type": put("graphs", "prefill", "inputs", 0, "dtype", value="int37"),
    "port of another type": put("graphs", "prefill", "inputs", 0, "dtype", value="float32"),
    "logits of another type": put("graphs", "prefill", "outputs", 0, "dtype", value="float16"),
    "logits of another width": put("graphs", "decode", "outputs", 0, "dims", 1, value=511),
    "logits of no width": put("graphs", "decode", "outputs", 0, "dims", value=[]),
    "a port too many": lambda d: d["graphs"]["prefill"]["inputs"].append(
        {"name": "more", "dtype": "int64", "dims": []}
    ),
    "a port too few": drop("graphs", "decode", "inputs", 1),
    "no ports": lambda d: d["graphs"]["decode"].update(inputs=[], outputs=[]),
    "ports in another order": lambda d: d["graphs"]["prefill"]["inputs"].reverse(),
    "port listed twice": lambda d: d["graphs"]["prefill"]["inputs"].append(
        d["graphs"]["prefill"]["inputs"][0]
    ),
    "port with a long name": put("graphs", "prefill", "inputs", 0, "name", value=LONG),
    "vision takes something else": put("graphs", "vision", "inputs", 0, "name", value="pixels"),
    "vision gives something else": put("graphs", "vision", "outputs", 0, "name", value="x"),
    "vision gives another width": put("graphs", "vision", "outputs", 0, "dims", 1, value=64),
    # graphs
    "decode is prefill": put("graphs", "decode", "file", value="prefill.onnx"),
    "decode as lowered is prefill": put(
        "graphs", "decode", "lowered", value={"ort-cpu": "prefill.ort-cpu.onnx"}
    ),
    "vision is prefill": lambda d: d["graphs"].update(vision=d["graphs"]["prefill"]),
    "a graph that is weights": put("graphs", "vision", "file", value="weights.bin"),
    "a graph that is text": put("graphs", "vision", "file", value="tokenizer.json"),
    "a graph that is the manifest": put("graphs", "vision", "file", value="lvlm.json"),
    "a fourth graph": lambda d: d["graphs"].update(more=d["graphs"]["decode"]),
    "a compact graph": lambda d: d["graphs"].update(compact=d["graphs"]["decode"]),
    "a graph with a long name": lambda d: d["graphs"].update({LONG: d["graphs"]["decode"]}),
    # sizes
    **{
        f"text.{name} is {value!r:.8}": put("text", name, value=value)
        for name in ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocab")
        for value in (1, 10**9, HUGE)
    },
    "a prompt's tokens see those that follow": put("text", "bidirectional", value=True),
    "ends by no token": put("text", "eos_ids", value=[]),
    "ends by a token that is none": put("text", "eos_ids", value=[HUGE]),
    "ends by a negative token": put("text", "eos_ids", value=[-1]),
    **{
        f"states of {types}": lambda d, types=types: (  # type: ignore[misc]
            d["text"].update(states=[[1, 2, 3]] * 2, state_dtypes=types)
        )
        for types in ([], ["float32"], ["float32", "float64"], ["float32"] * 3)
    },
    "images of 1 token": put("images", "tokens", value=1),
    **{
        f"images.{name} is {value!r:.16}": put("images", name, value=value)
        for name, value in (
            ("tokens", 10**9),
            ("tokens", HUGE),
            ("token_id", 10**9),
            ("token_id", -1),
            ("token_id", HUGE),
            ("token", ""),
            ("token", "a\nb"),
            ("token", LONG),
            ("grid", []),
            ("grid", [10**9, 10**9]),
            ("grid", [1, 16]),
            ("size", []),
            ("size", [10**6, 10**6]),
            ("size", [28, 28]),
            ("independent_units", False),
            ("shared_rows", 3),
            ("shared_rows", 10**12),
            ("deepstack_layers", 1),
            ("as_text", True),
            ("bidirectional", True),
            ("patches", -1),
            ("patches", HUGE),
            ("patch_heads", HUGE),
            ("positions", "grid"),
            ("max_dims", {}),
            ("max_dims", {"units": HUGE}),
            ("processor", {}),
            ("processor", {"name": "qwen_vl"}),
            ("processor", {"name": LONG}),
            ("processor", {"name": "../x"}),
        )
    },
    **{
        f"processor.{name} is {value!r:.16}": put("images", "processor", name, value=value)
        for name, value in (
            ("resize", {"shortest_edge": 10**9}),
            ("resize", {"shortest_edge": 28}),
            ("crop", {"height": 28, "width": 28}),
            ("image_tokens", 10**9),
            ("image_tokens", 15),
            ("mean", [float("nan")] * 3),
            ("std", [0, 0, 0]),
            ("std", [HUGE] * 3),
            ("resample", 99),
            ("pad_value", HUGE),
        )
    },
    # recipes
    "more reductions than the graph has": put(
        "reductions", value=[REDUCTION | {"layer": n} for n in (1,)] * 2
    ),
    "a reduction that the graph lacks": lambda d: (
        d["text"].update(layers=3)
        or d["capacity"]["per_layer"].append(40)
        or d["reductions"].append(REDUCTION | {"layer": 2})
    ),
    "no reductions": put("reductions", value=[]),
    "a reduction without recycling": put("reductions", 0, "recycle", value=None),
    "an exponent of 10**4000": put("reductions", 0, "exponent", value=HUGE),
    "an exponent of 1e300": put("reductions", 0, "exponent", value=1e300),
    "no compression": put("cache_policy", value=None),
    "a compression by interval": lambda d: d["cache_policy"].update(
        decode={"kind": "interval", "steps": 4, "floor": 0},
        score={"kind": "window", "queries": 1, "kernel": 1, "pool": "mean", "per_head": False},
    ),
    **{
        f"cache_policy.{'.'.join(place)} is {value!r:.16}": put("cache_policy", *place, value=value)
        for *place, value in (
            ("budget", "keep", 1.0),
            ("budget", "keep", HUGE),
            ("budget", "keep", 1e-300),
            ("budget", "cap", HUGE),
            ("budget", "cap", 10**12),
            ("sinks", HUGE),
            ("sinks", 10**12),
            ("recent", 10**12),
            ("decode", "distance", 10**12),
            ("decode", "distance", HUGE),
            ("budget", {"kind": "profile", "keep": 0.5, "rows": [ROW]}),
            ("decode", {"kind": "oldest"}),
            ("decode", {"kind": "append"}),
            ("score", {"kind": "window", "queries": 1, "kernel": HUGE}),
            ("positions", "layer0"),
            ("budget", "kind", "released-uniform"),
        )
    },
    **{
        f"capacity.{name} is {value!r:.16}": put("capacity", name, value=value)
        for name, value in (
            ("max_text_len", 10**12),
            ("max_text_len", HUGE),
            ("max_images", 10**12),
            ("max_images", HUGE),
            ("per_layer", [HUGE, HUGE]),
            ("per_layer", [10**12, 10**12]),
            ("per_layer", [1, 1]),
        )
    },
    # image tokens dropped before the model
    **{
        f"an encoder with {name}": put("encoder", value=ENCODER | change)
        for name, change in {
            "an unknown rule": {"rule": "best\nof"},
            "a rule of 100,000 characters": {"rule": LONG},
            "settings of another": {"settings": {"seed": 3}},
            "scores that nobody gives": {"scores": 5},
            "a rule that wants scores": {"rule": "visionzip"},
            "huge scores": {"rule": "visionzip", "scores": HUGE},
            "a seed of 10**4000": {"rule": "random", "settings": {"seed": -HUGE}},
            "merged that is none": {"rule": "visionzip", "scores": 9, "settings": {"merged": "x"}},
            "an exponent of 0": {"exponent": 0.0},
            "no exponent": {"exponent": None},
            "a ratio beside it": {"ratio": 0.5},
            "places elsewhere": {"places": "there"},
        }.items()
    },
    # types
    "another dtype": put("dtype", value="float16"),
    "another cache dtype": put("cache_dtype", value="float16"),
    "a cache in bf16": put("cache_dtype", value="bfloat16"),
    "a cache in 8 bits": put("cache_dtype", value="int8"),
    "a field of 100,000 characters": put("family", value=LONG),
    "a dtype of 100,000 characters": put("dtype", value=LONG),
    "a huge number for text": put("family", value=HUGE),
    "an unknown field with line breaks": put("a\nb\nc\nd", value=1),
    "an unknown long field": put(LONG, value=1),
    "a file with line breaks": lambda d: d["files"].update({"a\nb": d["files"]["weights.bin"]}),
    "a file with a long name": lambda d: d["files"].update({LONG: d["files"]["weights.bin"]}),
    "a file that is a folder": lambda d: d["files"].update({".": d["files"]["weights.bin"]}),
    "a file of negative size": put("files", "weights.bin", "bytes", value=-1),
    "a file of huge size": put("files", "weights.bin", "bytes", value=HUGE),
    "a hash that is none": put("files", "weights.bin", "sha256", value="a\nb" * 1000),
    "hashes of blocks that are none": put("files", "weights.bin", "blocks", value="xyz"),
    "no tokenizer listed": drop("files", "tokenizer.json"),
    # text
    "a template that fails": put("chat_template", value="{% for"),
    "a template of long text": put("chat_template", value=LONG),
    "a template without images": put("chat_template", value="x"),
    "a template with half a character": put("chat_template", value="{{ '\ud800' }}"),
    "special tokens with half a character": put("special_tokens", value={"bos_token": "\udfff"}),
    "a generation that is none": put("generation", value={"repetition_penalty": "x"}),
    "a penalty of 10**4000": put("generation", value={"repetition_penalty": HUGE}),
    "bad words of huge ids": put("generation", value={"bad_words_ids": [[HUGE]]}),
    "suppressed huge ids": put("generation", value={"suppress_tokens": [10**9]}),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda name: name.replace(" ", "-"))
def test_manifests_that_are_not_true(folder: Path, attack: str) -> None:
    if "fifo" in attack:
        os.mkfifo(folder / "fifo")
    replace_json(folder, ATTACKS[attack])
    answer_or_line(folder)

"""Bundles of earlier schemas load, and answer as they did."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from settings import ASSETS

import lvlm
from lvlm.core.errors import BundleError
from lvlm.core.typed_json import decode
from lvlm.runtime.bundle.manifest import SCHEMA
from lvlm.runtime.bundle.old_schemas import upgraded
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.policies.evictions import FixedPoint, Interval, ReleasedFixedPoint
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import AllQueries, Window
from lvlm.runtime.policies.selections import Evict, Merge, ReleasedMerge
from lvlm.runtime.policies.shares import ReleasedUniform, Uniform
from lvlm.runtime.tools.recorded_answers import recorded_answers

DATA = Path(__file__).parents[2] / "data/bundles"
SAMPLE = ASSETS / "samples/digits-1.png"
# A random LLaVA of two layers with lightvlm at keep 0.5, exported and asked at commit a2b913b.
ANSWERS = {
    "Read the top row.": [506, 432, 484, 432, 503, 157, 58, 248, 466, 405, 67, 433],
    "How often does 7 appear?": [486, 58, 349, 349, 408, 101, 408, 283, 265, 227, 278, 101],
}
# A smaller one with prefixkv, and with lightvlm that compacts every 5 steps, at commit 00176c6: the
# same questions without a chat template, as exported and at kv_keep 0.25, whatever ends a text.
LATER = {
    "profile": [
        [
            475,
            475,
            475,
            452,
            113,
            248,
            500,
            452,
            215,
            395,
            448,
            340,
            220,
            174,
            460,
            460,
            460,
            460,
            460,
            460,
            263,
            463,
            463,
            463,
        ],
        [
            475,
            500,
            305,
            174,
            336,
            174,
            500,
            65,
            18,
            166,
            18,
            440,
            480,
            18,
            314,
            486,
            434,
            51,
            481,
            435,
            0,
            388,
            435,
            0,
        ],
    ],
    "interval": [
        [
            475,
            475,
            475,
            475,
            475,
            475,
            414,
            452,
            504,
            504,
            414,
            452,
            123,
            468,
            225,
            468,
            225,
            468,
            225,
            468,
            468,
            225,
            468,
            468,
        ],
        [
            475,
            475,
            475,
            475,
            475,
            475,
            153,
            286,
            437,
            437,
            437,
            364,
            62,
            467,
            120,
            198,
            232,
            122,
            329,
            414,
            278,
            463,
            278,
            463,
        ],
    ],
}
# One of that size with recipe none, which schema 5 has no graph extend for, at commit 4ac7276: two
# questions about one image, of which the second is read from what the first left.
EXTENDED = [
    [451] * 10 + [149, 451, 221, 451, 221, 215, 451, 451, 451, 221, 451, 451, 451, 451],
    [451] * 11 + [221, 451, 221, 451, 451, 451, 451, 221, 451, 221, 451, 451, 451],
]
# And with that graph, of schema 6, at commit 6fe48d6.
READ_ON = [
    [350, 381, 73, 325, 274, 157, 251, 439, 477, 325, 274, 444, 71, 38]
    + [157, 325, 325, 157, 325, 157]
    + [439] * 4,
    [350, 381, 477, 325, 274, 457, 157, 251, 439, 477, 325, 274, 439]
    + [325] * 3
    + [157, 325, 157]
    + [439] * 5,
]
# With divprune at keep 0.5, of schema 7, at commit 5ca8523: as exported, and at keep 0.2.
DROPPED = [
    [103, 444, 29, 192, 415, 287, 338, 81, 444, 361, 287, 192, 287, 192, 287, 192]
    + [415] * 5
    + [287, 417, 287],
    [
        *(103, 444, 29, 192, 415, 287, 338, 81, 444, 361, 287, 192, 287, 192, 287, 192),
        *(415, 287, 192, 287, 152, 415, 287, 192),
    ],
]
FEWER = [
    [92, 410, 444, 42, 250, 233, 19, 92, 410, 444, 42, 250, 417, 287, 163, 287, 192, 287]
    + [417, 287] * 3,
    [
        *(92, 410, 444, 42, 250, 233, 19, 410, 444, 42, 250, 287, 417, 287, 511, 361, 287),
        *(417, 287, 417, 287, 417, 287, 417),
    ],
]
FLAT = {
    "keep": 0.2,
    "profile": [],
    "cap": None,
    "floor": 0,
    "sinks": 1,
    "recent": 1,
    "distance": 25,
    "interval": None,
    "queries": 0,
    "positions": "true",
    "semantics": "paper",
}
INTERVAL = FLAT | {"distance": None, "interval": 64, "floor": 128, "queries": 32, "recent": 32}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with zipfile.ZipFile(DATA / "schema-3.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "s3"


def test_an_old_bundle_answers_as_recorded(old: Path) -> None:
    with lvlm.load(old) as model:
        found = [
            model.generate(prompt, images=images, max_new_tokens=12)
            for prompt, images in zip(ANSWERS, ([SAMPLE], []), strict=True)
        ]
    assert [answer.token_ids for answer in found] == list(ANSWERS.values())


def test_an_old_manifest_gets_the_new_fields_and_is_written_as_new(old: Path) -> None:
    manifest = read_bundle(old)
    assert (manifest.schema, manifest.generation) == (3, {})
    assert manifest.files["weights.bin"].blocks == ""
    manifest.write(old)
    assert json.loads((old / "lvlm.json").read_text())["schema"] == SCHEMA
    assert read_bundle(old).schema == SCHEMA


@pytest.mark.parametrize("name", LATER)
def test_a_bundle_with_a_flat_compression_answers_as_recorded(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(DATA / f"schema-4-{name}.zip") as archive:
        archive.extractall(tmp_path)
    assert json.loads((tmp_path / name / "lvlm.json").read_text())["schema"] == 4
    with lvlm.load(tmp_path / name) as model:
        found = [
            model.generate(
                "USER: How often does 7 appear in a picture? ASSISTANT:",
                chat_template=False,
                max_new_tokens=24,
                ignore_eos=True,
                **ratio,
            ).token_ids
            for ratio in ({}, {"kv_keep": 0.25})
        ]
        kept = model.manifest.cache_policy
    assert found == LATER[name]
    read_bundle(tmp_path / name).write(tmp_path / name)
    assert read_bundle(tmp_path / name).cache_policy == kept


@pytest.mark.parametrize(
    ("schema", "words", "answered", "reused"),
    [(5, "how often?", EXTENDED, 62), (6, "how often in all of it?", READ_ON, 47)],
)
def test_a_bundle_without_an_encoder_answers_as_recorded(
    schema: int, words: str, answered: list[list[int]], reused: int, tmp_path: Path
) -> None:
    """That of schema 5 has no graph extend either."""
    with zipfile.ZipFile(DATA / f"schema-{schema}.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "none"
    assert json.loads((folder / "lvlm.json").read_text())["schema"] == schema
    prompts = [
        f"USER: <image>\nWhat is there to see in it, and {words} {digit} ASSISTANT:"
        for digit in (7, 9)
    ]
    options: dict[str, Any] = {"chat_template": False, "max_new_tokens": 24, "ignore_eos": True}
    with lvlm.load(folder) as model:
        found = [model.generate(p, images=[SAMPLE], **options).token_ids for p in prompts]
    with lvlm.Engine(folder) as engine:
        answers = [engine.submit(p, [SAMPLE], **options).result() for p in prompts]
    assert found == [answer.token_ids for answer in answers] == answered
    assert answers[1].stats.reused_tokens == reused
    read_bundle(folder).write(folder)  # in the present schema, but as it was
    assert ("extend" in read_bundle(folder).graphs) == (schema == 6)
    assert read_bundle(folder).encoder is None


def test_a_bundle_that_drops_image_tokens_answers_as_recorded(tmp_path: Path) -> None:
    with zipfile.ZipFile(DATA / "schema-7.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "divprune"
    assert json.loads((folder / "lvlm.json").read_text())["schema"] == 7
    prompts = [
        f"USER: <image>\nWhat is there to see in it, and how often in the rest? {n} ASSISTANT:"
        for n in (7, 9)
    ]
    options: dict[str, Any] = {"chat_template": False, "max_new_tokens": 24, "ignore_eos": True}
    with lvlm.load(folder) as model:
        few = [model.generate(p, images=[SAMPLE], keep=0.2, **options).token_ids for p in prompts]
    with lvlm.Engine(folder) as engine:
        answers = [engine.submit(p, [SAMPLE], **options).result() for p in prompts]
    assert [list(answer.token_ids) for answer in answers] == DROPPED
    assert answers[1].stats.reused_tokens == 35
    assert [list(tokens) for tokens in few] == FEWER
    images = read_bundle(folder).images
    assert (images.as_text, images.bidirectional) == (False, False)
    with pytest.raises(BundleError, match="holds no recorded answers"):
        recorded_answers(folder, read_bundle(folder))


@pytest.mark.parametrize(
    ("flat", "recipe", "policy"),
    [
        (FLAT, "uniform", CachePolicy(AllQueries(), Evict(), FixedPoint(25), Uniform(0.2), 1)),
        (
            FLAT | {"sinks": 3, "cap": 9, "positions": "layer0"},
            "elastic-cache",
            CachePolicy(
                AllQueries(), Merge(), FixedPoint(25), Uniform(0.2, 9), 3, positions="layer0"
            ),
        ),
        (
            FLAT | {"semantics": "reference", "distance": 24},
            "elastic-cache",
            CachePolicy(
                AllQueries(), ReleasedMerge(), ReleasedFixedPoint(24), ReleasedUniform(0.2), 1
            ),
        ),
        (
            INTERVAL,
            "lightvlm",
            CachePolicy(Window(32), Evict(), Interval(64, 128), Uniform(0.2), 1, 32),
        ),
    ],
)
def test_flat_compressions_become_policies(
    flat: dict[str, Any], recipe: str, policy: CachePolicy
) -> None:
    data = {"schema": 4, "recipe": recipe, "compression": flat, "parameters": {}}
    found = upgraded(data, "lvlm.json")["cache_policy"]
    assert decode(CachePolicy, found, "it") == policy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distance": None}, "it needs either distance or interval"),
        ({"interval": 3}, "it needs either distance or interval"),
        ({"floor": 3}, "floor goes with an interval"),
        ({"keep": 2}, "kv_keep is 2.0"),
        ({"queries": 3}, "3 queries rank the entries"),
        ({"cap": 1}, "kv_cap is 1, but 2 entries"),
        ({"semantics": "papers"}, "semantics holds 'papers'"),
        ({"more": 1}, "unknown field 'more'"),
        ({"profile": 3}, "profile holds 3"),
    ],
)
def test_flat_compressions_that_cannot_be(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        upgraded({"schema": 4, "compression": FLAT | change}, "lvlm.json")
    with pytest.raises(BundleError, match="compression"):
        upgraded({"schema": 4, "compression": []}, "lvlm.json")


def test_old_names_of_fields() -> None:
    images = {"token": "<image>", "apart": False, "deep": 2, "most": {"units": 3}}
    data = {"schema": 4, "images": images, "compression": None}
    assert upgraded(data, "lvlm.json") == {
        "schema": 4,
        "images": {
            "token": "<image>",
            "independent_units": False,
            "deepstack_layers": 2,
            "max_dims": {"units": 3},
        },
        "cache_policy": None,
    }
    assert upgraded(data | {"schema": SCHEMA}, "lvlm.json")["images"] == images


@pytest.mark.parametrize("schema", [2, SCHEMA + 1])
def test_other_schemas_are_refused_in_one_line(old: Path, schema: int) -> None:
    data = json.loads((old / "lvlm.json").read_text())
    (old / "lvlm.json").write_text(json.dumps(data | {"schema": schema, "more": []}))
    with pytest.raises(BundleError) as caught:
        read_bundle(old)
    assert f"has schema {schema}, this version reads 3 to {SCHEMA}" in str(caught.value)
    assert "\n" not in str(caught.value)

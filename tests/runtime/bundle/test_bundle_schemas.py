"""Bundles of the schema before this one load, and answer as they did."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

import lvlm
from lvlm.core.errors import BundleError
from lvlm.runtime.bundle.manifest import SCHEMA
from lvlm.runtime.bundle.reader import read_bundle

DATA = Path(__file__).parents[2] / "data/bundles"
SAMPLE = Path(__file__).parents[3] / "assets/samples/digits-1.png"
# A random LLaVA of two layers with lightvlm at keep 0.5, exported and asked at commit a2b913b.
ANSWERS = {
    "Read the top row.": [506, 432, 484, 432, 503, 157, 58, 248, 466, 405, 67, 433],
    "How often does 7 appear?": [486, 58, 349, 349, 408, 101, 408, 283, 265, 227, 278, 101],
}


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


@pytest.mark.parametrize("schema", [2, SCHEMA + 1])
def test_other_schemas_are_refused_in_one_line(old: Path, schema: int) -> None:
    data = json.loads((old / "lvlm.json").read_text())
    (old / "lvlm.json").write_text(json.dumps(data | {"schema": schema, "more": []}))
    with pytest.raises(BundleError) as caught:
        read_bundle(old)
    assert f"has schema {schema}, this version reads 3 and {SCHEMA}" in str(caught.value)
    assert "\n" not in str(caught.value)

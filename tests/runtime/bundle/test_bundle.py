"""Reading a bundle trusts nothing in it. The bundles here have a manifest and files, no graphs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from bundle_tools import FIXED_POINT, change, put, refused

from lvlm.runtime.bundle.manifest import Port, Reduction
from lvlm.runtime.bundle.reader import read_bundle


def test_what_was_written_is_read(folder: Path) -> None:
    manifest = read_bundle(folder)
    assert manifest.graphs["prefill"].inputs[0] == Port("input_ids", "int64", ("any", "any"))
    assert manifest.reductions[0] == Reduction(1, 0.5, None, 0.1)
    assert manifest.cache_policy == FIXED_POINT
    (folder / "lvlm.json").rename(folder / "first.json")
    manifest.write(folder)
    assert (folder / "lvlm.json").read_text() == (folder / "first.json").read_text()


def test_places_that_are_no_bundle(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "is not a bundle (no lvlm.json in it)" in refused(tmp_path)
    assert "tokenizer.json is not a bundle (a file, and" in refused(folder / "tokenizer.json")
    assert f"is a file of a bundle; give its folder {folder}" in refused(folder / "lvlm.json")
    (tmp_path / "loop").symlink_to("loop")
    assert "loop is not a bundle (a file, and" in refused(tmp_path / "loop")
    (tmp_path / "config.json").write_text("{}")
    assert f"is a checkpoint; make a bundle of it: lvlm-export -m {tmp_path}" in refused(tmp_path)
    assert len(refused(tmp_path / ("x" * 5000))) < 200
    assert r"'a\x00b'" in refused(Path("a\0b"))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00\xff", '{"schema": 3'], ids=range(5))
def test_manifest_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "lvlm.json").write_bytes(text.encode("latin-1"))
    assert "lvlm.json cannot be read" in refused(folder)


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "{}", '{"schema": 2}', '{"schema": 9}', '{"schema": "4"}']
)
def test_unknown_schema_is_told_before_unknown_fields(folder: Path, text: str) -> None:
    (folder / "lvlm.json").write_text(text)
    message = refused(folder)
    assert "this version reads 3 to 8" in message
    assert "has schema" in message


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda d: d.pop("keep"), "missing field 'keep'"),
        (lambda d: d["text"].pop("heads"), "lvlm.json.text: missing field 'heads'"),
        (lambda d: d["capacity"].pop("max_images"), "capacity: missing field 'max_images'"),
        (put("colour", value=1), "unknown field 'colour'"),
        (put("images", "tiles", value=1), "images: unknown field 'tiles'"),
        (put("text", value=[]), "text is not an object"),
        (put("text", "heads", value="2"), "text.heads holds '2'"),
        (put("text", "heads", value=2.0), "text.heads holds 2.0"),
        (put("text", "heads", value=True), "text.heads holds True"),
        (put("text", "heads", value=None), "text.heads holds None"),
        (put("keep", value="0.5"), "keep holds '0.5'"),
        (put("keep", value=True), "keep holds True"),
        (put("dtype", value="int8"), "dtype holds 'int8'"),
        (put("cache_dtype", value="int4"), "cache_dtype holds 'int4'"),
        (put("quantization", "bits", value="4"), "quantization.bits holds '4'"),
        (put("quantization", "bits", value=3), "weights of 3 bits in blocks of 32"),
        (put("quantization", "block", value=0), "weights of 4 bits in blocks of 0"),
        (put("chat_template", value=7), "chat_template holds 7"),
        (put("graphs", value=[]), "graphs holds []"),
        (put("files", value={"a": {"sha256": 1, "bytes": 1}}), "files.a.sha256 holds 1"),
        (put("special_tokens", value={"bos_token": 1}), "special_tokens.bos_token holds 1"),
        (put("capacity", "per_layer", 2, value="34"), "capacity.per_layer[2] holds '34'"),
        (put("reductions", 0, "recycle", value="x"), "reductions[0].recycle holds 'x'"),
        (put("cache_policy", "positions", value="mine"), "cache_policy.positions holds 'mine'"),
        (lambda d: d.pop("cache_policy"), "missing field 'cache_policy'"),
        (put("graphs", "vision", "outputs", 0, "dims", 0, value=1.5), "puts[0].dims[0] holds 1.5"),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_fields_that_do_not_fit_are_named(folder: Path, edit: Any, named: str) -> None:
    change(folder, edit)
    assert named in refused(folder)


def test_an_integer_is_a_fraction_too(folder: Path) -> None:
    change(folder, put("keep", value=1))
    assert read_bundle(folder).keep == 1.0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d["capacity"]["per_layer"].pop(), "another number of layers than 4"),
        (put("capacity", "per_layer", value=[]), "another number of layers than 4"),
        (put("capacity", "per_layer", 1, value=0), "out of range"),
        (put("capacity", "max_text_len", value=0), "out of range"),
        (put("text", "kv_heads", value=-1), "out of range"),
        (put("images", "tokens", value=0), "out of range"),
        (put("images", "grid", value=[2, 0]), "out of range"),
        (put("images", "max_dims", value={"units": 0}), "out of range"),
        (put("images", "deepstack_layers", value=99), "enter 99 blocks more"),
        (put("images", "grid", value=[4]), "a grid and a size of two numbers"),
        (put("images", "size", value=[8, 8, 3]), "a grid and a size of two numbers"),
        (put("graphs", "vision", "weights", 0, value="v"), "does not list the weight 'v'"),
        (put("weights", "w", "offset", value=1080), "'w' lies outside its file"),
        (put("weights", "w", "offset", value=-1), "'w' lies outside its file"),
        (put("weights", "w", "dims", 0, value=-2), "'w' has another size than its shape"),
        (put("weights", "w", "file", value="other.bin"), "in 'other.bin', which is not listed"),
        (put("graphs", "decode", "lowered", value={"t": "d.t.onnx"}), "no hash for 'd.t.onnx'"),
        (put("graphs", "decode", "lowered", value={"t": "../d"}), "no hash for '../d'"),
        (put("keep", value=0), "out of range"),
        (put("keep", value=1.5), "out of range"),
        (put("keep", value=float("nan")), "out of range"),
        (put("reductions", 0, "layer", value=0), "at layers [0, 2] of 4"),
        (put("reductions", 1, "layer", value=4), "at layers [1, 4] of 4"),
        (put("reductions", 0, "layer", value=3), "at layers [3, 2] of 4"),
        (put("reductions", 0, "exponent", value=None), "reduction out of range"),
        (put("reductions", 0, "exponent", value=-1.0), "reduction out of range"),
        (put("reductions", 0, "ratio", value=0.5), "reduction out of range"),
        (put("reductions", 1, "recycle", value=2.0), "reduction out of range"),
        (lambda d: d["reductions"][0].update(exponent=None, ratio=3.0), "reduction out of range"),
        (lambda d: d["reductions"][0].update(exponent=None, ratio=0.5), "mixes reductions"),
        (lambda d: d["graphs"].pop("decode"), "lists no decode graph"),
        (lambda d: d["files"].pop("prefill.onnx"), "no hash for 'prefill.onnx'"),
    ],
)
def test_values_that_cannot_be(folder: Path, edit: Any, said: str) -> None:
    change(folder, edit)
    assert said in refused(folder)


@pytest.mark.parametrize(
    "name", ["../vision.onnx", "/etc/hostname", "a/../../b", "..\\b", "", "a\0b"]
)
def test_paths_that_leave_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "vision.onnx").write_bytes((folder / "vision.onnx").read_bytes())
    original = (folder / "lvlm.json").read_text()

    def in_graph(data: Any) -> None:
        data["graphs"]["vision"]["file"] = name
        data["files"][name] = data["files"]["vision.onnx"]

    change(folder, in_graph)
    assert "leaves " in refused(folder)
    assert "leaves " in refused(folder, verify="none")
    (folder / "lvlm.json").write_text(original)
    change(folder, lambda d: d["files"].update({name: d["files"]["weights.bin"]}))
    assert "leaves " in refused(folder)


@pytest.mark.parametrize("target", ["../elsewhere.bin", "/absolute"])
def test_links_to_listed_content_are_fine_wherever_they_lead(folder: Path, target: str) -> None:
    """As in the hub's cache, or with weights on another disk."""
    place = folder.parent / "elsewhere.bin"
    weights = folder / "weights.bin"
    weights.rename(place)
    weights.symlink_to(place if target == "/absolute" else target)
    read_bundle(folder)
    alias = folder.parent / "alias"
    alias.symlink_to(folder)
    read_bundle(alias)
    place.write_bytes(place.read_bytes()[::-1])
    assert "weights.bin has changed" in refused(folder)
    place.unlink()
    assert "lacks the file weights.bin" in refused(folder)


def test_link_in_a_circle(folder: Path) -> None:
    weights = folder / "weights.bin"
    weights.unlink()
    weights.symlink_to("weights.bin")
    refused(folder)


def test_missing_longer_and_changed_files_are_named(folder: Path) -> None:
    weights = folder / "weights.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"x")
    assert re.search(r"weights\.bin has 1,101 bytes, not 1,100", refused(folder))
    assert "1,101 bytes" in refused(folder, verify="none")
    weights.write_bytes(whole[:500] + b"?" + whole[501:])
    assert "weights.bin has changed" in refused(folder)
    read_bundle(folder, verify="none")
    weights.unlink()
    assert "lacks the file weights.bin" in refused(folder)
    assert "lacks the file weights.bin" in refused(folder, verify="none")
    weights.mkdir()
    assert "weights.bin is not a file" in refused(folder)

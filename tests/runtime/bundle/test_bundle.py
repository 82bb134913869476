"""Reading a bundle trusts nothing in it. The bundles here have a manifest and files, no graphs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import policies
import pytest
from policies import APPENDED, SLIDING, UNIFORM, changed

from lvlm.core import integrity
from lvlm.core.errors import BundleError
from lvlm.runtime.bundle.graph_ports import FORMS
from lvlm.runtime.bundle.manifest import (
    Capacity,
    Graph,
    Images,
    Manifest,
    Port,
    Quantization,
    Reduction,
    Text,
    Weight,
)
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.shares import ProfileRow

GRAPHS = ("vision", "prefill", "decode")
PROFILE = (ProfileRow(0.2, (0.3, 0.3, 0.1, 0.1)), ProfileRow(0.5, (0.8, 0.6, 0.4, 0.2)))
FIXED_POINT = changed(UNIFORM, profile=PROFILE)
INTERVAL = changed(policies.INTERVAL, cap=256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle that is right as far as the reader can tell."""
    folder = tmp_path / "out"
    folder.mkdir()
    files = {}
    for name in (*(f"{g}.onnx" for g in GRAPHS), "weights.bin", "tokenizer.json"):
        path = folder / name
        path.write_bytes(name.encode() * 100)
        files[name] = integrity.describe(path)
    fit_ports(
        Manifest(
            schema=5,
            family="llava",
            model={"source": "m", "revision": None},
            recipe="lightvlm",
            parameters={"keep": 0.5},
            dtype="float32",
            cache_dtype="float16",
            quantization=Quantization(4, 32),
            graphs={g: Graph(f"{g}.onnx", (), (), ("w",)) for g in GRAPHS},
            weights={"w": Weight("weights.bin", 8, 24, "float32", (2, 3))},
            text=Text(4, 2, 1, 8, 16, 100, (2,)),
            images=Images("<image>", 3, 4, (2, 2), (8, 8), {"name": "llava"}),
            keep=0.5,
            reductions=(Reduction(1, 0.5, None, 0.1), Reduction(2, 1.0, None, None)),
            cache_policy=FIXED_POINT,
            capacity=Capacity(32, 1, (36, 35, 34, 34)),
            chat_template=None,
            special_tokens={},
            validation="skipped",
            tools={},
            files=files,
        )
    ).write(folder)
    return folder


def fit_ports(manifest: Manifest) -> Manifest:
    """With graphs that take and give what the rest of it says."""

    def ports(forms: Any) -> tuple[Port, ...]:
        return tuple(
            Port(name, dtype, tuple("any" if d is None else d for d in dims))
            for name, (dtype, dims) in forms.items()
        )

    graphs = dict(manifest.graphs)
    if manifest.cache_policy is not None and manifest.cache_policy.interval is not None:
        graphs["compact"] = graphs["decode"]
    for name, graph in graphs.items():
        takes, _, gives = FORMS[name](manifest)
        graphs[name] = replace(graph, inputs=ports(takes), outputs=ports(gives))
    return replace(manifest, graphs=graphs)


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    path = folder / "lvlm.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def put(*keys: str | int, value: object) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


def refused(folder: Path, **options: Any) -> str:
    """The one line that ``read_bundle`` refuses the bundle with."""
    with pytest.raises(BundleError) as caught:
        read_bundle(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    "text", ["[]", "null", '"x"', "{}", '{"schema": 2}', '{"schema": 6}', '{"schema": "4"}']
)
def test_unknown_schema_is_told_before_unknown_fields(folder: Path, text: str) -> None:
    (folder / "lvlm.json").write_text(text)
    message = refused(folder)
    assert "this version reads 3 to 5" in message
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
        (put("cache_dtype", value="int8"), "cache_dtype holds 'int8'"),
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


def test_a_whole_number_is_a_fraction_too(folder: Path) -> None:
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
    "cache_policy",
    [
        None,
        INTERVAL,
        changed(INTERVAL, cap=36, floor=0, interval=1, keep=1.0),
        changed(INTERVAL, sinks=0, recent=1, queries=1, cap=1),
        changed(FIXED_POINT, profile=(), distance=0, cap=2),
        changed(FIXED_POINT, sinks=0, semantics="reference", positions="layer0"),
        changed(FIXED_POINT, profile=(ProfileRow(0.2000009, (0.3, 0.3, 0.1, 0.1)),)),
        changed(FIXED_POINT, profile=(*PROFILE, ProfileRow(1.0, (1.0,) * 4))),
        SLIDING,
        APPENDED,
    ],
)
def test_cache_compressions_that_can_be(folder: Path, cache_policy: CachePolicy | None) -> None:
    fit_ports(replace(read_bundle(folder), cache_policy=cache_policy)).write(folder)
    assert read_bundle(folder).cache_policy == cache_policy


@pytest.mark.parametrize(
    ("start", "where", "value", "said"),
    [
        *(
            (FIXED_POINT, "budget.keep", keep, ".budget: kv_keep is")
            for keep in (0, -0.2, 1.01, float("nan"))
        ),
        (FIXED_POINT, "budget.cap", 1, ": kv_cap is 1, but 2 entries are protected"),
        (FIXED_POINT, "budget.cap", 0, ".budget: kv_cap is 0"),
        (INTERVAL, "budget.cap", 35, ": kv_cap is 35, but 36 entries are protected"),
        (FIXED_POINT, "budget.kind", "unifrom", ".budget is of unknown kind 'unifrom'"),
        (FIXED_POINT, "budget.floor", 1, ".budget: unknown field 'floor'"),
        (INTERVAL, "decode.floor", -1, ".decode: kv_floor is -1"),
        (FIXED_POINT, "sinks", -1, ": kv_sinks is -1"),
        (FIXED_POINT, "recent", -1, ": recent entries is -1"),
        (changed(UNIFORM, sinks=0), "recent", 0, ": no entry is protected"),
        (INTERVAL, "recent", 31, ": 32 queries rank the entries, but only the last 31"),
        (FIXED_POINT, "decode.distance", -1, ".decode: distance is -1"),
        (FIXED_POINT, "decode", {"kind": "fixed-point"}, ".decode: missing field 'distance'"),
        (FIXED_POINT, "decode", {}, ".decode is of unknown kind"),
        (FIXED_POINT, "decode", None, ".decode is not an object"),
        (INTERVAL, "decode.steps", 0, ".decode: kv_interval is 0"),
        (INTERVAL, "score.queries", 0, ".score: window is 0"),
        (INTERVAL, "score.kernel", 2, ".score: kernel is 2; give an odd number"),
        (INTERVAL, "score.pool", "sum", ".score.pool holds 'sum'"),
        (INTERVAL, "score", {"kind": "recency"}, ": compaction at intervals is ranked by"),
        (FIXED_POINT, "decode", {"kind": "released-fixed-point", "distance": 3}, "own elimination"),
        (FIXED_POINT, "select", {"kind": ["evict"]}, ".select is of unknown kind"),
    ],
)
def test_cache_compressions_that_cannot_be(
    folder: Path, start: CachePolicy, where: str, value: Any, said: str
) -> None:
    change(folder, put("cache_policy", value=asdict(start)))
    change(folder, put("cache_policy", *where.split("."), value=value))
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(0.5, (0.5,) * 4), (0.2, (0.2,) * 4)], "rows are not by rising keep"),
        ([(0.5, (0.5,) * 4), (0.5, (0.5,) * 4)], "rows are not by rising keep"),
        ([], "rows are not by rising keep"),
        ([(0.5, (0.5,) * 3)], "another number of layers than 4"),
        ([(0.5, ())], "another mean"),
        ([(0.25, (0.5, 0.4, 0.1, 0.0))], "a number of the profile is 0.0"),
        ([(0.5, (1.2, 0.4, 0.3, 0.1))], "a number of the profile is 1.2"),
        ([(float("nan"), (0.5,) * 4)], "a number of the profile is nan"),
        ([(0.5, (0.5, 0.5, 0.5, float("nan")))], "a number of the profile is nan"),
        ([(-1e-7, (1e-7,) * 4)], "a number of the profile is -1e-07"),
        ([(0.5, (0.5, 0.5, 0.5, 0.50001))], "another mean"),
    ],
)
def test_profiles_that_cannot_be(
    folder: Path, rows: list[tuple[float, tuple[float, ...]]], said: str
) -> None:
    profile = [{"keep": keep, "fractions": list(fractions)} for keep, fractions in rows]
    change(folder, put("cache_policy", "budget", "rows", value=profile))
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

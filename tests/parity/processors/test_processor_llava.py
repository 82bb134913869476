"""The preprocessing equals transformers' PIL processors, and takes no config it does not know."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lvlm.core.discovery import discover, names
from lvlm.core.errors import BundleError, ImageError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.llava import normalise_config

SIZES = [(1, 1), (1, 2), (3, 1), (5, 5), (24, 24), (23, 25), (25, 24), (47, 48), (48, 48), (64, 48)]
SIZES += [(31, 97), (333, 500), (500, 333), (1, 900), (900, 2), (4, 700)]


def sample_images() -> list[Image.Image]:
    """Sizes (width, height), then kinds of images that need a conversion."""
    rng = np.random.default_rng(0)
    plain = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES]
    rgb = plain[SIZES.index((31, 97))]
    alpha = Image.fromarray(rng.integers(0, 256, (97, 31), np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    return [*plain, rgba, rgba.convert("LA"), rgb.convert("L"), rgb.quantize(16), rgb.convert("1")]


CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "clip": (CLIPImageProcessorPil, {"size": {"shortest_edge": 24}, "crop_size": 24}),
    "clip, old": (CLIPImageProcessorPil, {"size": 24, "crop_size": 24}),
    "clip, odd crop": (
        CLIPImageProcessorPil,
        {"size": 29, "crop_size": {"height": 24, "width": 15}},
    ),
    "clip, crop beyond": (
        CLIPImageProcessorPil,
        {"size": 20, "crop_size": {"height": 31, "width": 26}},
    ),
    "clip, no resize": (CLIPImageProcessorPil, {"do_resize": False, "crop_size": [25, 33]}),
    "clip, square size": (
        CLIPImageProcessorPil,
        {"size": {"height": 24, "width": 18}, "do_center_crop": False, "resample": 2},
    ),
    "clip, no normalise": (
        CLIPImageProcessorPil,
        {"size": 24, "crop_size": 24, "do_normalize": False},
    ),
    "clip, no rescale": (CLIPImageProcessorPil, {"size": 24, "crop_size": 24, "do_rescale": False}),
    "clip, no arithmetic": (
        CLIPImageProcessorPil,
        {"size": 24, "crop_size": 24, "do_rescale": False, "do_normalize": False},
    ),
    "clip, other arithmetic": (
        CLIPImageProcessorPil,
        {
            "size": 24,
            "crop_size": 24,
            "rescale_factor": 1 / 127.5,
            "image_mean": 1.0,
            "image_std": 1.0,
        },
    ),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 24, "width": 24}}),
    "siglip, bilinear": (SiglipImageProcessorPil, {"size": [24, 20], "resample": 2}),
    "siglip, with crop": (
        SiglipImageProcessorPil,
        {"size": {"height": 30, "width": 30}, "do_center_crop": True, "crop_size": 24},
    ),
    "llava": (LlavaImageProcessorPil, {"size": {"shortest_edge": 24}, "crop_size": 24}),
    "llava, padded": (LlavaImageProcessorPil, {"do_pad": True, "size": 24, "crop_size": 24}),
    "llava, padded, no crop": (
        LlavaImageProcessorPil,
        {"do_pad": True, "size": 24, "do_center_crop": False, "image_mean": [0.2, 0.5, 0.999]},
    ),
    "clip, defaults": (CLIPImageProcessorPil, {}),
    "siglip, defaults": (SiglipImageProcessorPil, {}),
    "llava, defaults": (LlavaImageProcessorPil, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_transformers(case: str) -> None:
    kind, options = CASES[case]
    theirs = kind(**options)
    written = {"image_processor_type": kind.__name__, **options}
    # What is in a checkpoint may be short, or have all of it, as transformers writes it today
    for preprocessor in (written, theirs.to_dict()):
        ours = load_processor(normalise_config(preprocessor, image_tokens=4))
        images = sample_images()[:: 4 if "defaults" in case else 1]
        got = ours.pixel_values([open_image(image) for image in images])
        expected = np.stack([theirs(image)["pixel_values"][0] for image in images])
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize(
    "named",
    [
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPFeatureExtractor",
    ],
)
def test_names_of_all_ages(named: str) -> None:
    key = "feature_extractor_type" if "Feature" in named else "image_processor_type"
    config = normalise_config({key: named, "crop_size": None, "resample": None}, image_tokens=576)
    assert config == {
        "name": "llava",
        "resize": {"shortest_edge": 224},
        "resample": 3,
        "crop": {"height": 224, "width": 224},
        "pad_to_square": False,
        "pad_value": [0, 0, 0],
        "rescale_factor": 1 / 255,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "image_tokens": 576,
    }


@pytest.mark.parametrize(
    ("preprocessor", "problem"),
    [
        ({}, "names no image_processor_type"),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "ViTFeatureExtractor"),
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "supported are CLIP"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "do_pad"),
        (
            {"image_processor_type": "CLIPImageProcessor", "use_square_size": True},
            "use_square_size",
        ),
        (
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 2, "longest_edge": 9},
            },
            "longest_edge",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
            "differing sizes",
        ),
        ({"image_processor_type": "SiglipImageProcessor", "do_center_crop": True}, "crop"),
        (
            {"image_processor_type": "CLIPImageProcessor", "resample": "bicubic"},
            "resample = 'bicubic'",
        ),
        ({"image_processor_type": "CLIPImageProcessor", "image_std": [1, 0, 1]}, "std"),
        (
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": "grey"},
            "image_mean",
        ),
    ],
)
def test_unsupported_checkpoints(preprocessor: dict[str, object], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        normalise_config(preprocessor, image_tokens=4)


CONFIG = normalise_config(
    {"image_processor_type": "CLIPImageProcessor", "size": 8, "crop_size": 8}, image_tokens=4
)
PADDED = normalise_config(
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": 8, "crop_size": 8}, 4
)


def test_tokens_and_no_images() -> None:
    processor = load_processor(CONFIG)
    shapes = [(1, 1, 3), (900, 40, 3)]
    prepared = processor.prepare([np.zeros(shape, np.uint8) for shape in shapes])
    assert [p.tokens for p in prepared] == [4, 4]
    assert processor.pixel_values([]).shape == (0, 3, 8, 8)


def test_every_processor_is_found_by_its_file_name() -> None:
    found = discover("lvlm.runtime.processors", "PROCESSOR")
    assert sorted(found) == names("lvlm.runtime.processors")
    assert "llava" in found


def test_only_the_named_processor_is_imported() -> None:
    code = (
        "import sys, lvlm.runtime.processors as p; early = (p.__name__ + '.', 'PIL', 'torch'); "
        "sys.exit(any(name.startswith(early) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["lava", "..errors", "__init__", "", None, 3, ["llava"]])
def test_unknown_processor(name: object) -> None:
    with pytest.raises(BundleError, match="processor"):
        load_processor({**CONFIG, "name": name})


@pytest.mark.parametrize("key", sorted(CONFIG.keys() - {"name"}))
def test_missing_key(key: str) -> None:
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in CONFIG.items() if k != key})


def test_unknown_key() -> None:
    with pytest.raises(BundleError, match="unknown key, 'sharpen'"):
        load_processor({**CONFIG, "sharpen": True})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resize", {"shortest_edge": 0}),
        ("resize", {"shortest_edge": 10**9}),
        ("resize", {"height": 8}),
        ("resize", 8),
        ("resample", 6),
        ("resample", True),
        ("crop", {"height": 8, "width": -8}),
        ("crop", {"height": 8.0, "width": 8}),
        ("pad_to_square", 1),
        ("pad_value", [0, 0, 256]),
        ("pad_value", None),
        ("rescale_factor", float("nan")),
        ("rescale_factor", 0),
        ("mean", None),
        ("mean", [0.5, 0.5]),
        ("std", [0.5, 0.5, 0]),
        ("std", [0.5, 0.5, 10**400]),
        ("image_tokens", 0),
        ("image_tokens", "4"),
    ],
)
def test_bad_value(key: str, value: object) -> None:
    with pytest.raises(BundleError, match=key if key != "resize" else r"resize|shortest_edge"):
        load_processor({**PADDED, key: value})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["height", "width", "shortest_edge", "x"]), inner, max_size=2
        )
    ),
    max_leaves=5,
)


@settings(max_examples=examples(150), deadline=None)
@given(st.sampled_from(sorted(CONFIG)), JUNK, st.booleans())
def test_junk_configs_work_or_give_a_bundle_error(key: str, value: object, padded: bool) -> None:
    try:
        processor = load_processor({**(PADDED if padded else CONFIG), key: value})
    except BundleError:
        return
    assert processor.pixel_values([]).ndim == 4


@settings(max_examples=examples(150), deadline=None)
@given(
    st.sampled_from(["size", "crop_size", "resample", "image_mean", "image_std", "do_pad"]), JUNK
)
def test_junk_checkpoints_work_or_give_a_parameter_error(key: str, value: object) -> None:
    for kind in ("CLIPImageProcessor", "LlavaImageProcessor"):
        try:
            config = normalise_config({"image_processor_type": kind, key: value}, image_tokens=4)
        except ParameterError:
            continue
        (prepared,) = load_processor(config).prepare([np.zeros((1, 1, 3), np.uint8)])
        assert prepared.tokens == 4


@pytest.mark.parametrize("shape", [(1, 20_000, 3), (20_000, 1, 3)])
def test_extreme_aspect_ratio_is_refused(shape: tuple[int, int, int]) -> None:
    image = np.zeros(shape, np.uint8)
    clip = normalise_config({"image_processor_type": "CLIPImageProcessor"}, image_tokens=4)
    for config in (clip, PADDED):
        with pytest.raises(ImageError, match="aspect ratio 20000:1"):
            load_processor(config).pixel_values([image])

"""Videos: frames, pixels, words and positions as transformers has them, and the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bundles import TINY, tried
from example_counts import whole
from parity_tools import load_torch, make_reference
from PIL import Image
from settings import LIGHTVLM
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import (
    LlavaOnevisionVideoProcessor,
)
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata
from video_tools import inputs, noise_video

import lvlm
from lvlm.runtime.media.video import Video
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.parts.frames import spoken
from lvlm.runtime.processors.parts.tiles import scaled_frame
from lvlm.runtime.prompt.prompts import Prompt

MODELS = [name for name, (family, _) in TINY.items() if family.video and tried(name)]
USUAL = list({name.partition(":")[0]: name for name in reversed(MODELS)}.values())
LENGTHS = [(2, 1.0), (5, 10.0), (24, 24.0), (90, 30000 / 1001), (301, 25.0), (1000, 60.0)]


def metadata(source: Video) -> VideoMetadata:
    return VideoMetadata(source.frames, source.fps, source.width, source.height, source.seconds)


def length(frames: int, fps: float) -> Video:
    return Video(frames, fps, frames / fps, 40, 70, lambda _: iter(()))


def video(folder: Path) -> Any:
    """That of the processor of a tiny checkpoint."""
    config = json.loads((folder / "lvlm.json").read_text())["images"]["processor"]
    return load_processor(config).video  # type: ignore[attr-defined]


def prepared(model: Model, source: Video) -> tuple[str, int | None, Prompt]:
    """A prompt's text, the number of frames to ask for so that all are taken, and the prompt."""
    video = model.processor.video  # type: ignore[attr-defined]
    text = f"USER: {video.token}Describe it. ASSISTANT:"
    # Qwen2-VL takes all unless told, and would round a number to pairs.
    frames = None if video.sampled(source, None) == list(range(source.frames)) else source.frames
    options = GenerationOptions(chat_template=False, frames=frames)
    return text, frames, model.prepare(0, text, [], options, [source])


@pytest.mark.parametrize("name", MODELS)
def test_none_equals_transformers_generate(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Frames that fill pairs and that do not, and positions of all tokens, new ones too."""
    theirs = load_torch(checkpoint(name))
    family = TINY[name][0].name
    with lvlm.load(bundle(name, max_images=2)) as model:
        each = model.processor.video.per_image  # type: ignore[attr-defined]
        for source in (noise_video(2 * each - (each > 1), 4.0), noise_video(2 * each, 0.5, 90, 30)):
            text, frames, prompt = prepared(model, source)
            ids = torch.tensor([list(prompt.ids)])
            given = inputs(prompt, family, source)
            if "video_grid_thw" in given:
                asked = {k: v for k, v in given.items() if k != "pixel_values_videos"}
                positions, _ = theirs.model.get_rope_index(ids, **asked)
                np.testing.assert_array_equal(prompt.positions, positions[:, 0])
            out = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **given,
                max_new_tokens=24,
                do_sample=False,
            )
            got = model.generate(
                text, [], [source], max_new_tokens=24, chat_template=False, frames=frames
            )
            assert got.token_ids == out[0, ids.shape[1] :].tolist()
            config = theirs.config
            wanted = config.image_token_id if family == "smolvlm" else config.video_token_id
            assert set(ids[0, prompt.image_id > 0].tolist()) == {wanted}


@pytest.mark.parametrize("name", USUAL if whole() else USUAL[:2])
def test_lightvlm_equals_its_torch_reference(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    with lvlm.load(bundle(name, *LIGHTVLM, max_images=2)) as model:
        reference = make_reference(checkpoint(name), *LIGHTVLM)
        source = noise_video(1 + model.processor.video.per_image)  # type: ignore[attr-defined]
        text, frames, prompt = prepared(model, source)
        answer: Any = reference.generate(
            prompt,
            reference.encode(prompt.images),
            max_new_tokens=16,
            keep=0.3,
            eos_ids=model.manifest.text.eos_ids,
        )
        options: dict[str, Any] = {"max_new_tokens": 16, "keep": 0.3, "chat_template": False}
        got = model.generate(text, [], [source], frames=frames, **options)
        assert got.token_ids == answer.tokens
        assert got.stats.image_tokens_per_layer[-1] < got.stats.image_tokens


def test_a_video_and_an_image(bundle: Callable[..., Path]) -> None:
    """Everything stands where its placeholder is."""
    still = np.full((40, 70, 3), 90, np.uint8)
    for name in USUAL:
        with lvlm.load(bundle(name, max_images=2)) as model:
            video: Any = model.processor.video  # type: ignore[attr-defined]
            source = noise_video(video.per_image)
            options = GenerationOptions(chat_template=False, frames=source.frames)
            [alone] = model.processor.prepare([still])
            for text, place in ((f"{video.token} a <image> b", 1), (f"<image>c {video.token}", 0)):
                prompt = model.prepare(0, text, [still], options, [source])
                digests = [p.digest() for p in prompt.images]
                assert len(digests) == 2
                assert digests.index(alone.digest()) == place
                counts = [int((prompt.image_id == n + 1).sum()) for n in range(2)]
                assert counts == [p.tokens for p in prompt.images]


@pytest.mark.parametrize(("frames", "fps"), LENGTHS)
@pytest.mark.parametrize("wanted", [None, 1, 2, 5, 8, 64])
def test_smolvlm_takes_the_same_frames(
    frames: int, fps: float, wanted: int | None, bundle: Callable[..., Path]
) -> None:
    ours = video(bundle("smolvlm:gqa-tiles", max_images=2))
    source = length(frames, fps)
    theirs = SimpleNamespace(num_frames=6, fps=2)
    indices = SmolVLMVideoProcessor.sample_frames(theirs, metadata(source), num_frames=wanted)
    assert ours.sampled(source, wanted) == indices.tolist()


@pytest.mark.parametrize(("frames", "fps"), LENGTHS)
def test_other_families_take_the_same_frames(
    frames: int, fps: float, bundle: Callable[..., Path]
) -> None:
    source, about = length(frames, fps), metadata(length(frames, fps))
    every = list(range(frames))
    onevision = video(bundle("llava-onevision:llama-mha-clip", max_images=2))
    qwen2 = video(bundle("qwen2-vl:gqa", max_images=2))
    qwen3 = video(bundle("qwen3-vl:gqa", max_images=2))
    assert onevision.sampled(source, None) == qwen2.sampled(source, None) == every
    theirs: Any = SimpleNamespace(num_frames=None, fps=2, min_frames=4, max_frames=768)
    expected = Qwen3VLVideoProcessor.sample_frames(theirs, about)
    assert qwen3.sampled(source, None) == expected.tolist()
    for wanted in {2, 4, 6, 9, frames} & set(range(2, frames + 1)):
        expected = LlavaOnevisionVideoProcessor.sample_frames(
            SimpleNamespace(num_frames=None, fps=None), about, num_frames=wanted
        )
        assert onevision.sampled(source, wanted) == expected.tolist()
        expected = Qwen3VLVideoProcessor.sample_frames(theirs, about, num_frames=wanted)
        assert qwen3.sampled(source, wanted) == expected.tolist()


def test_qwen2_spreads_frames_as_torch_does(bundle: Callable[..., Path]) -> None:
    """Its video processor needs torchvision; the rule is one line of it."""
    qwen2 = video(bundle("qwen2-vl:gqa", max_images=2))
    for total in range(2, 130):
        for wanted in range(2, total + 1, 2):
            expected = torch.arange(0, total, total / wanted).int().tolist()
            assert qwen2.sampled(length(total, 24.0), wanted) == expected
    assert len(qwen2.sampled(length(20, 24.0), 7)) == 8  # pairs


@pytest.mark.parametrize(("frames", "fps"), LENGTHS[:4])
def test_words_equal_transformers(
    frames: int, fps: float, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Video.of(list(np.zeros((frames, 40, 70, 3), np.uint8)), fps)
    about = metadata(source)
    indices = list(range(0, frames, 1 + frames // 5))
    about.frames_indices = list(indices)  # which theirs makes longer

    smolvlm = video(bundle("smolvlm:gqa-tiles", max_images=2))
    monkeypatch.setattr(processing_smolvlm, "num2words", spoken)
    self: Any = SimpleNamespace(
        image_seq_len=1, image_token="<image>", fake_image_token="", global_image_token=""
    )
    given = {"pixel_values": np.empty((1, len(indices))), "video_metadata": [about]}
    said = processing_smolvlm.SmolVLMProcessor.replace_video_token(self, given, 0)
    assert smolvlm.prepare(source, indices).text == said

    qwen3 = video(bundle("qwen3-vl:gqa", max_images=2))
    self = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=1, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<image>",
    )
    self._calculate_timestamps = lambda *a: Qwen3VLProcessor._calculate_timestamps(self, *a)
    pairs = -(-len(indices) // 2)
    given = {"video_grid_thw": torch.tensor([[pairs, 1, 1]]), "video_metadata": [about]}
    said = Qwen3VLProcessor.replace_video_token(self, given, 0)
    assert qwen3.prepare(source, indices).text == said


@pytest.mark.parametrize("name", ["qwen2-gqa-tied-siglip", "llama-mha-clip"])
def test_onevision_has_as_many_tokens(name: str, bundle: Callable[..., Path]) -> None:
    name = f"llava-onevision:{name}"
    config = TINY[name][1].vision_config
    tokens = (config.image_size // config.patch_size) ** 2
    self: Any = SimpleNamespace(num_image_tokens=tokens, video_token="v")
    given = {"pixel_values_videos": [np.empty(5)]}
    said = LlavaOnevisionProcessor.replace_video_token(self, given, 0)
    prepared_video = video(bundle(name, max_images=2)).prepare(noise_video(), range(5))
    assert sum(p.tokens for p in prepared_video.images) == len(said)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        *((0, "zero"), (8, "eight"), (13, "thirteen"), (20, "twenty"), (64, "sixty-four")),
        *((100, "one hundred"), (101, "one hundred and one"), (350, "three hundred and fifty")),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert spoken(number) == words


@pytest.mark.parametrize("old", [(97, 31), (40, 70), (300, 290), (9, 14)])
@pytest.mark.parametrize("new", [(60, 60), (50, 200)])
def test_frames_are_scaled_as_torch_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    """The kernel of transformers' video processors, on noise: two levels of 256 apart at most."""
    noise = np.random.default_rng(0).integers(0, 256, (*old, 3), np.uint8)
    planes = torch.from_numpy(noise).permute(2, 0, 1)[None].contiguous()
    theirs = torch.nn.functional.interpolate(planes, new, mode="bicubic", antialias=True)
    ours = scaled_frame(noise, *new, Image.Resampling.BICUBIC).astype(int)
    apart = np.abs(ours - theirs[0].permute(1, 2, 0).numpy())
    assert apart.max() <= 2
    assert apart.mean() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_pixels_equal_the_video_processors(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Frames that theirs scales by torch's kernels, ours by Pillow: a level of 256 apart."""
    pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")
    family = TINY[name][0].name
    kind = {"smolvlm": "SmolVLM", "llava-onevision": "LlavaOnevision"}
    kind |= dict.fromkeys(("qwen3-vl", "qwen3.5"), "Qwen3VL")
    processors: Any = transformers
    theirs = getattr(processors, f"{kind.get(family, 'Qwen2VL')}VideoProcessor").from_pretrained(
        checkpoint(name)
    )
    ours = video(bundle(name, max_images=2))
    for shape in [(40, 70), (97, 31), (300, 290), (9, 14)]:
        source = noise_video(5, 4.0, *shape)
        found = theirs(
            [np.stack(list(source.read(range(5))))],
            return_tensors="pt",
            do_sample_frames=False,
            video_metadata=[metadata(source)],
        )
        expected = found["pixel_values" if family == "smolvlm" else "pixel_values_videos"].numpy()
        images = ours.prepare(source, range(5)).images
        got = np.concatenate([p.arrays["pixel_values"] for p in images])
        if "video_grid_thw" in found:
            rows, columns = images[0].arrays["position_ids"].max((0, 1)) + 1
            assert found["video_grid_thw"].tolist() == [[3, rows, columns]]
        difference = np.abs(got.ravel() - expected.ravel())
        level = 1.001 / 255 / 0.26  # of the channel that deviates least
        assert difference.max() <= 2 * level
        assert difference.mean() < level / 20

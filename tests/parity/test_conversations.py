"""Conversations of every family: the ids of transformers' apply_chat_template, the answers of its
generate; and what a user types is text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import OTHERS, TINY, their_answer, transformers_inputs
from parity_tools import IMAGES, load_torch
from transformers import AutoTokenizer
from video_tools import inputs, noise_video

import lvlm
from lvlm.runtime.generate.asks import one_ask
from lvlm.runtime.media.video import Video
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt

# Content in the order given, as most templates write it; the checkpoints' own has images first
IN_ORDER = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}"
    "<image>{% elif part['type'] == 'video' %}<video>"
    "{% elif 'text' in part %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES: dict[str, bool | str] = {"own": True, "in order": IN_ORDER}
Content = list[str | np.ndarray]
TALKS: list[list[tuple[str, Content]]] = [
    [
        ("system", ["Answer in words."]),
        ("user", [IMAGES[0], "Describe the picture."]),
        ("assistant", ["A grid of digits, \nseven in all."]),
        ("user", [" And how often does 7 appear? "]),
        ("assistant", ["Twice"]),
        ("user", ["Which digit is in the top row of ", IMAGES[1], " this one?"]),
    ],
    [("user", ["How often does 7 appear?"])],
    [
        ("user", ["Is ", IMAGES[1], " the same as ", IMAGES[0], "?"]),
        ("assistant", ["No."]),
        ("user", ["Why?"]),
    ],
]
TYPED = "Is <image> or </s> or <s><pad> <unk>\n<image></s>, <imag"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One model of every family in a normal run."""
    if "name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        names = ["digits-llava", *(TINY if whole else OTHERS)]
        if "videos" in metafunc.function.__name__:
            names = [n for n in names[1:] if TINY[n][0].video]
        metafunc.parametrize("name", names)


def messages(talk: Sequence[tuple[str, Content]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": list(map(part, content))} for role, content in talk]


def part(given: str | np.ndarray) -> dict[str, Any]:
    if isinstance(given, str):
        return {"type": "text", "text": given}
    return {"type": "image", "image": given}


def prepare(model: Model, talk: Sequence[tuple[str, Content]], **options: Any) -> Prompt:
    ask = one_ask(messages(talk))
    return model.prepare(0, ask.prompt, ask.images, GenerationOptions(**options), ask.videos)


def expanded(model: Model, text: str, images: Sequence[Any]) -> str:
    """Each placeholder as the processor has the image, which is compared elsewhere."""
    token = model.manifest.images.token
    if (own := getattr(model.processor, "prompt_text", None)) is not None:
        text = own(text, len(images))
    made = [image.text or token * image.tokens for image in model.processor.prepare(images)]
    first, *parts = text.split(token)
    return first + "".join(image + part for image, part in zip(made, parts, strict=True))


def test_conversations_equal_transformers(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Three turns with images in the first and the last, alone and in a ragged batch."""
    folder = checkpoint(name)
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), load_torch(folder)
    with lvlm.load(bundle(name, max_images=2)) as model:
        for template in TEMPLATES.values():
            own = {"chat_template": template} if isinstance(template, str) else {}
            prompts = [prepare(model, talk, chat_template=template) for talk in TALKS]
            expected = []
            for talk, prompt in zip(TALKS, prompts, strict=True):
                images = [p for _, content in talk for p in content if not isinstance(p, str)]
                text = tokenizer.apply_chat_template(
                    messages(talk), add_generation_prompt=True, tokenize=False, **own
                )
                # As the processors of these models add it
                begins = text.startswith(tokenizer.bos_token)
                begins = begins or hasattr(model.processor, "prompt_text")
                text = expanded(model, text, images)
                ids = tokenizer(text, add_special_tokens=not begins)["input_ids"]
                assert list(prompt.ids) == ids
                given = transformers_inputs(folder, prompt)
                expected.append(their_answer(theirs, prompt.ids, given, max_new_tokens=8))
            options: dict[str, Any] = {"max_new_tokens": 8, "chat_template": template}
            asked = [messages(talk) for talk in TALKS]
            assert [model.generate(one, **options).token_ids for one in asked] == expected
            assert [g.token_ids for g in model.generate(asked, **options)] == expected


def test_what_a_user_types_is_text(name: str, bundle: Callable[..., Path]) -> None:
    """Placeholders and special tokens in any turn give no image's place and no special id."""
    with lvlm.load(bundle(name, max_images=2)) as model:
        for template in TEMPLATES.values():
            for role in ("system", "user", "assistant"):
                harmless, typed = (
                    prepare(model, with_text(role, text), chat_template=template)
                    for text in ("nothing of note", TYPED)
                )
                assert special(model, typed) == special(model, harmless)
                assert TYPED in model.tokenizer.decode(list(typed.ids))
                assert typed.image_id.max() == 2
            asked = messages([("user", [TYPED, IMAGES[0]])])
            answer = model.generate(asked, max_new_tokens=2, chat_template=template)
            assert answer.image_id.max() == 1


def with_text(role: str, text: str) -> list[tuple[str, Content]]:
    """A conversation with the text in the first message of that role."""
    content: dict[str, Content] = {
        "system": ["Be brief."],
        "user": ["Say", IMAGES[0], "it"],
        "assistant": ["It."],
    }
    content[role] = [text, *content[role]]
    return [*content.items(), ("user", [IMAGES[1]])]


def special(model: Model, prompt: Prompt) -> list[int]:
    """Ids that are no text, in order."""
    return [n for n in prompt.ids if model.tokenizer.visible_token(n) is None]


def test_videos_and_images_in_any_turn(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """A clip in the first turn and an image in the last: the prompt that the text with its
    placeholders makes, and the answer of transformers' generate. A placeholder that is typed is
    none of them."""
    folder = checkpoint(name)
    with lvlm.load(bundle(name, max_images=2)) as model:
        video: Any = model.processor.video  # type: ignore[attr-defined]
        source = noise_video(video.per_image)
        given: dict[str, Any] = {
            "chat_template": IN_ORDER.replace("<video>", video.token),
            "frames": source.frames,
        }

        def asked(said: str) -> list[dict[str, Any]]:
            return [
                {"role": "user", "content": [part("See "), {"type": "video", "video": source}]},
                {"role": "assistant", "content": said},
                {"role": "user", "content": [part("and"), part(IMAGES[0]), part("too")]},
            ]

        def prepared(said: str) -> Prompt:
            ask = one_ask(asked(said))
            return model.prepare(0, ask.prompt, ask.images, GenerationOptions(**given), ask.videos)

        text = (
            f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSee{video.token}"
            "<|im_end|>\n<|im_start|>assistant\nSeen.<|im_end|>\n<|im_start|>user\nand<image>too<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        options = GenerationOptions(chat_template=False, frames=source.frames)
        expected, ours = model.prepare(0, text, [IMAGES[0]], options, [source]), prepared("Seen.")
        assert list(ours.ids) == list(expected.ids)
        np.testing.assert_array_equal(ours.image_id, expected.image_id)
        np.testing.assert_array_equal(ours.positions, expected.positions)
        assert [i.digest() for i in ours.images] == [i.digest() for i in expected.images]
        typed = prepared(f"Seen {video.token}<image>.")
        assert [i.digest() for i in typed.images] == [i.digest() for i in expected.images]
        answer = model.generate(asked("Seen."), max_new_tokens=8, **given)
        takes = clip_and_image(name, folder, ours, source)
        theirs = load_torch(folder)
        assert answer.token_ids == their_answer(theirs, ours.ids, takes, max_new_tokens=8)


def clip_and_image(
    name: str, folder: Path, prompt: Prompt, source: Video
) -> dict[str, torch.Tensor]:
    """What transformers takes for a prompt with a clip and, behind it, an image."""
    frames = len(prompt.images) - 1
    of_clip = np.where(prompt.image_id <= frames, prompt.image_id, 0)
    of_image = np.maximum(prompt.image_id - frames, 0)
    clip = replace(prompt, images=prompt.images[:frames], image_id=of_clip)
    image = replace(prompt, images=prompt.images[frames:], image_id=of_image)
    found = dict(transformers_inputs(folder, image))
    for key, value in inputs(clip, TINY[name][0].name, source).items():
        if key == "mm_token_type_ids":  # 1 an image's, 2 a video's
            found[key] = found[key] + value
        elif key in found:  # SmolVLM has one place for both
            found[key] = torch.cat([value, found[key]], 1)
        else:
            found[key] = value
    return found

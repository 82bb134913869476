"""Prompts: from a question and its images to token ids, image places and prepared images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lvlm.core.errors import BundleError, ParameterError, PromptError
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.media.images import ImageSource, open_image
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.media.video import VideoSource
from lvlm.runtime.options.checkpoint_defaults import filled_in
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import MAX_NEW_TOKENS, GenerationOptions
from lvlm.runtime.options.option_kinds import Option, integer, plain, read_value
from lvlm.runtime.processors import Processor, load_processor
from lvlm.runtime.prompt.chat_template import ChatTemplate
from lvlm.runtime.prompt.prompt_videos import PromptVideos
from lvlm.runtime.prompt.text import Tokenizer, expand_placeholders
from lvlm.runtime.sampling.settings import Sampling


@dataclass(frozen=True)
class Prompt:
    """One row: token ids with every image's placeholder repeated per image token.

    image_id [N] int64: 0 text, m the m-th of the ``images``; positions [N] int64, or [3,N]: the
    model's own, which is not always how prefill gets them (``aligned``).
    ``generation`` is the checkpoint's part in choosing tokens, ``sampling`` the caller's, too;
    ``lead`` is the space before an answer that is no part of it (ChatTemplate). ``forced``: the
    answer, whatever the model would choose, or whatever would end it.
    """

    ids: Sequence[int]
    image_id: np.ndarray
    images: Sequence[PreparedImage]
    positions: np.ndarray
    sampling: Sampling
    max_new_tokens: int
    ignore_eos: bool = False
    logprobs: int | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    lead: str = ""
    forced: tuple[int, ...] | None = None

    @property
    def aligned(self) -> np.ndarray:
        """``positions``, each of the three as a whole moved to where the last token's are one.

        In transformers' generate each of a new token's three positions follows the last token's.
        Those differ where that is an image's, and decode takes one number. Rotary attention knows
        nothing but differences within each of the three, which stay. Behind text nothing moves.
        """
        last = self.positions[..., -1:]
        # The time of a video may be larger than any position that decode has to know.
        goal = min(int(last.max()), len(self.ids) - 1)
        moved: np.ndarray = self.positions + (goal - last)
        return moved

    @property
    def next_position(self) -> int:
        """Position of the first new token, in all of the three that are ``aligned``."""
        return int(self.aligned[..., -1].max()) + 1


class PromptMaker:
    """Prepares prompts as a model wants them, whether it comes from a bundle or a checkpoint.

    ``vocab`` is the number of tokens that the model knows, ``room`` how many images a prompt with
    videos may have, ``generation`` the manifest's part of that name. Any thread may use it. Raises
    BundleError if the processor's config, the chat template or ``generation`` is not valid.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: Images,
        vocab: int,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        room: int | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.images, self.vocab = tokenizer, images, vocab
        self.generation = GenerationConfig.of(generation or {}, tuple(sorted(tokenizer.eos_ids)))
        self.processor: Processor = load_processor(images.processor)
        self.videos = PromptVideos(self.processor, images, room)
        self.template = (
            ChatTemplate(chat_template, special_tokens, images.token) if chat_template else None
        )
        self.video_template = self.template
        if self.videos.processor is not None and (own := self.videos.processor.template):
            self.video_template = ChatTemplate(own, special_tokens, images.token)
        self._special_tokens = dict(special_tokens)
        self._bos = special_tokens.get("bos_token")
        self._given = lru_cache(8)(self._own_template)

    def prepare(
        self,
        row: int,
        prompt: str,
        images: Sequence[ImageSource],
        options: GenerationOptions,
        videos: Sequence[VideoSource] = (),
    ) -> Prompt:
        """One row of a batch: images opened and scaled, the prompt as token ids.

        Raises PromptError, ImageError, ParameterError, BundleError; with videos also CapacityError
        and BackendError.
        """
        for name, one, given in (("images", "image", images), ("videos", "video", videos)):
            if isinstance(given, str | bytes) or not isinstance(given, Sequence):
                raise PromptError(f"{name} is a list; write {name}=[{one}]")
        prepared_videos = self.videos.prepare(videos, len(images), options.frames)
        arrays = [open_image(image, options.max_image_pixels) for image in images]
        text, special, lead = prompt, True, ""
        video_token = self.videos.processor.token if self.videos.processor else None
        if options.chat_template:
            template = self._template(options.chat_template, bool(prepared_videos))
            lead = template.lead
            text = template.render(
                prompt, len(arrays), options.system, len(prepared_videos), video_token
            )
            special = not self.begins(text)
        elif options.system is not None:
            raise ParameterError("system needs the chat template; write it into the prompt")
        elif self.template is not None:
            lead = self.template.lead_after(prompt)
        advice = _advice("video", video_token or "", prompt, options)
        stills = self.processor.prepare(arrays)
        text, prepared_images, token_ids = self.videos.placed(text, stills, prepared_videos, advice)
        ids = self.tokenizer.encode(text, add_special_tokens=special)
        token_id = self.images.token_id
        advice = _advice("image", self.images.token, prompt, options)
        where = expand_placeholders(
            ids, token_id, [self._expansion(p) for p in prepared_images], advice
        )
        if not where or not (prepared_images or prompt.strip()):
            raise PromptError("the prompt is empty; write a question")
        image_id = np.zeros(len(where), np.int64)
        places = np.flatnonzero(np.array(where) == token_id)
        image_id[places] = np.repeat(
            np.arange(1, len(prepared_images) + 1), [p.tokens for p in prepared_images]
        )
        if prepared_videos:
            own = np.array(where)
            own[places] = np.array(token_ids)[image_id[places] - 1]
            where = own.tolist()
        outside = max(where)
        if outside >= self.vocab:
            raise BundleError(f"the tokenizer gives token {outside}, which the model lacks")
        options = filled_in(options, self.generation)
        return Prompt(
            where,
            image_id,
            prepared_images,
            self._positions(image_id, prepared_images),
            Sampling.of(options, row, self.generation),
            options.max_new_tokens or MAX_NEW_TOKENS,
            options.ignore_eos,
            options.logprobs,
            self.generation,
            lead,
        )

    def with_answer(self, prompt: Prompt, tokens: Sequence[int]) -> Prompt:
        """A prompt whose answer is these tokens, each of which is scored. Raises ParameterError."""
        one = integer(0, self.vocab - 1)

        def read(ids: Any) -> tuple[int, ...]:
            if not len(ids):
                raise ValueError
            return tuple(one.read(plain(token)) for token in ids)

        wanted = f"token ids, one or more, each below {self.vocab:,}"
        forced = read_value("answer", Option(wanted, read, "text", None), tokens)
        return replace(
            prompt,
            forced=forced,
            max_new_tokens=len(forced),
            ignore_eos=True,
            sampling=replace(prompt.sampling, stop_token_ids=()),
            logprobs=prompt.logprobs or 0,
        )

    def begins(self, text: str) -> bool:
        """Whether a template has written the token that begins a text: no other is added."""
        return bool(self._bos) and text.startswith(str(self._bos))

    def _template(self, wanted: bool | str, with_videos: bool) -> ChatTemplate:
        if isinstance(wanted, str):
            return self._given(wanted)
        template = self.video_template if with_videos else self.template
        if template is None:
            raise PromptError(
                "the bundle has no chat template; write the prompt out and use "
                "chat_template=False (--no-chat-template)"
            )
        return template

    def _own_template(self, source: str) -> ChatTemplate:
        """One that a caller gives."""
        name = "the chat_template that was given"
        template = ChatTemplate(
            source, self._special_tokens, self.images.token, name, ParameterError
        )
        if not template.writes_questions:
            raise ParameterError(
                f"{name} does not write the question; give the text of a Jinja template, "
                "True for the bundle's own or False for none"
            )
        return template

    def _positions(
        self, image_id: np.ndarray, prepared_images: Sequence[PreparedImage]
    ) -> np.ndarray:
        if self.images.positions == "sequence":
            return np.arange(len(image_id))
        return grid_positions(image_id, prepared_images)

    def _expansion(self, image: PreparedImage) -> list[int]:
        """The tokens that stand for an image."""
        token = self.images.token_id
        if image.text is None:
            return [token] * image.tokens
        ids = self.tokenizer.encode(image.text, add_special_tokens=False)
        if ids.count(token) != image.tokens:
            raise BundleError(
                f"the tokenizer makes {ids.count(token)} image tokens of an image's "
                f"{image.tokens}; export the bundle again"
            )
        return ids


def _advice(what: str, token: str, prompt: str, options: GenerationOptions) -> str:
    """What helps when there are more or fewer placeholders than images or videos."""
    if token in prompt + (options.system or ""):
        article = "an" if what == "image" else "a"
        return (
            f"{token} stands for {article} {what}: give one for each, or write it another way, as "
            f"{token[:1]} {token[1:-1]} {token[-1:]}"
        )
    if options.chat_template:
        return (
            f"the chat template writes them; write the prompt out, with one {token} per {what}, "
            "and use chat_template=False (--no-chat-template)"
        )
    return f"write one {token} per {what} where it belongs, or let the chat template do it"


def grid_positions(image_id: np.ndarray, prepared_images: Sequence[PreparedImage]) -> np.ndarray:
    """Three rotary positions [3,N] of every token: text counts on in all, an image's tokens lie
    where its offsets say. Source: Qwen2-VL (arXiv 2409.12191, section 2.1)."""
    found = np.empty((3, len(image_id)), np.int64)
    here = start = 0
    for number, image in enumerate(prepared_images, 1):
        places = np.flatnonzero(image_id == number)
        assert image.offsets is not None
        text = int(places[0]) - start
        found[:, start : places[0]] = here + np.arange(text)
        here += text
        # One run of tokens; where text lies in it (videos), that text counts on
        found[:, places] = here + image.offsets
        here, start = here + image.span, int(places[-1]) + 1
    found[:, start:] = here + np.arange(len(image_id) - start)
    return found

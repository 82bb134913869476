"""Prompts: from a question and its images to token ids, image places and prepared images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm.core.errors import BundleError, PromptError
from lvlm.runtime.bundle.manifest import Images, Manifest
from lvlm.runtime.media.images import ImageSource, open_image
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.media.video import VideoSource
from lvlm.runtime.options.checkpoint_defaults import filled_in
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import MAX_NEW_TOKENS, GenerationOptions
from lvlm.runtime.options.option_kinds import Option, integer, plain, read_value
from lvlm.runtime.processors import Processor, load_processor
from lvlm.runtime.prompt.messages import Conversation
from lvlm.runtime.prompt.prompt_text import PromptText, PromptWriter
from lvlm.runtime.prompt.prompt_videos import PromptVideos
from lvlm.runtime.prompt.text import Tokenizer, expand_placeholders, expand_text
from lvlm.runtime.prompt.tools.form import ToolForm
from lvlm.runtime.sampling.settings import Sampling
from lvlm.runtime.sampling.structure import Structure
from lvlm.runtime.sampling.structure_compiler import StructureCompiler

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


@dataclass(frozen=True)
class Prompt:
    """One row: token ids with every image's placeholder repeated per image token.

    image_id [N] int64: 0 text, m the m-th of the ``images``; positions [N] int64, or [3,N]: the
    model's own, which is not always how prefill gets them (``aligned``).
    ``generation`` is the checkpoint's part in choosing tokens, ``sampling`` the caller's, too;
    ``lead`` is the space before an answer that is no part of it (ChatTemplate). ``forced``: the
    answer, whatever the model would choose, or whatever would end it. ``whole``: the prompt whose
    positions this one's tokens have, some of whose image tokens are left out (shortened.py).
    ``structure``: what the answer must be; each begins its own place in it.
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
    whole: Prompt | None = None
    structure: Structure | None = None

    @property
    def aligned(self) -> np.ndarray:
        """``positions``, each of the three as a whole moved to where the last token's are one.

        In transformers' generate each of a new token's three positions follows the last token's.
        Those differ where that is an image's, and decode takes one number. Rotary attention knows
        nothing but differences within each of the three, which stay. Behind text nothing moves.
        """
        whole = self.whole or self
        moved: np.ndarray = self.positions + (self.next_position - 1 - whole.positions[..., -1:])
        return moved

    @property
    def next_position(self) -> int:
        """Position of the first new token, in all of the three that are ``aligned``."""
        whole = self.whole or self
        # The time of a video may be larger than any position that decode has to know.
        return min(int(whole.positions[..., -1].max()) + 1, len(whole.ids))


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
        self._writer = PromptWriter(
            tokenizer, images, chat_template, special_tokens, self.videos.processor
        )
        self.template, self.begins = self._writer.template, self._writer.begins
        self.lead = "" if self.template is None else self.template.lead
        self._structures = StructureCompiler(tokenizer.to_json, vocab, tokenizer.eos_ids)

    @classmethod
    def of_bundle(cls, folder: Path, manifest: Manifest, room: int | None = None) -> Self:
        """The one of a bundle, whose tokenizer is read here."""
        return cls(
            Tokenizer(folder / "tokenizer.json", manifest.text.eos_ids),
            manifest.images,
            manifest.text.vocab,
            manifest.chat_template,
            manifest.special_tokens,
            room,
            manifest.generation,
        )

    def tool_form(self, chat_template: bool | str = True) -> ToolForm | None:
        """Form in which a chat template, as the option says which, writes calls of tools; None if
        it has no place for tools, or that form is not read here. Raises ParameterError."""
        template = self._writer.given(chat_template)
        return None if template is None else template.tool_form

    def prepare(
        self,
        row: int,
        prompt: str | Conversation,
        images: Sequence[ImageSource],
        options: GenerationOptions,
        videos: Sequence[VideoSource] = (),
    ) -> Prompt:
        """One row of a batch: images opened and scaled, the prompt as token ids. Those of a
        conversation are its own ``images`` and ``videos``, in order.

        Raises PromptError, ImageError, ParameterError, BundleError; with videos also CapacityError
        and BackendError.
        """
        for name, one, given in (("images", "image", images), ("videos", "video", videos)):
            if isinstance(given, str | bytes) or not isinstance(given, Sequence):
                raise PromptError(f"{name} is a list; write {name}=[{one}]")
        prepared_videos = self.videos.prepare(videos, len(images), options.frames)
        arrays = [open_image(image, options.max_image_pixels) for image in images]
        written = self._writer.write(prompt, len(arrays), len(prepared_videos), options)
        if (own := getattr(self.processor, "prompt_text", None)) is not None:
            text = own(written.text, len(arrays))
            written = replace(written, text=text, begun=True, lead="")
        stills = self.processor.prepare(arrays)
        advice = self._writer.advice("video", prompt, options)
        text, prepared_images, token_ids = self.videos.placed(
            written.text, stills, prepared_videos, advice
        )
        token_id = self.images.token_id
        advice = self._writer.advice("image", prompt, options)
        where = self._expanded(replace(written, text=text), prepared_images, advice)
        blank = prompt.blank if isinstance(prompt, Conversation) else not prompt.strip()
        if not where or (blank and not prepared_images):
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
            written.lead,
            structure=self.structure(options, written.lead),
        )

    def structure(self, options: GenerationOptions, lead: str) -> Structure | None:
        """The structure that an answer must have, where one is asked for; ``lead``, mostly that of
        the template, may come before it.

        Raises ParameterError for one that is not valid, or asks for too much work, BackendError
        where llguidance is not installed.
        """
        asked = options.structure
        return None if asked is None else self._structures.compiled(asked, lead)

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
            structure=None,
        )

    def _positions(
        self, image_id: np.ndarray, prepared_images: Sequence[PreparedImage]
    ) -> np.ndarray:
        if self.images.positions == "sequence":
            return np.arange(len(image_id))
        return grid_positions(image_id, prepared_images)

    def _expanded(
        self, written: PromptText, images: Sequence[PreparedImage], advice: str
    ) -> list[int]:
        """Token ids of a prompt with every image's placeholder as the image's tokens."""
        if not self.images.as_text:
            expansions = [self._expansion(image) for image in images]
            ids = self._writer.ids(written)
            return expand_placeholders(ids, self.images.token_id, expansions, advice)
        texts = [image.text or "" for image in images]
        text = expand_text(written.text, self.images.token, texts, advice)
        ids = self._writer.ids(replace(written, text=text))
        tokens = sum(image.tokens for image in images)
        if (found := ids.count(self.images.token_id)) != tokens:
            raise PromptError(
                f"the prompt has {found} image tokens, its images have {tokens}; write "
                f"{self.images.token} for each image, and none of the tokens it stands for"
            )
        return ids

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

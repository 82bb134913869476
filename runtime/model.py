"""A loaded bundle: prompts and images in, text out.

The engine's loop (engine/batch.py), driven in the caller's thread: the prompts of a call are read
together and end together.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, overload

from lvlm.core.errors import BackendError, ParameterError
from lvlm.core.integrity import Verify
from lvlm.runtime.backends import open_backend, thread_count
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import bundle_path, read_bundle
from lvlm.runtime.engine.calls import Answer, Calls
from lvlm.runtime.generate.answers import Generation, Stream, with_others
from lvlm.runtime.generate.asks import Ask, Images, Question, Questions, Videos, one_ask, read_asks
from lvlm.runtime.generate.call_plan import check_one_answer, read_options
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.generate.token_count import TokenCount, TokenCounting, count_asks
from lvlm.runtime.media.images import ImageSource
from lvlm.runtime.media.video import VideoSource
from lvlm.runtime.options.generation_options import GenerationOptions, OptionValues
from lvlm.runtime.prompt.messages import Conversation
from lvlm.runtime.prompt.prompts import Prompt, PromptMaker
from lvlm.runtime.prompt.text import TextStream

if TYPE_CHECKING:
    from typing import Self, Unpack  # of Python 3.11


class Model(TokenCounting):
    """A bundle on a device. One call at a time: a second, concurrent one is refused.

    Use as a context manager, or call ``close``.

    Args:
        bundle: the folder that lvlm-export made.
        device: name of a backend, as lvlm-doctor lists them.
        threads: of the backend, up to as many as there are CPUs. None: the backend's choice.
        verify: how files are compared with their hashes: "sample", "full" or "none"
            (docs/bundles.md).

    Raises:
        ParameterError: a value cannot be used; there is no such device.
        BundleError: the folder is no bundle, or one that is incomplete, changed, or of a version
            that is not read.
        BackendError: the device's packages are missing, or it cannot run the graphs.
        DeviceMemoryError: the device has no room for the weights.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        device: str = "cpu",
        threads: int | None = None,
        verify: Verify = "sample",
    ) -> None:
        folder = bundle_path(bundle)
        threads = thread_count(threads)
        self.folder, self.device = folder, device
        self.manifest: Manifest = read_bundle(folder, verify)
        manifest = self.manifest
        self._prompts = PromptMaker.of_bundle(folder, manifest, manifest.capacity.max_images)
        self.tokenizer, self.processor = self._prompts.tokenizer, self._prompts.processor
        self._calls: Calls | None = Calls(
            Graphs(folder, manifest, open_backend(device, threads=threads), on_demand=["extend"])
        )

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Questions,
        images: Sequence[Images | None] | None = (),
        videos: Sequence[Videos | None] | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> list[Generation]: ...

    def generate(self, prompt, images=(), videos=(), options=None, **given):  # type: ignore[no-untyped-def]
        """Answer one prompt, or a list of prompts together.

        Args:
            prompt: a question's text, or messages, ``[{"role": "user", "content": …}, …]``, which
                have their images and videos in them (docs/prompts.md); or a list of such.
            images: of a text: paths, ``data:`` URLs, bytes, files opened in binary mode, PIL images
                or uint8 arrays [H,W,3], RGB, or [H,W]; of a list of prompts a list for each.
            videos: likewise, paths, bytes or Videos (docs/families.md), whose frames count as
                images.
            options: the options. None: the defaults.
            given: options by name, which come before ``options``.

        Returns:
            Generation, or a list of them in the order of the prompts.

        Raises:
            ParameterError: there is no such option, or its value cannot be used.
            PromptError: a prompt is empty, or does not fit its images or its template.
            ImageError: an image or video cannot be opened, or is too large.
            CapacityError: a prompt is too long, or has too many images, for the bundle.
            BundleError: the tokenizer does not fit the model.
            BackendError: the model is busy, closed, or from before a fork; PyAV or llguidance is
                missing; a graph failed, or its logits are not finite.
            DeviceMemoryError: the device has no room for the cache.
        """
        parsed = self._options(options, given)
        asks, many = read_asks(prompt, images, videos)
        answers = self._answers(asks, parsed) if asks else []
        return answers if many else answers[0]

    @overload
    def score(  # type: ignore[overload-overlap]
        self,
        prompt: Question,
        answer: Sequence[int],
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> Generation: ...

    @overload
    def score(
        self,
        prompt: Questions,
        answer: Sequence[Sequence[int]],
        images: Sequence[Images | None] | None = (),
        videos: Sequence[Videos | None] | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> list[Generation]: ...

    def score(self, prompt, answer, images=(), videos=(), options=None, **given):  # type: ignore[no-untyped-def]
        """Score an answer: its tokens are fed one by one, as if the model had chosen them,
        so that merging and compression act as they do in ``generate``.

        Args:
            prompt, images, videos: as of generate.
            answer: token ids (``tokenizer.encode``), or a list of such lists for a list of prompts.
            options, given: as of generate; what chooses or ends an answer has no part in it.

        Returns:
            What generate returns, with an entry in ``scores`` for each of the tokens: the natural
            logarithm of its probability after all before it, and of the ``logprobs`` likeliest.

        Raises:
            LvlmError: what generate raises.
            ParameterError: there are not as many answers as prompts, or one is no list of tokens.
            CapacityError: there is no room for all of an answer.
        """
        parsed = replace(self._options(options, given), stop=(), n=1)
        asks, many = read_asks(prompt, images, videos)
        forced = answer if many else [answer]
        if len(forced) != len(asks):
            raise ParameterError(f"{len(asks)} prompts but {len(forced)} answers; give one each")
        answers = self._answers(asks, parsed, forced) if asks else []
        return answers if many else answers[0]

    def stream(
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> Stream:
        """Answer one prompt, giving text as soon as it is final.

        Nothing is computed before the first piece is asked for.

        Args:
            prompt, images, videos, options, given: as of generate.

        Returns:
            Stream of the pieces of text. Reading it raises what generate raises.

        Raises:
            ParameterError: as of generate; ``n`` is above 1.
            PromptError: the prompt is neither a text nor messages.
        """
        parsed = self._options(options, given)
        check_one_answer(parsed)
        ask, answer = one_ask(prompt, images, videos), Answer()

        def pieces() -> Generator[str | Generation]:
            read = 0
            with closing(self._run([ask], parsed, [[answer]])) as steps:
                for _ in steps:
                    yield from answer.pieces[read:]
                    read = len(answer.pieces)
            if answer.result is not None:
                yield answer.result

        return Stream(pieces(), lambda: answer.times)

    def _counts(
        self, asks: Sequence[Ask], options: GenerationOptions | None, given: Mapping[str, object]
    ) -> list[TokenCount]:
        manifest, parsed = self.manifest, self._options(options, given)
        return count_asks(manifest, self._prompts, manifest.capacity, asks, parsed)

    def close(self) -> None:
        """Free graphs, weights and cache; later calls are refused."""
        self._calls = None

    def __repr__(self) -> str:
        what = f"{self.manifest.family}, {self.manifest.dtype}, recipe {self.manifest.recipe}"
        closed = ", closed" if self._calls is None else ""
        return f"<lvlm.Model {self.folder} on {self.device}: {what}{closed}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _options(
        self, options: GenerationOptions | None, given: Mapping[str, object]
    ) -> GenerationOptions:
        parsed = read_options(self.manifest, options, given)
        self.tokenizer.stop_ids(parsed.stop)
        self._prompts.structure(parsed, self._prompts.lead)
        return parsed

    def _answers(
        self,
        asks: Sequence[Ask],
        options: GenerationOptions,
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[Generation]:
        answers = [[Answer() for _ in range(options.n)] for _ in asks]
        for _ in self._run(asks, options, answers, forced):
            pass
        return [with_others([one.result for one in each if one.result]) for each in answers]

    def _run(
        self,
        asks: Sequence[Ask],
        options: GenerationOptions,
        answers: Sequence[Sequence[Answer]],
        forced: Sequence[Sequence[int]] | None = None,
    ) -> Generator[None]:
        """To the end of all ``answers``; it pauses after every token."""
        calls = self.calls
        with calls.alone():
            prompts = [
                self.prepare(row, ask.prompt, ask.images, options, ask.videos)
                for row, ask in enumerate(asks)
            ]
            if forced is not None:
                prompts = list(map(self._prompts.with_answer, prompts, forced))
            asked = [
                [(one, TextStream(self.tokenizer, options.stop, prompt.lead)) for one in each]
                for prompt, each in zip(prompts, answers, strict=True)
            ]
            with calls.run(prompts, options.keep, options.kv_keep, asked) as batch:
                batch.choose(range(len(batch.running)))
                yield
                while batch.running:
                    batch.step()
                    yield

    @property
    def calls(self) -> Calls:
        """Calls step by step, for whoever compares logits (docs/engine.md). Raises BackendError
        once the model is closed."""
        if self._calls is None:
            raise BackendError("this model is closed; load the bundle again")
        return self._calls

    @property
    def graphs(self) -> Graphs:
        """Graphs of the bundle, as they are loaded. Raises as ``calls``."""
        return self.calls.graphs

    def prepare(
        self,
        row: int,
        prompt: str | Conversation,
        images: Sequence[ImageSource],
        options: GenerationOptions,
        videos: Sequence[VideoSource] = (),
    ) -> Prompt:
        """Prepare a prompt for ``calls``: images opened and scaled, the text as token ids.

        Args:
            row: its number in the batch, from 0 on, which seeds are counted by.
            prompt, images, videos: as of generate.
            options: the options.

        Returns:
            Prompt with token ids [N], image_id int64 [N] and positions int64 [N] or [3,N].

        Raises:
            LvlmError: what generate raises of a prompt before it is run.
        """
        return self._prompts.prepare(row, prompt, images, options, videos)


def load(
    bundle: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    verify: Verify = "sample",
) -> Model:
    """Load a bundle.

    Args:
        bundle, device, threads, verify: as of Model.

    Returns:
        Model, open.

    Raises:
        LvlmError: what Model raises.
    """
    return Model(bundle, device=device, threads=threads, verify=verify)

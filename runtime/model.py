"""A loaded bundle: prompts and images in, text out.

The engine's loop (engine/batch.py), driven in the caller's thread: the prompts of a call are read
together and end together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, overload

from lvlm.core.errors import BackendError, ParameterError
from lvlm.core.forks import Home
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
from lvlm.runtime.prompt.text import TextStream, Tokenizer

if TYPE_CHECKING:
    from typing import Self, Unpack  # of Python 3.11


class Model(TokenCounting):
    """A bundle on a device. One call at a time: a second, concurrent one is refused.

    Use as a context manager, or call ``close``; it frees graphs, weights and cache.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        device: str = "cpu",
        threads: int | None = None,
        verify: Verify = "sample",
    ) -> None:
        """``threads``: None lets the backend choose. ``verify``: how files are
        compared with their hashes (sample, full or none; docs/bundles.md).

        Raises BundleError, BackendError, ParameterError.
        """
        folder = bundle_path(bundle)
        threads = thread_count(threads)
        self.folder, self.device = folder, device
        self._home = Home("model")
        self.manifest: Manifest = read_bundle(folder, verify)
        manifest = self.manifest
        self.tokenizer = Tokenizer(folder / "tokenizer.json", manifest.text.eos_ids)
        self._prompts = PromptMaker(
            self.tokenizer,
            manifest.images,
            manifest.text.vocab,
            manifest.chat_template,
            manifest.special_tokens,
            manifest.capacity.max_images,
            manifest.generation,
        )
        self.processor = self._prompts.processor
        self._calls: Calls | None = Calls(
            Graphs(folder, manifest, open_backend(device, threads=threads), on_demand=["extend"])
        )
        self._busy = threading.Lock()

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
        """Answer one prompt, or a list of prompts (then ``images`` and ``videos`` are lists of
        lists) in order.

        Args:
            prompt: a question's text, or messages, ``[{"role": "user", "content": …}, …]``, which
                have their images and videos in them (docs/prompts.md); or a list of such.
            images: paths, bytes, PIL images or uint8 arrays [H,W,3].
            videos: paths, bytes or Videos (docs/families.md), whose frames count as images.
            options: GenerationOptions; what is ``given`` by name comes before it.

        Raises ParameterError, PromptError, ImageError, CapacityError, BackendError.
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
            answer: token ids (``tokenizer.encode``), or a list of such lists for a list of prompts.
            options: as for generate; what chooses or ends an answer has no part in it.

        Returns:
            What generate returns, with an entry in ``scores`` for each of the tokens: the natural
            logarithm of its probability after all before it, and of the ``logprobs`` likeliest.

        Raises what generate raises; CapacityError where there is no room for all of an answer.
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
        """Like ``generate`` for one prompt, yielding text as soon as it is final.

        Nothing is computed before the first piece is asked for, but mistakes in the options are
        raised here.
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
        with self._exclusive() as calls:
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

    @contextmanager
    def _exclusive(self) -> Iterator[Calls]:
        self._home.check()
        calls = self.calls
        if not self._busy.acquire(blocking=False):
            raise BackendError(
                "this model is answering another call; finish or close that stream, or load a "
                "second model"
            )
        try:
            yield calls
        finally:
            self._busy.release()

    @property
    def calls(self) -> Calls:
        if self._calls is None:
            raise BackendError("this model is closed; load the bundle again")
        return self._calls

    @property
    def graphs(self) -> Graphs:
        return self.calls.graphs

    def prepare(
        self,
        row: int,
        prompt: str | Conversation,
        images: Sequence[ImageSource],
        options: GenerationOptions,
        videos: Sequence[VideoSource] = (),
    ) -> Prompt:
        """One row of a batch: images opened and scaled, the prompt as token ids."""
        return self._prompts.prepare(row, prompt, images, options, videos)


def load(
    bundle: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    verify: Verify = "sample",
) -> Model:
    """Load a bundle made by lvlm-export; see Model."""
    return Model(bundle, device=device, threads=threads, verify=verify)

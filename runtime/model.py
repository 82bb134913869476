"""A loaded bundle: prompts and pictures in, text out."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Self, Unpack, overload

from lvlm.core.errors import BackendError
from lvlm.core.forks import Home
from lvlm.core.integrity import Verify
from lvlm.runtime.backends import open_backend, thread_count
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import bundle_path, read_bundle
from lvlm.runtime.generate.answers import Generation, Stats, Stream
from lvlm.runtime.generate.asks import Ask, Images, Videos, many_asks, one_ask
from lvlm.runtime.generate.batch import Batch, Batches
from lvlm.runtime.generate.call_plan import read_options
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.media.images import ImageSource
from lvlm.runtime.media.video import VideoSource
from lvlm.runtime.options.generation_options import GenerationOptions, OptionValues
from lvlm.runtime.prompt.prompts import Prompt, PromptMaker
from lvlm.runtime.prompt.text import TextStream, Tokenizer


class Model:
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
        self._batches: Batches | None = Batches(
            Graphs(folder, manifest, open_backend(device, threads=threads))
        )
        self._busy = threading.Lock()

    @overload
    def generate(
        self,
        prompt: str,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        images: Sequence[Images | None] | None = (),
        videos: Sequence[Videos | None] | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> list[Generation]: ...

    def generate(self, prompt, images=(), videos=(), options=None, **given):  # type: ignore[no-untyped-def]
        """Answer one prompt, or a list of prompts (then ``images`` and ``videos`` are lists of
        lists) in order.

        Args:
            images: paths, bytes, PIL images or uint8 arrays [H,W,3].
            videos: paths, bytes or Clips (docs/families.md), whose frames count as images.
            options: GenerationOptions; what is ``given`` by name comes before it.

        Raises ParameterError, PromptError, ImageError, CapacityError, BackendError.
        """
        parsed = self._options(options, given)
        if isinstance(prompt, str):
            return self._answers([one_ask(prompt, images, videos)], parsed)[0]
        asks = many_asks(prompt, images, videos)
        return self._answers(asks, parsed) if asks else []

    def stream(
        self,
        prompt: str,
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
        ask = one_ask(prompt, images, videos)

        def pieces() -> Generator[str | Generation]:
            with closing(self._run([ask], parsed)) as events:
                for event in events:
                    yield event[0] if isinstance(event, list) else event[1]

        return Stream(pieces())

    def close(self) -> None:
        self._batches = None

    def __repr__(self) -> str:
        what = f"{self.manifest.family}, {self.manifest.dtype}, recipe {self.manifest.recipe}"
        closed = ", closed" if self._batches is None else ""
        return f"<lvlm.Model {self.folder} on {self.device}: {what}{closed}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _options(
        self, options: GenerationOptions | None, given: Mapping[str, object]
    ) -> GenerationOptions:
        parsed = read_options(self.manifest, options, given)
        self.tokenizer.stop_ids(parsed.stop)
        return parsed

    def _answers(self, asks: Sequence[Ask], options: GenerationOptions) -> list[Generation]:
        results: list[Generation] = []
        for event in self._run(asks, options):
            if isinstance(event, list):
                results = event
        return results

    def _run(
        self, asks: Sequence[Ask], options: GenerationOptions
    ) -> Generator[tuple[int, str] | list[Generation]]:
        """(row, piece of text) as they come; at the end the list of generations."""
        with self._exclusive() as batches:
            rows = [
                self.prepare(row, ask.prompt, ask.images, options, ask.videos)
                for row, ask in enumerate(asks)
            ]
            streams = [TextStream(self.tokenizer, options.stop, row.lead) for row in rows]
            texts = ["" for _ in rows]
            with batches.run(rows, options.keep, options.kv_keep) as batch:
                while batch.active:
                    for index, token in batch.step():
                        row, stream = batch.rows[index], streams[index]
                        piece = stream.push(token, last=row.finish_reason is not None)
                        if stream.stopped is not None:
                            row.stop(stream.stopped)
                        texts[index] += piece
                        yield index, piece
            yield [self._generation(batch, index, text) for index, text in enumerate(texts)]

    @contextmanager
    def _exclusive(self) -> Iterator[Batches]:
        self._home.check()
        batches = self.batches
        if not self._busy.acquire(blocking=False):
            raise BackendError(
                "this model is answering another call; finish or close that stream, or load a "
                "second model"
            )
        try:
            yield batches
        finally:
            self._busy.release()

    @property
    def batches(self) -> Batches:
        if self._batches is None:
            raise BackendError("this model is closed; load the bundle again")
        return self._batches

    @property
    def graphs(self) -> Graphs:
        return self.batches.graphs

    def prepare(
        self,
        row: int,
        prompt: str,
        images: Sequence[ImageSource],
        options: GenerationOptions,
        videos: Sequence[VideoSource] = (),
    ) -> Prompt:
        """One row of a batch: pictures opened and scaled, the prompt as token ids."""
        return self._prompts.prepare(row, prompt, images, options, videos)

    def _generation(self, batch: Batch, index: int, text: str) -> Generation:
        row = batch.rows[index]
        stats = Stats(
            **batch.counts.of_row(index),
            new_tokens=len(row.tokens),
            vision_ms=batch.timings.vision_ms,
            prefill_ms=batch.timings.prefill_ms,
            decode_ms=batch.timings.decode_ms,
            decode_steps=batch.timings.decode_steps,
            cache_bytes_allocated=batch.cache.bytes_allocated,
            cache_bytes_used=batch.cache.bytes_used(index),
        )
        assert row.finish_reason is not None
        maps = [m[index] for m in batch.merge_maps]
        return Generation(
            text,
            row.tokens,
            row.finish_reason,
            stats,
            row.prompt.image_id,
            maps,
            row.cut_short,
            row.scores,
            row.stop_reason,
        )


def load(
    bundle: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    verify: Verify = "sample",
) -> Model:
    """Load a bundle made by lvlm-export; see Model."""
    return Model(bundle, device=device, threads=threads, verify=verify)

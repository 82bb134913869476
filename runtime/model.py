"""A loaded bundle: prompts and pictures in, text out."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, overload

from lvlm.runtime.answers import Generation, Options, Stats, Stream
from lvlm.runtime.backends import open_backend
from lvlm.runtime.batch import Batch, Batches
from lvlm.runtime.bundle import Manifest, read_bundle
from lvlm.runtime.counts import read_options
from lvlm.runtime.errors import BackendError, ParameterError, PromptError
from lvlm.runtime.graphs import Graphs
from lvlm.runtime.images import ImageSource
from lvlm.runtime.prompts import Prompt, PromptMaker
from lvlm.runtime.text import TextStream, Tokenizer
from lvlm.runtime.video import VideoSource


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
        verify: bool = True,
    ) -> None:
        """``threads``: None lets the backend choose. ``verify`` False skips the file hashes.

        Raises BundleError, BackendError, ParameterError.
        """
        folder = Path(bundle)
        if threads is not None and threads < 1:
            raise ParameterError(f"threads is {threads}; give 1 or more")
        self.manifest: Manifest = read_bundle(folder, verify=verify)
        manifest = self.manifest
        self.tokenizer = Tokenizer(folder / "tokenizer.json", manifest.text.eos_ids)
        self._prompts = PromptMaker(
            self.tokenizer,
            manifest.images,
            manifest.text.vocab,
            manifest.chat_template,
            manifest.special_tokens,
            manifest.capacity.max_images,
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
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: object,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        images: Sequence[Sequence[ImageSource]] = (),
        videos: Sequence[Sequence[VideoSource]] = (),
        **options: object,
    ) -> list[Generation]: ...

    def generate(self, prompt, images=(), videos=(), **options):  # type: ignore[no-untyped-def]
        """Answer one prompt, or a list of prompts (then ``images`` and ``videos`` are lists of
        lists) in order.

        Images are paths, bytes, PIL images or uint8 arrays [H,W,3]; videos paths, bytes or Clips
        (docs/families.md), whose frames count as images. Options: frames (of each video; None: as
        many as the model's own processor takes), max_new_tokens (256),
        temperature (0: greedy), top_k, top_p, repetition_penalty, seed, stop (strings that end the
        answer), ignore_eos (go on to max_new_tokens), logprobs (how many of the likeliest tokens to
        tell of at every step; 0: the chosen one only), keep (fraction of image tokens, or one per
        reduction), kv_keep (fraction of the cache entries), chat_template (False: the prompt as it
        stands, with its own image placeholders), system.

        Raises ParameterError, PromptError, ImageError, CapacityError, BackendError.
        """
        parsed = read_options(self.manifest, options)
        single = isinstance(prompt, str)
        prompts = [prompt] if single else list(prompt)
        pictures = [images] if single else list(images) or [()] * len(prompts)
        clips = [videos] if single else list(videos) or [()] * len(prompts)
        for what, lists in (("images", pictures), ("videos", clips)):
            if len(lists) != len(prompts):
                raise PromptError(
                    f"{len(prompts)} prompts but {len(lists)} lists of {what}; give one list each"
                )
        if not prompts:
            return []
        results: list[Generation] = []
        for event in self._run(prompts, pictures, clips, parsed):
            if isinstance(event, list):
                results = event
        return results[0] if single else results

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: object,
    ) -> Stream:
        """Like ``generate`` for one prompt, yielding text as soon as it is final.

        Nothing is computed before the first piece is asked for, but mistakes in the options are
        raised here.
        """
        parsed = read_options(self.manifest, options)

        def pieces() -> Generator[str | Generation]:
            with closing(self._run([prompt], [images], [videos], parsed)) as events:
                for event in events:
                    yield event[0] if isinstance(event, list) else event[1]

        return Stream(pieces())

    def close(self) -> None:
        self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Sequence[ImageSource]],
        clips: Sequence[Sequence[VideoSource]],
        options: Options,
    ) -> Generator[tuple[int, str] | list[Generation]]:
        """(row, piece of text) as they come; at the end the list of generations."""
        with self._exclusive() as batches:
            rows = [
                self.prepare(row, prompt, images, options, videos)
                for row, (prompt, images, videos) in enumerate(
                    zip(prompts, pictures, clips, strict=True)
                )
            ]
            batch = batches.start(rows, options.keep, options.kv_keep)
            streams = [TextStream(self.tokenizer, options.stop) for _ in rows]
            texts = ["" for _ in rows]
            while batch.active:
                for index, token in batch.step():
                    row, stream = batch.rows[index], streams[index]
                    piece = stream.push(token, last=row.finish_reason is not None)
                    if stream.stopped:
                        row.finish_reason = "stop"
                    texts[index] += piece
                    yield index, piece
            yield [self._generation(batch, index, text) for index, text in enumerate(texts)]

    @contextmanager
    def _exclusive(self) -> Iterator[Batches]:
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
        options: Options,
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
        )


def load(
    bundle: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    verify: bool = True,
) -> Model:
    """Load a bundle made by lvlm-export; see Model."""
    return Model(bundle, device=device, threads=threads, verify=verify)

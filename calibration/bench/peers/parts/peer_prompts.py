"""Inputs of peers that take token ids and pixels: made as the bundle makes them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from lvlm.bench.workload import RoundWorkload, WorkloadPrompts, WorkloadRequest, prompt_maker
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt


class Prompts:
    """``bundle`` is the folder whose tokenizer, template and processor are used."""

    def __init__(self, bundle: Path) -> None:
        manifest = read_bundle(bundle)
        self.maker = prompt_maker(bundle, manifest)
        self.writer = WorkloadPrompts(self.maker, manifest.special_tokens.get("bos_token"))
        self._images: dict[WorkloadRequest, list[np.ndarray]] = {}

    def opened(self, work: RoundWorkload) -> RoundWorkload:
        """The same work, its images made: that is not the contenders' task, nor timed."""
        self._images = {request: request.open() for request in work.requests}
        return work

    def images(self, request: WorkloadRequest) -> list[np.ndarray]:
        """uint8 [H,W,3] each, of the work that was last opened."""
        return self._images[request]

    @cached_property
    def _options(self) -> GenerationOptions:
        return GenerationOptions(chat_template=self.maker.template is not None)

    def prepare(self, request: WorkloadRequest) -> Prompt:
        return self.maker.prepare(0, request.prompt, self.images(request), self._options)

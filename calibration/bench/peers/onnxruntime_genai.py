"""Peer: ONNX Runtime GenAI on the CPU, from its own model builder.

It runs no LLaVA, so it gets the language model alone and as many plain tokens as the prompt has in
all, images' included: no vision tower, no image to prepare. One request at a time. ``int4``
quantizes the weights as the builder does by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.bench.case_figures import RequestRecord
from lvlm.bench.contenders import Conversion, Serving, Setup
from lvlm.bench.drive import one_after_another
from lvlm.bench.peers.parts.peer_prompts import Prompts
from lvlm.bench.workload import RoundWorkload, WorkloadRequest
from lvlm.core.installing import install

ADVICE = (
    f"{install('bench', 'export')} there, or name another environment's interpreter with "
    "--converter-python onnxruntime-genai=PYTHON"
)


class ONNXRuntimeGenAI:
    name = "onnxruntime-genai"
    modules = ("onnxruntime_genai", "torch", "transformers")
    settings = ("int4",)
    note = "text only"

    def conversion(self, settings: Sequence[str]) -> Conversion | None:
        precision = "int4" if "int4" in settings else "fp32"
        split = "lvlm.bench.peers.parts.save_language_model"
        builder = (
            *("{python}", "-m", "onnxruntime_genai.models.builder", "-i", "{work}/text"),
            *("-o", "{out}", "-p", precision, "-e", "cpu", "-c", "{work}/cache"),
        )
        return Conversion(
            f"onnxruntime-genai-{precision}",
            ("onnxruntime_genai", "onnx_ir", "torch", "transformers"),
            ADVICE,
            (("{here}", "-m", split, "{checkpoint}", "{work}/text"), builder),
        )

    def open(self, setup: Setup) -> Serving:
        return GenaiAnswers(setup)


class GenaiAnswers:
    def __init__(self, setup: Setup) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(setup.source)
        options = {"intra_op_num_threads": setup.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = genai.Model(config)
        self._prompts = Prompts(Path(setup.prompts))

    def serve(self, work: RoundWorkload) -> list[RequestRecord]:
        return one_after_another(self._answer, self._prompts.opened(work))

    def _answer(self, request: WorkloadRequest, mark: Callable[[], None]) -> tuple[int, int | None]:
        import onnxruntime_genai as genai

        ids = self._plain_ids(request)
        total = len(ids) + request.new_tokens
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=total, min_length=total, do_sample=False)
        generator = genai.Generator(self._model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            mark()
        return len(ids), None

    def _plain_ids(self, request: WorkloadRequest) -> np.ndarray:
        """int32 [N], text throughout: the prompt's own again and again in the image's place."""
        prompt = self._prompts.prepare(request)
        ids, image_id = np.array(prompt.ids, np.int32), prompt.image_id
        text = ids[image_id == 0]
        ids[image_id > 0] = np.resize(text, int((image_id > 0).sum()))
        return ids

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self._model


PEER = ONNXRuntimeGenAI()

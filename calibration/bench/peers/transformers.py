"""Peer: transformers in fp32, eager ``generate`` with its own cache, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lvlm.bench.case_figures import RequestRecord
from lvlm.bench.contenders import Conversion, Serving, Setup
from lvlm.bench.drive import one_after_another
from lvlm.bench.peers.parts.peer_prompts import Prompts
from lvlm.bench.workload import RoundWorkload, WorkloadRequest


class Transformers:
    name = "transformers"
    modules = ("torch", "transformers")
    settings = ()
    note = ""

    def conversion(self, settings: Sequence[str]) -> Conversion | None:  # noqa: ARG002
        return None

    def open(self, setup: Setup) -> Serving:
        return TransformersAnswers(setup)


class TransformersAnswers:
    """The bundle's tokenizer and processor make the inputs: a checkpoint may lack a processor's
    files, and token ids are equal this way."""

    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from lvlm.export.checkpoint.checkpoint import find_family

        torch.set_num_threads(setup.threads)
        self._model = AutoModelForImageTextToText.from_pretrained(
            setup.source, dtype=torch.float32
        ).eval()
        self._family = find_family(self._model.config.to_dict(), str(setup.source))
        self._model.generation_config.eos_token_id = None  # answers go on to their full length
        self._prompts = Prompts(Path(setup.prompts))

    def serve(self, work: RoundWorkload) -> list[RequestRecord]:
        return one_after_another(self._answer, self._prompts.opened(work))

    def _answer(self, request: WorkloadRequest, mark: Callable[[], None]) -> tuple[int, int | None]:
        import torch

        prompt = self._prompts.prepare(request)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(prompt.ids)])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs |= self._family.transformers_inputs(prompt)
        out = self._model.generate(
            **inputs,
            max_new_tokens=request.new_tokens,
            do_sample=False,
            streamer=Marking(mark),
            return_dict_in_generate=True,
        )
        tensors = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
        return len(prompt.ids), sum(x.numel() * x.element_size() for x in tensors)

    def facts(self) -> dict[str, Any]:
        return {"dtype": "float32", "attention": self._model.config._attn_implementation}

    def close(self) -> None:
        del self._model


class Marking:
    """A streamer: ``put`` gets the prompt first, then each token."""

    def __init__(self, mark: Callable[[], None]) -> None:
        self._mark, self._seen_prompt = mark, False

    def put(self, value: object) -> None:  # noqa: ARG002
        if self._seen_prompt:
            self._mark()
        self._seen_prompt = True

    def end(self) -> None: ...


PEER = Transformers()

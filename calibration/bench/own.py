"""A bundle as a contender: lvlm.load for lone streams, the engine for many requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lvlm.bench.case_figures import RequestRecord
from lvlm.bench.contenders import Serving, Setup
from lvlm.bench.costs import Costs, EngineShape
from lvlm.bench.drive import Mark, at_once, one_after_another
from lvlm.bench.engine_costs import CostWork, measure_costs
from lvlm.bench.workload import RoundWorkload, WorkloadRequest
from lvlm.runtime.backends import open_backend
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import Engine
from lvlm.runtime.model import load

QUEUE_LIMIT = 1_000_000  # nothing is refused: waiting shows in the figures


def open_bundle(setup: Setup) -> Serving:
    """Raises what lvlm.load and lvlm.Engine raise."""
    return Alone(setup) if setup.lone else Together(setup)


class Alone:
    """One stream at a time, as Model.stream, with the time of every token."""

    def __init__(self, setup: Setup) -> None:
        device = setup.settings.get("device", "cpu")
        self._model = load(setup.source, device=device, threads=setup.threads)
        self._ratios = ratios(setup.settings)
        self._facts = facts(self._model.manifest, device)
        self._images: dict[WorkloadRequest, list[np.ndarray]] = {}

    def serve(self, work: RoundWorkload) -> list[RequestRecord]:
        self._images = {request: request.open() for request in work.requests}
        return one_after_another(self._answer, work)

    def _answer(self, request: WorkloadRequest, mark: Mark) -> tuple[int, int | None]:
        with self._model.stream(
            request.prompt,
            self._images[request],
            max_new_tokens=request.new_tokens,
            ignore_eos=True,
            chat_template=self._model.manifest.chat_template is not None,
            **self._ratios,
        ) as stream:
            for _ in stream:
                pass
        for at in stream.token_times:
            mark(at)
        assert stream.result is not None
        stats = stream.result.stats
        return stats.prompt_tokens, stats.cache_bytes_used

    def facts(self) -> dict[str, Any]:
        return self._facts

    def close(self) -> None:
        self._model.close()


@dataclass(frozen=True)
class EngineRequest:
    """A request in the engine."""

    handle: Any

    def wait(self) -> tuple[Sequence[float], int, int | None]:
        stats = self.handle.result().stats
        return list(self.handle.token_times), stats.prompt_tokens, stats.cache_bytes_used


class Together:
    def __init__(self, setup: Setup) -> None:
        device = setup.settings.get("device", "cpu")
        self._engine = Engine(
            setup.source,
            device=device,
            threads=setup.threads,
            slots=setup.slots if setup.memory_budget is None else None,
            memory_budget=setup.memory_budget,
            max_text_len=setup.text_tokens,
            max_images=max(1, setup.images),
            queue_limit=QUEUE_LIMIT,
            **ratios(setup.settings),
        )
        self._threads = setup.threads
        manifest = read_bundle(setup.source)
        self._template = manifest.chat_template is not None
        self._facts = facts(manifest, device)
        # What it plans, in bytes, beside what is seen
        self._facts["engine_memory"] = asdict(self._engine.memory())

    def serve(self, work: RoundWorkload) -> list[RequestRecord]:
        images = {request: request.open() for request in work.requests}

        def submit(request: WorkloadRequest) -> EngineRequest:
            handle = self._engine.submit(
                request.prompt,
                images=images[request],
                max_new_tokens=request.new_tokens,
                ignore_eos=True,
                chat_template=self._template,
            )
            return EngineRequest(handle)

        return at_once(submit, work)

    def costs(self, work: CostWork) -> tuple[EngineShape, Costs]:
        return measure_costs(self._engine, work, self._threads, template=self._template)

    def facts(self) -> dict[str, Any]:
        return self._facts

    def close(self) -> None:
        self._engine.close()


def ratios(settings: dict[str, str]) -> dict[str, Any]:
    """keep (a number, or a tuple of one per reduction) and kv_keep, where they are set."""
    found: dict[str, Any] = {}
    if "keep" in settings:
        numbers = tuple(float(part) for part in settings["keep"].split(","))
        found["keep"] = numbers[0] if len(numbers) == 1 else numbers
    if "kv-keep" in settings:
        found["kv_keep"] = float(settings["kv-keep"])
    return found


def facts(manifest: Manifest, device: str) -> dict[str, Any]:
    """``decode_weight_bytes``: where weights lie in the host's memory, whose speed is known."""
    found: dict[str, Any] = {"recipe": manifest.recipe, "dtype": manifest.dtype}
    if isinstance(open_backend(device).allocate((1,), "float32"), np.ndarray):
        found["decode_weight_bytes"] = decode_weight_bytes(manifest)
    return found


def decode_weight_bytes(manifest: Manifest) -> int:
    """Bytes of weights that a decode step reads: all that its graph uses, but of an embedding table
    one row, unless the head is that same table."""
    text = manifest.text
    used = [manifest.weights[name] for name in manifest.graphs["decode"].weights]
    vocabulary = [w for w in used if text.vocab in w.dims]
    tables = [w for w in vocabulary if w.dims == (text.vocab, text.hidden)]
    skipped = tables[:1] if len(vocabulary) > 1 else []
    return sum(w.bytes for w in used) - sum(w.bytes for w in skipped)

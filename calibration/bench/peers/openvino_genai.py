"""Peer: OpenVINO GenAI on the CPU, converted by optimum-intel.

Single streams run its VLMPipeline, several at a time its ContinuousBatchingPipeline. ``f32`` asks
for fp32 arithmetic where the default is bf16 (CPUs that have it); ``int8`` and ``int4`` quantize
the weights as optimum-intel does by default. The cache is its own default, 8 bits on most CPUs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm.bench.case_figures import RequestRecord
from lvlm.bench.contenders import Conversion, Serving, Setup
from lvlm.bench.drive import at_once, one_after_another
from lvlm.bench.peers.parts.peer_prompts import Prompts
from lvlm.bench.workload import RoundWorkload, WorkloadRequest
from lvlm.core.errors import BackendError

ADVICE = (
    "it needs an older transformers than this package, so give it an environment of its own: "
    "python -m venv conv && conv/bin/pip install torch optimum-intel nncf openvino "
    "openvino-tokenizers, then --converter-python openvino-genai=conv/bin/python"
)


class OpenVINOGenAI:
    name = "openvino-genai"
    modules = ("openvino", "openvino_genai", "openvino_tokenizers")
    settings = ("f32", "int8", "int4")
    note = ""

    def conversion(self, settings: Sequence[str]) -> Conversion | None:
        weights = next((s for s in settings if s != "f32"), "fp32")
        command = (
            *("{python}", "-m", "optimum.commands.optimum_cli", "export", "openvino"),
            *("-m", "{checkpoint}", "--task", "image-text-to-text"),
            *("--weight-format", weights, "{out}"),
        )
        modules = ("optimum.intel", "openvino_tokenizers", "torch")
        return Conversion(f"openvino-{weights}", modules, ADVICE, (command,))

    def open(self, setup: Setup) -> Serving:
        properties: dict[str, object] = {"INFERENCE_NUM_THREADS": setup.threads}
        if "f32" in setup.settings:
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        return Single(setup, properties) if setup.lone else Batching(setup, properties)


def _greedy(request: WorkloadRequest) -> Any:
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens = request.new_tokens
    config.ignore_eos, config.do_sample = True, False
    config.apply_chat_template = False  # the prompt is written out, as for everyone
    return config


class Inputs:
    """Prompts written out by the bundle's template, images as OpenVINO's tensors."""

    def __init__(self, bundle: Path) -> None:
        self._prompts = Prompts(bundle)

    def opened(self, work: RoundWorkload) -> RoundWorkload:
        return self._prompts.opened(work)

    def of(self, request: WorkloadRequest) -> tuple[str, list[Any]]:
        import openvino as ov

        text = self._prompts.writer.rendered(request.prompt, len(request.images))
        image = self._prompts.maker.images.token
        text = text.replace(f"{image}\n", image)  # it breaks the line after an image by itself
        return text, [ov.Tensor(p[None]) for p in self._prompts.images(request)]


class Single:
    def __init__(self, setup: Setup, properties: dict[str, object]) -> None:
        import openvino_genai as genai

        class Streamer(genai.StreamerBase):  # type: ignore[misc]
            def __init__(self, mark: Callable[[], None]) -> None:
                super().__init__()
                self.mark = mark

            def write(self, token: int | Sequence[int]) -> Any:
                for _ in [token] if isinstance(token, int) else token:
                    self.mark()
                return genai.StreamingStatus.RUNNING

            def end(self) -> None: ...

        self._streamer = Streamer
        self._pipeline = genai.VLMPipeline(setup.source, "CPU", **properties)
        self._inputs = Inputs(Path(setup.prompts))

    def serve(self, work: RoundWorkload) -> list[RequestRecord]:
        return one_after_another(self._answer, self._inputs.opened(work))

    def _answer(self, request: WorkloadRequest, mark: Callable[[], None]) -> tuple[int, int | None]:
        text, images = self._inputs.of(request)
        answer = self._pipeline.generate(
            text,
            images=images,
            generation_config=_greedy(request),
            streamer=self._streamer(mark),
        )
        return int(answer.perf_metrics.get_num_input_tokens()), None

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self._pipeline


@dataclass
class Taken:
    """A request on its way through the batching pipeline."""

    request: WorkloadRequest
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> tuple[Sequence[float], int, int | None]:
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.times, self.prompt_tokens, None


class Batching:
    """One thread owns the pipeline: it takes requests between two steps."""

    def __init__(self, setup: Setup, properties: dict[str, object]) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = setup.slots
        self._pipeline = genai.ContinuousBatchingPipeline(
            setup.source, scheduler, "CPU", properties
        )
        self._inputs = Inputs(Path(setup.prompts))
        self._waiting: queue.Queue[Taken | None] = queue.Queue()
        self._number = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def serve(self, work: RoundWorkload) -> list[RequestRecord]:
        return at_once(self._submit, self._inputs.opened(work))

    def _submit(self, request: WorkloadRequest) -> Taken:
        taken = Taken(request)
        self._waiting.put(taken)
        return taken

    def _run(self) -> None:
        running: list[tuple[Taken, Any]] = []
        while True:
            while not running or not self._waiting.empty():
                taken = self._waiting.get()
                if taken is None:
                    return
                self._add(taken, running)
            try:
                self._pipeline.step()
                self._read(running)
            except Exception as error:
                for taken, _ in running:
                    taken.error = BackendError(f"OpenVINO GenAI: {error}")
                    taken.done.set()
                running.clear()

    def _add(self, taken: Taken, running: list[tuple[Taken, Any]]) -> None:
        try:
            text, images = self._inputs.of(taken.request)
            self._number += 1
            handle = self._pipeline.add_request(self._number, text, images, _greedy(taken.request))
        except Exception as error:
            taken.error = BackendError(f"OpenVINO GenAI: {error}")
            taken.done.set()
            return
        running.append((taken, handle))

    def _read(self, running: list[tuple[Taken, Any]]) -> None:
        now = time.perf_counter()
        for taken, handle in running[:]:
            while handle.can_read():
                for output in handle.read().values():
                    taken.times += [now] * len(output.generated_ids)
            if len(taken.times) >= taken.request.new_tokens:
                metrics = handle.get_vlm_perf_metrics()
                taken.prompt_tokens = int(metrics.get_num_input_tokens())
                running.remove((taken, handle))
                taken.done.set()

    def facts(self) -> dict[str, Any]:
        return {"pipeline": "ContinuousBatchingPipeline"}

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()
        del self._pipeline


PEER = OpenVINOGenAI()

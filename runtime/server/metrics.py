"""Metrics for Prometheus: vLLM's names where they mean the same, this project's beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.engine.stats import EngineStats
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.server.engine_figures import COUNTERS, GAUGES

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
LABEL = ["model_name"]


class Engines(Collector):
    """Gauges and counters that engines keep themselves, read when they are asked for."""

    def __init__(self, stats: Mapping[str, Callable[[], EngineStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        now = {name: stats() for name, stats in self._stats.items()}
        for name, (text, value) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=LABEL)
            for model, stats in now.items():
                gauge.add_metric([model], value(stats))
            yield gauge
        for name, (text, value) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=LABEL)
            for model, stats in now.items():
                counter.add_metric([model], value(stats))
            yield counter


class Metrics:
    """All of a server's metrics."""

    def __init__(self, stats: Mapping[str, Callable[[], EngineStats]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        registry.register(Engines(stats))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, LABEL, registry=registry, buckets=buckets)

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, [*LABEL, *labels], registry=registry)

        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From submission to the first token", FIRST
        )
        self._between = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer", BETWEEN
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From submission to the last token", WHOLE
        )
        self._success = counter("vllm:request_success", "Requests answered", ["finished_reason"])
        self._refused = counter("lvlm:requests_refused", "Requests refused or failed", ["status"])
        self._images = counter("lvlm:image_tokens", "Image tokens that were encoded")
        self._kept = counter("lvlm:image_tokens_kept", "Image tokens left in the last block")
        self._evicted = counter("lvlm:cache_entries_evicted", "Cache entries dropped after prefill")

    def answered(self, model: str, handle: Handle, answer: Generation) -> None:
        """Note one answer."""
        times, stats = handle.token_times, answer.stats
        if times:
            self._first.labels(model).observe(times[0] - handle.submitted)
            self._whole.labels(model).observe(times[-1] - handle.submitted)
        between = self._between.labels(model)
        for before, after in pairwise(times):
            between.observe(after - before)
        self._success.labels(model, answer.finish_reason).inc()
        self._images.labels(model).inc(stats.encoded_image_tokens)
        self._kept.labels(model).inc((stats.image_tokens_per_layer or (0,))[-1])
        entered, kept = sum(stats.tokens_per_layer), sum(stats.kept_per_layer)
        self._evicted.labels(model).inc(max(0, entered - kept))

    def refused(self, model: str, status: int) -> None:
        """Note a request without an answer."""
        self._refused.labels(model, str(status)).inc()

    def families(self) -> list[Metric]:
        """Metrics as they are now, for another process to tell."""
        return list(self._registry.collect())

    def text(self) -> bytes:
        """The metrics as Prometheus reads them."""
        made: Any = generate_latest(self._registry)
        return bytes(made)

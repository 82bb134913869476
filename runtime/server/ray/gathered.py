"""Metrics of several replicas as those of one server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector


class Gathered(Collector):
    """Metrics by replica, with the label ``replica`` on each sample."""

    def __init__(self, replicas: Mapping[str, Sequence[Metric]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for replica, metrics in self._replicas.items():
            for metric in metrics:
                like = Metric(metric.name, metric.documentation, metric.type, metric.unit)
                whole = found.setdefault(metric.name, like)
                whole.samples += [
                    sample._replace(labels={**sample.labels, "replica": replica})
                    for sample in metric.samples
                ]
        return found.values()


def text(replicas: Mapping[str, Sequence[Metric]]) -> bytes:
    """The metrics as Prometheus reads them."""
    registry = CollectorRegistry()
    registry.register(Gathered(replicas))
    made: Any = generate_latest(registry)
    return bytes(made)

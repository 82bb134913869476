"""An engine's figures among Triton's metrics, under the names that lvlm-serve has for them."""

from __future__ import annotations

from collections.abc import Mapping

from lvlm.runtime.engine.stats import EngineStats
from lvlm.runtime.server.engine_figures import COUNTERS, GAUGES
from lvlm.runtime.server.triton_server.python_api import Metric, MetricFamily, PythonApi


class Figures:
    """Metrics of one model; none where Triton has none."""

    def __init__(self, api: PythonApi, labels: Mapping[str, str]) -> None:
        self._families: list[MetricFamily] = []  # a metric goes with its family
        self._metrics: dict[str, Metric] = {}
        self._told: dict[str, float] = {}
        kinds = api.MetricFamily
        try:
            for name, (text, _) in (GAUGES | COUNTERS).items():
                gauge = name in GAUGES
                kind = kinds.GAUGE if gauge else kinds.COUNTER
                family = kinds(name=name if gauge else f"{name}_total", description=text, kind=kind)
                self._families.append(family)
                self._metrics[name] = family.Metric(labels=labels)
        except api.TritonModelException as error:
            api.Logger.log_info(f"no metrics of lvlm: {error}")
            self._metrics.clear()

    def tell(self, stats: EngineStats) -> None:
        """Tell Triton what has changed."""
        for name, metric in self._metrics.items():
            value, before = float((GAUGES | COUNTERS)[name][1](stats)), self._told.get(name, 0.0)
            if value == before:
                continue
            if name in GAUGES:
                metric.set(value)
            else:
                metric.increment(value - before)
            self._told[name] = value

"""Speeds of candidates under the load that the choice is for, each in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvlm.bench.contenders import Contender
from lvlm.bench.rounds import BenchPlan, measure
from lvlm.bench.workload import Case, WorkloadPrompts, prompt_maker, work
from lvlm.calibration.evaluate.records import Record, RecordStore, key_of
from lvlm.calibration.evaluate.variants import Bundle
from lvlm.calibration.tune.candidates import FULL, Candidate
from lvlm.calibration.tune.predictions import Load
from lvlm.core.progress import Progress, Stage

REQUESTS = 4  # of one at a time; of more, twice as many as there are at a time
SEED = 0


@dataclass(frozen=True)
class SpeedRecord(Record):
    """A candidate under load: milliseconds to the first token, median; tokens of all answers per
    second; most resident memory of its process and the cache of one request, in bytes; what
    measuring took. With ``error`` it could not be measured, and there are no figures."""

    ttft_ms: float = 0.0
    tokens_per_s: float = 0.0
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Stopwatch:
    """``bundles``: by what they serve."""

    load: Load
    device: str
    threads: int
    store: RecordStore[SpeedRecord]
    bundles: Mapping[tuple[str, str | None], Bundle]

    def speeds(self, some: Sequence[Candidate], stage: Stage) -> dict[Candidate, SpeedRecord]:
        """Those of ``some``; what is known is not measured again. What failed is not kept: the next
        run tries it once more."""
        found: dict[Candidate, SpeedRecord] = {}
        for done, one in enumerate(some):
            stage.add_item(done, len(some), skipped=0)
            record = self.store.get(self._key(one))
            if record is None:
                record = self._measured(one)
                if record.error is None:
                    self.store.add([record])
            found[one] = record
        return found

    def check(self) -> None:
        """Raises ParameterError where no prompt is of that length: known before any work."""
        work(self.case(), self._writer(), SEED)

    def _writer(self) -> WorkloadPrompts:
        full = self.bundles[FULL.bundle]
        maker = prompt_maker(full.folder, full.manifest)
        return WorkloadPrompts(maker, full.manifest.special_tokens.get("bos_token"))

    def _measured(self, one: Candidate) -> SpeedRecord:
        bundle, full = self.bundles[one.bundle], self.bundles[FULL.bundle]
        contender = Contender(one.label, self._settings(one), bundle.folder, bundle.manifest)
        writer, case = self._writer(), self.case()
        plan = BenchPlan(
            cases=(case,),
            warmup=1,
            repeats=1,
            seed=SEED,
            threads=self.threads,
            slots=self.load.concurrency,
            apart=True,
        )
        began = time.monotonic()
        sources = {one.label: bundle.folder}
        with tempfile.TemporaryDirectory(prefix="lvlm-tune-") as logs:
            (result,) = measure(
                [contender], sources, full.folder, writer, plan, Path(logs), Progress(0, quiet=True)
            )
        figures = result.figures(case)
        if figures is None:
            return SpeedRecord(self._key(one), error=result.error or "nothing was measured")
        return SpeedRecord(
            self._key(one),
            figures.ttft_ms.median,
            figures.tokens_per_s.median,
            figures.peak_bytes,
            figures.cache_bytes,
            time.monotonic() - began,
        )

    def case(self) -> Case:
        """The requests that are answered."""
        load = self.load
        requests = REQUESTS if load.concurrency == 1 else 2 * load.concurrency
        return Case(load.text_tokens, load.images, load.new_tokens, requests, load.concurrency)

    def _settings(self, one: Candidate) -> dict[str, str]:
        given = {"device": self.device, "keep": one.keep, "kv-keep": one.kv_keep}
        return {name: str(value) for name, value in given.items() if value is not None}

    def _key(self, one: Candidate) -> str:
        load = self.load
        return key_of(
            bundle=self.bundles[one.bundle].digest,
            settings=self._settings(one),
            load=[load.text_tokens, load.images, load.new_tokens, load.concurrency],
            threads=self.threads,
        )

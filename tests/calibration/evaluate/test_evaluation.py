"""The loop: what is run again after an interruption, and what is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_tools import HOW

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate import evaluation
from lvlm.calibration.evaluate.evaluation import evaluate, plan_jobs
from lvlm.calibration.evaluate.records import RecordStore, ResultsError, Run, SampleRecord
from lvlm.calibration.evaluate.variant_runner import BundleRunner
from lvlm.calibration.evaluate.variants import Bundle, Variant


class Spy:
    """Counts the batches that are run, and stops at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int = 10**9) -> None:
        self.batches: list[list[str]] = []
        run = BundleRunner.run

        def counted(runner: BundleRunner, *args: Any) -> list[SampleRecord]:
            if len(self.batches) == stop_at:
                raise KeyboardInterrupt
            self.batches.append([sample.id for sample in args[3]])
            return run(runner, *args)

        monkeypatch.setattr(BundleRunner, "run", counted)


def test_an_interrupted_run_goes_on_and_a_finished_one_loads_nothing(
    full: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    how = dataclasses.replace(HOW, batch=2, max_new_tokens=2)
    wanted: list[tuple[Variant, Run]] = [
        (Variant(full, ""), "forced"),
        (Variant(full, ""), "greedy"),
    ]
    jobs = plan_jobs(wanted, samples, how)
    path = tmp_path / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            list(evaluate(jobs, samples, how, RecordStore(path, SampleRecord)))
        assert spy.batches == [
            ["1-describe-sparse", "2-row-sparse"],
            ["3-read-sparse"],
            ["1-describe-sparse", "2-row-sparse"],
        ]
    with path.open("a") as file:
        file.write('{"key": "cut sh')
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        steps = list(evaluate(jobs, samples, how, RecordStore(path, SampleRecord)))
        assert spy.batches == [["3-read-sparse"]]
    assert steps[-1].done == 3
    assert steps[-1].seconds_left == 0
    assert len(path.read_text().splitlines()) == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BundleRunner", None)
        assert list(evaluate(jobs, samples, how, RecordStore(path, SampleRecord))) == []


def test_keys_hold_what_records_depend_on(
    full: Bundle, uniform: Bundle, samples: list[EvaluationSample]
) -> None:
    def keys(
        variant: Variant, run: Run = "greedy", data: Any = samples, **how: Any
    ) -> tuple[str, ...]:
        (job,) = plan_jobs([(variant, run)], data, dataclasses.replace(HOW, **how))
        return job.keys

    base, plain = keys(Variant(full, "a")), Variant(full, "a")
    assert keys(Variant(dataclasses.replace(full, folder=Path("moved")), "renamed")) == base
    changed = [
        keys(plain, "forced"),
        keys(Variant(uniform, "")),
        keys(Variant(full, "", keep=0.5)),
        keys(Variant(full, "", kv_keep=0.5)),
        keys(Variant(full, "", wanted=0.5)),
        keys(plain, max_new_tokens=9),
        keys(plain, device="cuda"),
        keys(plain, threads=1),
        keys(plain, system="Be kind."),
        keys(plain, batch=3),
    ]
    assert len({key for found in [base, *changed] for key in found}) == 3 * (len(changed) + 1)
    assert keys(plain, "forced", max_new_tokens=9) == keys(plain, "forced")
    assert keys(plain, data=samples[2::-2]) == base[2::-2]
    # Together in a batch with others, rounding may differ
    assert keys(plain, batch=2)[2] == base[2]
    assert set(keys(plain, batch=2)[:2]).isdisjoint(base)


def test_damaged_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ResultsError, match=r"is damaged .*remove it"):
        RecordStore(path, SampleRecord)
    path.unlink()
    store = RecordStore(path, SampleRecord)
    store.add([SampleRecord("a", "1", nll=0.1), SampleRecord("b", "2", text="zwei\n“2”\u2028")])
    assert RecordStore(path, SampleRecord).get("b") == store.get("b")
    assert json.loads(path.read_text().splitlines()[0])["nll"] == 0.1

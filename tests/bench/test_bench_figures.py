"""Arithmetic of lvlm-bench: percentiles, spreads, arrivals, queues, prompts of exact length."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.bench.case_figures import CaseFigures, RequestRecord, Round, RoundSpread, percentile
from lvlm.bench.drive import at_once, one_after_another
from lvlm.bench.machine import read_bandwidth
from lvlm.bench.own import decode_weight_bytes, ratios
from lvlm.bench.resident_memory import forget_peak, peak_bytes
from lvlm.bench.rounds import BenchPlan, round_seed
from lvlm.bench.workload import (
    Case,
    RoundWorkload,
    WorkloadPrompts,
    WorkloadRequest,
    arrivals,
    noise,
    prompt_maker,
    work,
)
from lvlm.core.errors import ParameterError, PromptError
from lvlm.runtime.bundle.manifest import Weight
from lvlm.runtime.bundle.reader import read_bundle

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(NUMBERS, st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    expected = np.percentile(values, percent)
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_spread() -> None:
    spread = RoundSpread.of([9.0, 10.0, 12.0])
    assert (spread.median, spread.low, spread.high) == (10.0, 9.0, 12.0)
    assert spread.noise == pytest.approx(0.15)
    assert RoundSpread.of([0.0]).noise == 0.0


def test_figures_of_two_rounds() -> None:
    early = RequestRecord(arrival=0.0, tokens=(0.5, 0.6, 0.8), prompt_tokens=40, cache_bytes=7)
    late = RequestRecord(arrival=1.0, tokens=(1.2, 1.3, 1.4), prompt_tokens=40)
    first, second = Round((early, late), 100), Round((early,), 300)
    assert first.ttft == pytest.approx([0.5, 0.2])
    assert first.gaps == pytest.approx([0.1, 0.2, 0.1, 0.1])
    assert first.seconds == pytest.approx(1.4)
    assert first.tokens_per_s == pytest.approx(6 / 1.4)
    assert first.requests_per_s == pytest.approx(2 / 1.4)
    assert first.decode_tokens_per_s == pytest.approx((2 / 0.3 + 2 / 0.2) / 2)

    figures = CaseFigures.of([first, second])
    assert figures.ttft_ms.median == pytest.approx((350 + 500) / 2)
    assert figures.itl_p50_ms == pytest.approx(100)
    assert figures.itl_p99_ms == pytest.approx(200)
    assert (figures.peak_bytes, figures.cache_bytes, figures.prompt_tokens) == (300, 7, 40)
    assert figures.plain()["ttft_ms"]["noise"] == pytest.approx(75 / 425)


def test_answers_of_one_token_have_no_gaps() -> None:
    figures = CaseFigures.of([Round((RequestRecord(0.0, (0.25,), 9),), None)])
    assert figures.ttft_ms.median == 250
    assert figures.itl_p50_ms is figures.decode_tokens_per_s is figures.peak_bytes is None


@given(st.integers(0, 1000), st.floats(1, 50))
def test_arrivals_repeat_by_seed(seed: int, rate: float) -> None:
    times = arrivals(rate, 20.0, seed)
    assert times == arrivals(rate, 20.0, seed) != arrivals(rate, 20.0, seed + 1)
    assert times == sorted(times)
    assert 0 < times[0] <= times[-1] < 20


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(arrivals(100.0, 200.0, seed=3))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # as exponential gaps have it
    with pytest.raises(ParameterError, match="longer --duration"):
        arrivals(0.001, 1.0, seed=0)


@pytest.fixture(scope="module")
def writer(bundle: Callable[..., Path]) -> WorkloadPrompts:
    folder = bundle("digits-llava", max_images=2)
    manifest = read_bundle(folder)
    return WorkloadPrompts(prompt_maker(folder, manifest), manifest.special_tokens.get("bos_token"))


@given(tokens=st.integers(16, 400), images=st.integers(0, 2), seed=st.integers(0, 9))
def test_prompts_have_the_wanted_length(
    writer: WorkloadPrompts, tokens: int, images: int, seed: int
) -> None:
    text = writer.write(tokens, images, seed)
    assert writer.count(text, images) == tokens
    assert text == writer.write(tokens, images, seed)


def test_a_prompt_shorter_than_its_template(writer: WorkloadPrompts) -> None:
    with pytest.raises(ParameterError, match="the chat template and one word take"):
        writer.write(2, 1, 0)


def test_work_repeats_and_nothing_in_it_is_asked_twice(writer: WorkloadPrompts) -> None:
    case = Case(text_tokens=24, images=1, new_tokens=4, requests=3, concurrency=2)
    first, second = work(case, writer, 1), work(case, writer, 2)
    assert first == work(case, writer, 1)
    asked = [*first.requests, *second.requests]
    assert len({r.prompt for r in asked}) == len({r.images for r in asked}) == 6
    assert (noise(1, (8, 6)) == noise(1, (8, 6))).all()
    assert noise(1, (8, 6)).shape == (8, 6, 3)
    loaded = work(replace(case, rate=50.0, duration=1.0), writer, 1)
    assert len(loaded.requests) == len(loaded.arrivals) > 20


def requests(count: int) -> tuple[WorkloadRequest, ...]:
    return tuple(WorkloadRequest(str(i), (), (1, 1), 2) for i in range(count))


def test_clients_of_a_serial_contender_queue() -> None:
    asked: list[str] = []

    def answer(request: WorkloadRequest, mark: Callable[[], None]) -> tuple[int, int | None]:
        asked.append(request.prompt)
        mark()
        time.sleep(0.002)
        mark()
        return 5, None

    records = one_after_another(answer, RoundWorkload(requests(5), (), concurrency=2))
    assert asked == list("01234")
    assert [r.arrival for r in records[:2]] == [0.0, 0.0]
    for index in range(2, 5):  # asked when its client's last answer ended, begun after the others
        before = records[index - 2].tokens[-1]
        assert before <= records[index].arrival <= records[index - 1].tokens[-1]
        assert records[index].tokens[0] >= records[index - 1].tokens[-1]


def test_a_late_serial_contender_does_not_move_arrivals() -> None:
    def answer(request: WorkloadRequest, mark: Callable[[], None]) -> tuple[int, int | None]:  # noqa: ARG001
        time.sleep(0.01)
        mark()
        return 5, None

    records = one_after_another(answer, RoundWorkload(requests(3), (0.0, 0.001, 0.02), 0))
    assert [r.arrival for r in records] == [0.0, 0.001, 0.02]
    assert all(r.tokens[0] > r.arrival for r in records)


class Answered:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def wait(self) -> tuple[Sequence[float], int, int | None]:
        if self.error:
            raise self.error
        return [time.perf_counter()], 5, 3


@pytest.mark.parametrize("times", [(), (0.0, 0.001, 0.002, 0.003)])
def test_many_at_once(times: tuple[float, ...]) -> None:
    running, most, lock = 0, 0, threading.Lock()

    class Counted(Answered):
        def wait(self) -> tuple[Sequence[float], int, int | None]:
            nonlocal running, most
            with lock:
                running, most = running + 1, max(most, running + 1)
            time.sleep(0.002)
            with lock:
                running -= 1
            return super().wait()

    records = at_once(lambda _: Counted(), RoundWorkload(requests(4), times, concurrency=2))
    assert len(records) == 4
    assert times or most <= 2
    assert all(r.arrival <= r.tokens[0] and r.prompt_tokens == 5 for r in records)
    if times:
        assert [r.arrival for r in records] == list(times)


def test_an_error_of_one_request_is_raised() -> None:
    def submit(request: WorkloadRequest) -> Answered:
        return Answered(PromptError("no") if request.prompt == "2" else None)

    with pytest.raises(PromptError, match="no"):
        at_once(submit, RoundWorkload(requests(4), (), concurrency=2))


def test_bytes_that_a_step_reads(bundle: Callable[..., Path]) -> None:
    manifest = read_bundle(bundle("digits-llava", max_images=2))
    text = manifest.text
    used = [manifest.weights[name] for name in manifest.graphs["decode"].weights]
    whole = sum(w.bytes for w in used)
    table = next(w for w in used if w.dims == (text.vocab, text.hidden))
    tied = sum(text.vocab in w.dims for w in used) == 1
    assert decode_weight_bytes(manifest) == whole - (0 if tied else table.bytes)
    # A head beside the table, or none
    name = "another head"
    graph = manifest.graphs["decode"]
    graph = replace(graph, weights=(*graph.weights, name))
    head = Weight("weights.bin", 0, 10, "uint8", (text.vocab, 1))
    more = replace(
        manifest,
        graphs={**manifest.graphs, "decode": graph},
        weights={**manifest.weights, name: head},
    )
    assert decode_weight_bytes(more) == whole - table.bytes + 10


def test_settings_become_options() -> None:
    assert ratios({}) == {}
    assert ratios({"keep": "0.5", "kv-keep": "0.2"}) == {"keep": 0.5, "kv_keep": 0.2}
    assert ratios({"keep": "0.7,0.5"}) == {"keep": (0.7, 0.5)}


def test_memory_and_its_speed() -> None:
    assert read_bandwidth(2, size=1 << 20, repeats=1) > 0
    peak = peak_bytes()
    if peak is None:
        pytest.skip("this system does not tell what a process holds")
    held = np.ones(50_000_000, np.uint8)
    grown = peak_bytes()
    assert grown is not None
    assert grown >= held.nbytes
    del held
    forget_peak()
    assert (peak_bytes() or 0) <= grown


def test_no_two_rounds_ask_the_same() -> None:
    """An engine would know the prompts of the case before."""
    cases = tuple(
        Case(text_tokens=24, images=1, new_tokens=4, requests=3, concurrency=n) for n in (1, 4, 16)
    )
    plan = BenchPlan(cases, warmup=2, repeats=5, seed=3, threads=1, slots=16, apart=False)
    seeds = [round_seed(plan, case, number) for case in cases for number in range(-2, 5)]
    assert len(set(seeds)) == len(seeds) == 21
    assert round_seed(plan, cases[0], 0) == 3

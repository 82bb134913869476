"""The TensorRT backends on a GPU and a TensorRT that are not there (fake_tensorrt.py): answers are
the CPU's, and every buffer, copy and graph is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver
from fake_engines import RECIPES, Make, one_line
from fake_tensorrt import FakeTensorRt
from settings import ASSETS

import lvlm
from lvlm.core.errors import BackendError
from lvlm.runtime.backends import devices, open_backend
from lvlm.runtime.backends.trt import engine_weights
from lvlm.runtime.bundle.engine_sets import EngineSet
from lvlm.runtime.engine import Engine
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.run_cli import main

pytestmark = pytest.mark.usefixtures("trt")

SAMPLES = [ASSETS / f"samples/digits-{i}.png" for i in (1, 2)]
PROMPTS = ["Describe the picture.", "Read the top row.", "Hi"]
IMAGES = [SAMPLES[:1], SAMPLES, []]


def decode_steps(model: Model, rows: int, steps: int, **ratios: Any) -> list[np.ndarray]:
    """Logits of a batch after each of some steps."""
    prompts = [
        model.prepare(0, p, i, GenerationOptions())
        for p, i in zip(PROMPTS[:rows], IMAGES, strict=False)
    ]
    batch = model.calls.start(prompts, **ratios)
    logits = [batch.logits.copy()]
    for _ in range(steps):
        batch.feed([5] * len(prompts))
        logits.append(batch.logits.copy())
    return logits


# Whole answers


@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_are_those_of_the_cpu(
    recipe: str, built: Make, driver: FakeDriver, trt: FakeTensorRt
) -> None:
    """Alone and in a batch of different lengths, with the same counts."""
    folder = built(recipe)
    options: dict[str, Any] = {"max_new_tokens": 24}
    if recipe in ("prefixkv", "interval"):
        options["kv_keep"] = 0.5
    with lvlm.load(folder) as cpu, lvlm.load(folder, device="tensorrt-rtx") as model:
        expected = cpu.generate(PROMPTS, IMAGES, **options)
        together = model.generate(PROMPTS, IMAGES, **options)
        alone = model.generate(PROMPTS[1], IMAGES[1], **options)
        assert [g.token_ids for g in together] == [g.token_ids for g in expected]
        assert alone.token_ids == expected[1].token_ids
        for ours, theirs in zip(together, expected, strict=True):
            assert ours.stats.kept_per_layer == theirs.stats.kept_per_layer
            for mine, other in zip(ours.merge_maps, theirs.merge_maps, strict=True):
                np.testing.assert_array_equal(mine, other)
        assert set(ran(driver)) >= {"vision", "prefill", "decode"}
        assert ("compact" in ran(driver)) == (recipe == "interval")  # after 16 tokens
    assert trt.libraries == []
    del model
    assert driver.blocks == driver.pinned == {}  # closing frees everything


def test_fp16(built: Make) -> None:
    folder = built("none", dtype="fp16")
    with lvlm.load(folder) as cpu, lvlm.load(folder, device="tensorrt-rtx") as model:
        expected, ours = decode_steps(cpu, 2, 3), decode_steps(model, 2, 3)
        cache = model.calls.start([model.prepare(0, "Hi", [], GenerationOptions())]).cache
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, atol=2e-2)
    capacity = static_capacity(model.manifest).per_layer[0]
    assert cache.buffers["key_0"].buffer.nbytes == 2 * capacity * 32 * 2
    assert cache.bytes_allocated == sum(b.buffer.nbytes for b in cache.buffers.values())


def test_pieces_of_a_stream(built: Make) -> None:
    folder = built()
    with lvlm.load(folder, device="tensorrt-rtx") as model:
        answer = model.generate(PROMPTS[0], IMAGES[0], max_new_tokens=12)
        stream = model.stream(PROMPTS[0], IMAGES[0], max_new_tokens=12)
        pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == answer.text


def test_the_command_line(built: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = built()
    argv = [str(folder), PROMPTS[0], "--image", str(SAMPLES[0]), "--max-new-tokens", "8"]
    assert main(argv) == 0
    expected = capsys.readouterr()
    assert main([*argv, "--device", "tensorrt-rtx"]) == 0
    assert capsys.readouterr() == expected
    assert main([*argv, "--device", "tensorrt-rtx", "--threads", "2"]) == 2
    assert "leave --threads out" in one_line(capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"what to run on: {', '.join(devices())} (default cpu)" in told


# What comes back to the host


def downloaded(driver: FakeDriver) -> list[int]:
    """Bytes of every call's copy to the host, since the last time."""
    found = [event[1] for event in driver.events if event[0] == "download"]
    driver.events.clear()
    return found


def test_greedy_steps_bring_one_number_for_each_row(built: Make, driver: FakeDriver) -> None:
    """Of whatever needs more, the logits come."""
    folder = built()
    with lvlm.load(folder) as cpu, lvlm.load(folder, device="tensorrt-rtx") as model:
        logits = 4 * model.manifest.text.vocab
        assert logits > 256
        for rows in (1, 3):
            answers = model.generate(PROMPTS[:rows], IMAGES[:rows], max_new_tokens=8)
            expected = cpu.generate(PROMPTS[:rows], IMAGES[:rows], max_new_tokens=8)
            assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
            steps = max(len(a.token_ids) for a in answers) - 1
            assert downloaded(driver)[-steps:] == [256] * steps  # 8 bytes a row
        for asks in ({"temperature": 0.7, "seed": 1}, {"logprobs": 2}):
            options: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True} | asks
            answer, expected = (who.generate("Hi", **options) for who in (model, cpu))
            assert answer.token_ids == expected.token_ids
            assert min(downloaded(driver)[-3:]) >= logits, asks


def test_engines_without_a_choice_of_their_own(built: Make, driver: FakeDriver) -> None:
    """As they were built before decode chose."""
    folder = built(greedy=False)
    with lvlm.load(folder) as cpu, lvlm.load(folder, device="tensorrt-rtx") as model:
        ours = model.generate(PROMPTS[0], IMAGES[0], max_new_tokens=8)
        theirs = cpu.generate(PROMPTS[0], IMAGES[0], max_new_tokens=8)
        assert ours.token_ids == theirs.token_ids
        assert downloaded(driver)[-1] >= 4 * model.manifest.text.vocab


def test_one_that_samples_beside_a_greedy_one(built: Make, driver: FakeDriver) -> None:
    """While it runs logits come of both; then no more."""
    folder = built()
    options: dict[str, Any] = {"ignore_eos": True}
    with lvlm.load(folder) as cpu, Engine(folder, device="tensorrt-rtx", slots=2) as engine:
        long = engine.submit("Hi", max_new_tokens=40, **options)
        short = engine.submit("Hi", max_new_tokens=4, temperature=0.7, seed=1, **options)
        for handle, asks in ((long, {}), (short, {"temperature": 0.7, "seed": 1})):
            count = 40 if handle is long else 4
            expected = cpu.generate("Hi", max_new_tokens=count, **asks, **options)
            assert handle.result().token_ids == expected.token_ids
        sizes = downloaded(driver)
        assert sizes[-30:] == [256] * 30
        assert max(sizes) >= 4 * cpu.manifest.text.vocab


def test_a_greedy_answer_that_overflows_is_refused(built: Make, driver: FakeDriver) -> None:
    with lvlm.load(built(), device="tensorrt-rtx") as model:
        good = model.generate("Hi", max_new_tokens=8, ignore_eos=True).token_ids
        with model.stream("Hi", max_new_tokens=8, ignore_eos=True) as stream:
            next(stream)
            assert model.calls._cache is not None
            for array in model.calls._cache.buffers.values():
                driver.memory(array.address, array.buffer.nbytes)[:] = 0xFF
            with pytest.raises(BackendError, match="logits contain NaN or infinity"):
                list(stream)
        assert model.generate("Hi", max_new_tokens=8, ignore_eos=True).token_ids == good


def test_what_nobody_looks_at_is_looked_at_in_the_end(built: Make, driver: FakeDriver) -> None:
    """A row that has its answer is decoded beside the others: where it overflows then, the next
    call does not find that."""
    with lvlm.load(built(), device="tensorrt-rtx") as model:
        options = {"max_new_tokens": 5, "ignore_eos": True}
        good = model.generate(["Hi", "Hi"], **options)[0].token_ids
        prompts = [model.prepare(0, "Hi", [], GenerationOptions(max_new_tokens=n)) for n in (1, 5)]
        with model.calls.run(prompts) as batch:
            batch.choose(range(2))
            for array in batch.cache.buffers.values():
                driver.memory(array.address, array.buffer.nbytes // 2)[:] = 0xFF  # row 0
            while batch.running:
                batch.step()
        assert [a.token_ids for a in model.generate(["Hi", "Hi"], **options)] == [good, good]


# Buffers, copies, graphs


def test_the_cache_is_written_in_place(built: Make, driver: FakeDriver) -> None:
    """One address as past and present, which no step changes; and a call takes one copy in, one
    out and one wait."""
    with lvlm.load(built("interval"), device="tensorrt-rtx") as model:
        decode_steps(model, 2, 18, kv_keep=0.5)
        cache = model.calls._cache
        assert cache is not None
        assert cache.capacities.tolist() == list(static_capacity(model.manifest).per_layer)
        runs = [event for event in driver.events if event[0] == "run"]
        assert {name for _, name, _ in runs} == {"vision", "prefill", "decode", "compact"}
        for _, name, addresses in runs:
            for buffer, array in cache.buffers.items():
                for port in {f"past_{buffer}", f"present_{buffer}"} & set(addresses):
                    assert addresses[port] == array.address, (name, port)
        assert all(
            f"present_{buffer}" in runs[-1][2] or "query" in buffer for buffer in cache.buffers
        )
        calls = 2 + 18 + 1  # vision, prefill, decode, compact
        for kind in ("upload", "download", "wait"):
            assert driver.kinds().count(kind) == calls


def test_new_buffers_are_zeros(driver: FakeDriver) -> None:
    """What masks hide must be finite. bf16 has two bytes, though numpy does not know it."""
    backend = open_backend("tensorrt-rtx")
    array = backend.allocate((2, 3), "bfloat16")
    driver.synchronize()
    assert array.buffer.nbytes == 12
    assert not driver.memory(array.address, 12).any()


@pytest.mark.usefixtures("endless")
def test_decode_is_captured_at_its_second_step(built: Make, driver: FakeDriver) -> None:
    with lvlm.load(built(), device="tensorrt-rtx") as model:
        for question in ("Hello there", "Hi"):
            driver.events.clear()
            model.generate(question, max_new_tokens=8)  # seven steps
            if question == "Hello there":
                assert driver.kinds().count("capture") == 1
                assert driver.kinds().count("launch") == 6
                assert ran(driver) == ["prefill", "decode"]
            else:  # the same buffers and shapes: the graph still holds
                assert "capture" not in driver.kinds()
                assert driver.kinds().count("launch") == 7
                assert ran(driver) == ["prefill"]
        driver.events.clear()
        model.generate(["Hi", "Hello there"], max_new_tokens=8)  # another batch size
        assert driver.kinds().count("capture") == 1
        assert driver.kinds().count("launch") == 6
        driver.events.clear()
        model.generate("Hi", max_new_tokens=2)
        assert ran(driver) == ["prefill", "decode"]  # new buffers: the graph is gone
        assert "capture" not in driver.kinds()


def ran(driver: FakeDriver) -> list[str]:
    return [event[1] for event in driver.events if event[0] == "run"]


def test_a_longer_prompt_moves_the_workspace_and_the_graph_is_made_anew(
    built: Make, driver: FakeDriver
) -> None:
    with lvlm.load(built(), device="tensorrt-rtx") as model, lvlm.load(built_at(model)) as cpu:
        for rows in (PROMPTS[2:], PROMPTS[:1], PROMPTS[2:]):
            images = [IMAGES[PROMPTS.index(rows[0])]]
            driver.events.clear()
            ours = model.generate(rows, images, max_new_tokens=6)
            assert [g.token_ids for g in ours] == [
                g.token_ids for g in cpu.generate(rows, images, max_new_tokens=6)
            ]


def built_at(model: Model) -> Path:
    """The bundle that a model's engines were loaded from."""
    return next(iter(model.graphs.backend._engines))  # type: ignore[attr-defined]


@pytest.mark.usefixtures("endless")
def test_nothing_is_captured_while_kernels_are_compiled(
    built: Make, driver: FakeDriver, trt: FakeTensorRt
) -> None:
    trt.compiling = 3
    with lvlm.load(built(), device="tensorrt-rtx") as model:
        model.generate("Hi", max_new_tokens=10)
    assert ran(driver) == ["prefill"] + ["decode"] * 4
    assert driver.kinds().count("launch") == 5


def test_without_graphs_it_says_so_once_and_goes_on(
    built: Make, driver: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = built()
    with lvlm.load(folder) as cpu, lvlm.load(folder, device="tensorrt-rtx") as model:
        expected = cpu.generate(PROMPTS[0], IMAGES[0], max_new_tokens=8)
        driver.capture_fails = True
        for _ in range(2):
            answer = model.generate(PROMPTS[0], IMAGES[0], max_new_tokens=8)
            assert answer.token_ids == expected.token_ids
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no CUDA graph for decode" in err
    assert "cudaErrorStreamCaptureUnsupported" in err
    assert "launch" not in driver.kinds()


def test_weights_are_uploaded_once(
    built: Make, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines that take their weights as inputs share one copy of them."""
    monkeypatch.setattr(engine_weights, "CHUNK", 100_000)  # most go in several parts
    folder = built("interval", weights="inputs")
    with lvlm.load(folder) as cpu:
        expected = cpu.generate(PROMPTS, IMAGES, max_new_tokens=6)
    with lvlm.load(folder, device="tensorrt-rtx") as model:
        (engines,) = EngineSet.find(folder, "tensorrt-rtx")
        weights = {(w.offset, w.bytes) for g in engines.graphs.values() for w in g.weights}
        size = sum(bytes_ for _, bytes_ in weights)
        uploaded = sum(event[1] for event in driver.events if event[0] == "upload")
        assert uploaded == size
        assert size <= sum(block.nbytes for block in driver.blocks.values()) < 1.02 * size
        assert not driver.pinned  # the way there is free again
        ours = model.generate(PROMPTS, IMAGES, max_new_tokens=6)
        assert [g.token_ids for g in ours] == [g.token_ids for g in expected]
        taken: dict[str, set[int]] = {}
        for event in driver.events:
            if event[0] == "run":
                for name, address in event[2].items():
                    taken.setdefault(name, set()).add(address)
        shared = [name for name in taken if "layers.0" in name or "embed" in name]
        assert len(shared) > 3
        assert all(len(taken[name]) == 1 for name in shared)


# bf16 and shapes, on one small engine

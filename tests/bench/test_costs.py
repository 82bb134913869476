"""lvlm-bench --costs and lvlm-fleet, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from settings import LIGHTVLM

from lvlm.bench.bench_cli import main
from lvlm.bench.costs import read_costs
from lvlm.bench.fleet.fleet_cli import main as fleet_main
from lvlm.bench.machine import check_copies, cores
from lvlm.core.errors import ParameterError

SMALL = ("--repeats", 1, "--warmup", 0, "--new-tokens", 4, "--slots", 2, "--threads", 1)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


@pytest.fixture
def simulated(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, fleet_main)


@pytest.fixture(scope="module")
def full(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", max_images=2)


def test_measured_costs_are_simulated(
    run: Run,
    simulated: Run,
    full: Path,
    bundle: Callable[..., Path],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """In a normal run one bundle: every copy is a process that loads one."""
    contenders = {full: True}  # folder -> whether it is read in chunks
    if pytestconfig.getoption("--whole"):
        contenders[bundle("digits-llava", *LIGHTVLM, max_images=2)] = False
    data, copies = tmp_path / "costs.json", min(2, cores())
    lengths = ("--prompt-tokens", "24,60", "--copies", copies)
    code, out, err = run(*contenders, "--costs", *lengths, *SMALL, "--json", data)
    assert code == 0, err
    assert "| an image | " in out
    assert "| a step of 2, 170 tokens each | " in out
    found = json.loads(data.read_text())
    assert found["machine"]["threads"] == found["plan"]["threads"] == 1
    for name, chunked in ((folder.name, chunked) for folder, chunked in contenders.items()):
        measured = read_costs(data, name)
        assert measured.engine.chunked == measured.engine.shares == chunked
        assert (measured.engine.slots, measured.engine.image_tokens) == (2, 144)
        assert measured.engine.kept_images > 100
        assert measured.copies == copies
        for costs in filter(None, (measured.alone, measured.beside)):
            sizes = {(r.tokens + r.behind, r.images) for r in costs.reads}
            assert {(24, 0), (60, 0), (168, 1), (204, 1)} <= sizes
            assert any(r.behind > 100 for r in costs.reads) == chunked  # a beginning that is known
            assert {(s.rows, s.tokens) for s in costs.steps} == {
                (rows, tokens) for rows in (1, 2) for tokens in (170, 206)
            }
            assert costs.image is not None
        row = next(r for r in found["results"] if r["contender"] == name)
        assert row["peak_bytes"] > row["facts"]["engine_memory"]["weights"] > 0
        load = ("--rate", 5, "--requests", 50, "--new-tokens", "2-8")
        asked = (data, "--contender", name, *load)
        code, out, err = simulated(*asked, "--target-ttft-p95", 60)
        assert (code, err) == (0, "")
        assert "\n1 replica holds the target.\n" in out
        one = simulated(*asked, "--replicas", 2, "--json")
        assert one == simulated(*asked, "--replicas", 2, "--json")
        (outcome,) = json.loads(one[1])["outcomes"]
        assert (outcome["requests"], outcome["refused"]) == (50, 0)


def costs(**changes: object) -> dict[str, Any]:
    """A file of one contender."""
    of = {
        "reads": [{"tokens": 100, "behind": 0, "images": 1, "seconds": 1.0}],
        "steps": [{"rows": 1, "tokens": 100, "seconds": 0.1}],
        "image": 0.1,
        "prepare": 0.01,
    }
    engine = {"slots": 1, "threads": 1, "chunked": False, "shares": False}
    engine |= {"image_tokens": 68, "kept_images": 9}
    row = {"contender": "a", "engine": engine, "copies": 1, "alone": of, "beside": None}
    return {"results": [row | changes]}


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """COSTS of mistakes, and traces beside it."""
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(costs()))
    (tmp_path / "two.json").write_text(
        json.dumps({"results": [*costs()["results"], *costs(contender="b")["results"]]})
    )
    (tmp_path / "none.json").write_text('{"results": [{"contender": "a", "figures": null}]}')
    (tmp_path / "list.json").write_text("[1]")
    zero = costs()["results"][0]["alone"] | {"steps": [{"rows": 1, "tokens": 1, "seconds": 0}]}
    (tmp_path / "zero.json").write_text(json.dumps(costs(alone=zero)))
    (tmp_path / "odd.json").write_text(json.dumps(costs(copies="many")))
    line = '{"seconds": 1.0, "text_tokens": 32, "new_tokens": 4, "images": 1, "image": "x"}\n'
    (tmp_path / "good.jsonl").write_text(line * 3)
    (tmp_path / "early.jsonl").write_text(line + line.replace("1.0", "0.5"))
    (tmp_path / "word.jsonl").write_text(line + "word\n")
    (tmp_path / "negative.jsonl").write_text(line.replace("1.0", "-1"))
    (tmp_path / "zero.jsonl").write_text(line.replace("32", "0"))
    (tmp_path / "more.jsonl").write_text(line.replace('"image"', '"picture"'))
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path


RATE = ("--rate", "1", "--replicas", "1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: COSTS"),
        (("nowhere.json", *RATE), "No such file"),
        (("none.json", *RATE), "write it with lvlm-bench --costs --json FILE"),
        (("list.json", *RATE), "has no costs"),
        (("zero.json", *RATE), "are no times of an engine"),
        (("odd.json", *RATE), "costs.copies"),
        (("two.json", *RATE), "several contenders; give one: a, b"),
        (("costs.json", "--contender", "c", *RATE), "has no contender 'c'"),
        (("costs.json", "--replicas", "1"), "either --rate or --trace"),
        (("costs.json", "--rate", "1"), "give either --replicas"),
        (("costs.json", *RATE, "--target-e2e-p95", "1"), "give either --replicas"),
        (("costs.json", "--rate", "0", "--replicas", "1"), "--rate is 0.0; give one above 0"),
        (("costs.json", "--rate", "nan", "--replicas", "1"), "--rate is nan"),
        (("costs.json", *RATE, "--queue", "0"), "--queue is 0; give 1 to"),
        (("costs.json", *RATE, "--seed", "-1"), "--seed is -1; give 0 to"),
        (("costs.json", *RATE, "--requests", "9999999"), "--requests is 9999999"),
        (("costs.json", *RATE, "--prompt-tokens", "9-3"), "write a number, or two as 16-128"),
        (("costs.json", *RATE, "--new-tokens", "few"), "--new-tokens few"),
        (
            ("costs.json", *RATE, "--images", "0", "--distinct-images", "3"),
            "--distinct-images has no effect",
        ),
        (("costs.json", *RATE, "--images", "2"), "measure them with --images 2"),
        (("costs.json", *RATE, "--slots", "3", "--requests", "99"), "measure them with --slots 2"),
        (("costs.json", *RATE, "--per-machine", "2"), "measure them with --copies 2"),
        (("costs.json", *RATE, "--route", "luck"), "invalid choice: 'luck'"),
        (("costs.json", "--trace", "good.jsonl", *RATE), "either --rate or --trace"),
        (
            ("costs.json", "--trace", "good.jsonl", "--seed", "1", "--replicas", "1"),
            "--seed has no effect beside --trace",
        ),
        *(
            (("costs.json", "--trace", f"{name}.jsonl", "--replicas", "1"), message)
            for name, message in (
                ("gone", "No such file"),
                ("early", "line 2 comes before the line above it"),
                ("word", "line 2 is no JSON object"),
                ("negative", "give seconds from 0 on"),
                ("zero", "give from 1 to 1,000,000 tokens"),
                ("more", "line 1: "),
                ("empty", "has no requests"),
            )
        ),
    ],
)
def test_mistakes(simulated: Run, given: Path, argv: tuple[str, ...], message: str) -> None:
    code, out, err = simulated(*(given / a if a.endswith((".json", ".jsonl")) else a for a in argv))
    assert (code, out) == (2, "")
    assert err.startswith("lvlm-fleet: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_trace_and_a_target_that_nothing_holds(simulated: Run, given: Path) -> None:
    asked = (given / "costs.json", "--trace", given / "good.jsonl")
    code, out, err = simulated(*asked, "--target-ttft-p95", 0.1, "--max-replicas", 3)
    assert (code, err) == (1, "\nNot even 3 replicas hold the target.\n")
    assert [line.split()[1] for line in out.splitlines()[2:]] == ["1", "2", "3"]
    code, out, _ = simulated(*asked, "--target-e2e-p95", 2, "--max-replicas", 5)
    assert code == 0
    assert out.endswith("\n3 replicas hold the target.\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--copies", 2), "--copies has no effect without --costs"),
        (("--costs", "--rate", 1), "--costs times the parts of an engine; leave --rate out"),
        (("--costs", "--against", "transformers"), "leave --against out"),
        (("--costs", "--new-tokens", 3), "--new-tokens is 3; for --costs give 4 or more"),
        (("--costs", "--copies", 99), "this machine has"),
        (("--costs", "--prompt-tokens", 9000), "export with --max-text-len 9064"),
        (("--costs", "--images", 9), "export with --max-images 9"),
    ],
)
def test_mistakes_with_costs(run: Run, full: Path, argv: tuple[object, ...], message: str) -> None:
    code, out, err = run(full, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("lvlm-bench: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_copies_have_cores_of_their_own() -> None:
    assert check_copies(1, None) == cores()
    assert check_copies(1, 99) == 99
    with pytest.raises(ParameterError, match="give fewer"):
        check_copies(2, cores())

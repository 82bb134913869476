"""Command lines: any flags of any command, with values that fit and such that do not."""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from campaign.case import COMMANDS, Base, Case

WEIGHT = 40
WARM = ("lvlm.runtime.model", *COMMANDS.values(), "lvlm.export.export_plan", "lvlm.export.listings")
VALUES = (
    *("0", "1", "-1", "2", "300", str(2**32 + 1), "1e3", "0.5", "nan", "inf", "-0.0", "x", ""),
    *("9" * 5000, "1.5", "a,b", "0.2,0.5", ",", "a=b", "keep=0.5", "=", "é", "\udcff", "a b"),
    *("--", "-", "cpu", "gpu", "cuda", "openvino", "none", "lightvlm", "fp16", "int8", "fp32"),
    *("digits", "86", "1..4", "4..1", "true", "None", "../..", "/nowhere/x", "/proc/x", "."),
    *("prefixkv", "uniform", "ppl", "llava", "owner/name", "x" * 300, "trt-rtx", "4GB"),
)
TEXTS = ("What is it?", "-5+3?", "", "<image>", "\n", "-", "--stats", "é", "x" * 5000)


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    program = rng.choice((*COMMANDS, "lvlm-run", "lvlm-run", "lvlm-export", "lvlm-eval"))
    known = list(_flags(program))
    argv: list[str] = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
        argv += _flag(rng, known, folder, base)
    places = {
        "lvlm": (rng.choice(("run", "doctor", "bake", "--version", "-h", "", "export")),),
        "lvlm-run": (str(base.bundle), rng.choice(TEXTS)),
        "lvlm-doctor": (str(base.bundle),),
        "lvlm-build": (rng.choice(("engine", "plugins", "x")), str(base.bundle)),
        "lvlm-eval": (str(base.bundle),),
        "lvlm-bench": (str(base.bundle.parent),),
        "lvlm-fleet": (str(folder / "costs.json"), "--rate", "3", "--replicas", "1"),
        "lvlm-tune": (str(base.bundle), "--ttft", "1ms"),
        "lvlm-export": ("-m", rng.choice((str(base.checkpoint), "tiny-llava", "x", "a/b"))),
        "lvlm-calibrate": ("-m", rng.choice(("x", "a/b", str(folder)))),
    }[program]
    if rng.random() < 0.85:
        argv = [*places, *argv]
    if program == "lvlm-run" and rng.random() < 0.5:
        argv += ["--image", str(rng.choice(base.images))]
    if program in ("lvlm-export", "lvlm-build"):  # work is what kills are for
        argv.append("--dry-run")
    if program in ("lvlm-eval", "lvlm-tune"):  # neither -m nor a long run
        argv = [a for a in argv if a not in ("-m", "--model", "--data", "--recipes")]
        argv += ["--data", str(_data(folder, base)), "-q"]
    return Case(program, tuple(a for a in argv if "\0" not in a))


def _data(folder: Path, base: Base) -> Path:
    import json

    path = folder / "data.jsonl"
    image = str(base.images[0])
    path.write_text(json.dumps({"image": image, "prompt": "Read.", "answer": "7"}) + "\n")
    return path


def _flag(rng: random.Random, known: list[argparse.Action], folder: Path, base: Base) -> list[str]:
    if not known or rng.random() < 0.1:
        return [rng.choice(("--nope", "-z", "--imag", "--", "--temp", "—image", "--=", "---"))]
    action = rng.choice(known)
    name = rng.choice(action.option_strings or ["--x"])
    if action.nargs == 0 and rng.random() < 0.9:
        return [name]
    value = rng.choice(VALUES)
    if action.choices and rng.random() < 0.7:
        value = str(rng.choice(list(action.choices)))
    if "output" in name or name == "-o" or "show-merge" in name or "cache" in name:
        value = str(folder / "out" / rng.choice(("x", "x.json", "x.png", "a/b", "y" * 300)))
    if "image" in name and rng.random() < 0.5:
        value = str(rng.choice(base.images))
    return [f"{name}={value}"] if rng.random() < 0.3 else [name, value]


_known: dict[str, list[argparse.Action]] = {}


def _flags(program: str) -> Iterator[argparse.Action]:
    """Of the command and its subcommands, asked of its own parser."""
    if program not in _known:
        _known[program] = list(_actions(program))
    yield from _known[program]


def _actions(program: str) -> Iterator[argparse.Action]:
    if program == "lvlm":
        return
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise SystemExit

    from importlib import import_module

    from lvlm.core.console import Parser

    with mock.patch.object(Parser, "parse_args", stop), contextlib.suppress(SystemExit):
        import_module(COMMANDS[program]).main([])
    for parser in found:
        yield from _below(parser)


def _below(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _below(inner)
        elif action.option_strings:
            yield action

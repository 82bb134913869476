"""Arguments of ``lvlm-bench``, and what is known to be wrong with them before anything is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lvlm.core.console import Parser, add_verify
from lvlm.core.discovery import names
from lvlm.core.installing import install

T = TypeVar("T")
PEERS = "lvlm.bench.peers"
REPEATS = 5
REQUESTS = 16
DURATION = 30.0
LENGTHS = (32,)  # text tokens of prompts
COST_LENGTHS = (32, 128, 512)  # those that fit
COST_REPEATS = 3
MIN_STEPS = 4  # new tokens, for the time of a step
COST_SLOTS = 4  # as lvlm-serve's
SLOTS = 16  # most requests at a time where they arrive by themselves
REPORT_TOKENS = (608, 2000, 4000)  # of prompts, images' too; those that fit
REPORT_CLIENTS = (1, 4, 16, 32)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-bench",
        description="Measure time to first token, time between tokens, throughput and memory. Each "
        "contender runs in a process of its own, all with as many threads; rounds go in turn. "
        "Answers always have the full number of tokens.",
        epilog="examples: lvlm-bench none/ lightvlm/:keep=0.35 --against transformers · "
        "lvlm-bench none/ --concurrency 1,4,16 --requests 48 · lvlm-bench none/ --rate 0.5,2 "
        "--duration 30",
    )
    add = parser.add_argument
    add(
        "bundles",
        nargs="*",
        metavar="BUNDLE",
        help="folders made by lvlm-export, with settings after colons: "
        "FOLDER:keep=0.35:kv-keep=0.2:device=cpu",
    )
    add("--keep", metavar="R", help="fraction of image tokens to keep, where a bundle merges them")
    add("--kv-keep", metavar="G", help="fraction of the cache to keep, where a bundle shortens it")
    add("--device", default="cpu", help="what bundles run on (default cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads of each (default: all cores)")
    add_verify(add)
    work = parser.add_argument_group("work")
    add = work.add_argument
    add(
        "--prompt-tokens",
        type=_list(int),
        metavar="N,…",
        help="text tokens of a prompt, template included; a table for each (default 32; with "
        "--costs 32,128,512, as far as they fit)",
    )
    add("--images", type=int, default=1, metavar="N", help="images per prompt (default 1)")
    add("--new-tokens", type=int, default=64, metavar="N", help="of every answer (default 64)")
    add(
        "--concurrency",
        type=_list(int),
        default=[],
        metavar="N,…",
        help="so many clients, each asking when it has its answer; a table for each",
    )
    add("--requests", type=int, metavar="N", help=f"of these clients together (default {REQUESTS})")
    add(
        "--rate",
        type=_list(float),
        default=[],
        metavar="R,…",
        help="requests per second that arrive at random (Poisson); a table for each",
    )
    add("--duration", type=float, metavar="S", help=f"seconds of arrivals (default {DURATION:.0f})")
    add(
        "--memory-budget",
        metavar="SIZE",
        help="slots of bundles under load: as many as fit, as 2GB (instead of --slots)",
    )
    add(
        "--slots",
        type=int,
        metavar="N",
        help="most requests answered at a time (default: the most clients; with --rate "
        f"{SLOTS}, with --costs {COST_SLOTS})",
    )
    add("--warmup", type=int, default=1, metavar="N", help="rounds that do not count (default 1)")
    add(
        "--repeats",
        type=int,
        metavar="N",
        help=f"rounds (default {REPEATS}; under load 1, of --costs {COST_REPEATS})",
    )
    add("--seed", type=int, default=0, metavar="N", help="of prompts, images and arrivals")
    add(
        "--apart",
        action="store_true",
        help="contenders one after another, each loaded alone, where memory cannot hold them all",
    )
    add(
        "--report",
        action="store_true",
        help="one request at a time, of 608, 2,000 and 4,000 tokens as far as they fit, and 1, 4, "
        "16 and 32 clients, in one run: all contenders in each table, and ratios to the best of "
        "the other runtimes",
    )
    parts = parser.add_argument_group("parts of an engine, for lvlm-fleet")
    add = parts.add_argument
    add(
        "--costs",
        action="store_true",
        help="time an image, reading of prompts, and decode steps of 1, 2, 4 … --slots requests",
    )
    add(
        "--copies",
        type=int,
        default=1,
        metavar="N",
        help="then the same while N engines run at once, each on --threads cores of its own",
    )
    others = parser.add_argument_group("other runtimes, on the same weights")
    add = others.add_argument
    peers = [name.replace("_", "-") for name in names(PEERS)]
    add(
        "--against",
        action="append",
        default=[],
        metavar="PEER",
        help=f"{', '.join(peers)}; settings after colons, as openvino-genai:f32:int4; repeatable",
    )
    add("--checkpoint", type=Path, metavar="FOLDER", help="what the bundles were exported from")
    add("--cache", type=Path, metavar="DIR", help="where converted checkpoints are kept")
    add(
        "--converter-python",
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help="interpreter of another environment that has the peer's converter",
    )
    results = parser.add_argument_group("results")
    add = results.add_argument
    add("--json", type=Path, metavar="FILE", help="everything, with every token's time")
    add("--plot", type=Path, metavar="FILE", help="a plot, .png or .svg")
    add("-q", "--quiet", action="store_true", help="no progress, no table")
    return parser


def _list(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        try:
            return list(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a list like 1,4,16") from None

    return parse


def check_arguments(args: argparse.Namespace) -> None:
    """Raise for mistakes that are known before anything is read."""
    from importlib.util import find_spec

    from lvlm.core.errors import ParameterError
    from lvlm.core.output import check_place

    if not args.bundles:
        raise ParameterError(
            "what to measure? give a bundle made by lvlm-export (beside peers, too: its tokenizer "
            "makes the prompts)"
        )
    minimum = {"new_tokens": 1, "prompt_tokens": 1, "images": 0, "threads": 1, "slots": 1}
    minimum |= {"concurrency": 1, "requests": 1, "repeats": 1, "warmup": 0, "seed": 0, "copies": 1}
    for name, low in minimum.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < low:
                raise ParameterError(f"--{name.replace('_', '-')} is {value}; give {low} or more")
    for value in [*args.rate, *([] if args.duration is None else [args.duration])]:
        if not 0 < value < float("inf"):
            raise ParameterError(f"--rate and --duration must be above 0, not {value:g}")
    if args.concurrency and args.rate:
        raise ParameterError("--concurrency and --rate are two kinds of load; run one at a time")
    if args.memory_budget is not None:
        from lvlm.runtime.engine.memory_plan import byte_size

        byte_size("--memory-budget", args.memory_budget)
        if args.slots is not None or not (args.concurrency or args.rate):
            raise ParameterError(
                "--memory-budget decides how many slots there are under load: give --concurrency "
                "or --rate, and no --slots"
            )
    if args.report:
        _check_report(args)
    if args.costs:
        _check_costs(args)
    elif args.copies > 1:
        raise ParameterError("--copies has no effect without --costs; add it")
    for name, wants in (("requests", "concurrency"), ("duration", "rate")):
        if getattr(args, name) is not None and not getattr(args, wants) and not args.report:
            raise ParameterError(f"--{name} has no effect without --{wants}; add it")
    for name in ("checkpoint", "cache", "converter_python"):
        if getattr(args, name) and not args.against:
            raise ParameterError(f"--{name.replace('_', '-')} is for --against; leave it out")
    for pair in args.converter_python:
        if "=" not in pair:
            raise ParameterError(f"--converter-python {pair}: write PEER=PYTHON")
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".svg"):
            raise ParameterError(f"--plot {args.plot}: name a file ending in .png or .svg")
        if find_spec("matplotlib") is None:
            raise ParameterError(f"--plot needs matplotlib; {install('bench')}")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None:
            check_place(f"--{name}", path, ParameterError)
    if args.quiet and args.json is None and args.plot is None:
        raise ParameterError("-q prints no table; add --json FILE or --plot FILE")


def _check_report(args: argparse.Namespace) -> None:
    """Raise for what a report has no table of."""
    from lvlm.core.errors import ParameterError

    for name in ("rate", "duration", "memory_budget", "costs", "plot"):
        if getattr(args, name):
            raise ParameterError(
                f"--report has lone requests and clients; leave --{name.replace('_', '-')} out"
            )
    if args.requests == 1:
        raise ParameterError("--requests is 1; for the clients of --report give 2 or more")


def _check_costs(args: argparse.Namespace) -> None:
    """Raise for what has no effect on costs."""
    from lvlm.core.errors import ParameterError

    for name in ("concurrency", "rate", "memory_budget", "against", "apart", "plot"):
        if getattr(args, name):
            raise ParameterError(
                f"--costs times the parts of an engine; leave --{name.replace('_', '-')} out"
            )
    if args.new_tokens < MIN_STEPS:
        raise ParameterError(
            f"--new-tokens is {args.new_tokens}; for --costs give {MIN_STEPS} or more"
        )

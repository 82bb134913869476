"""Arguments of ``lvlm-tune``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lvlm.calibration.evaluate.eval_arguments import (
    MAX_NEW_TOKENS,
    add_data,
    add_export,
    add_set,
    fractions,
    names,
)
from lvlm.core.console import Parser

RECIPES = ("divprune", "visionzip", "hybrid", "lightvlm", "snapkv")
KEEPS = (0.5, 0.33, 0.2, 0.11)
KV_KEEPS = (0.5, 0.2)
METRICS = ("accuracy", "rouge")


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(
        prog="lvlm-tune",
        description="Choose a recipe for a model, samples and limits: many candidates on few "
        "samples, the best of them on all, beside their speed under load. A run that was cut short "
        "goes on where it stopped.",
        epilog="example: lvlm-tune -m tiny-llava --data digits --max-loss 1% --concurrency 4 "
        "-o tuned/",
    )
    add = made.add_argument
    add("bundles", nargs="*", type=Path, metavar="BUNDLE", help="candidates that are exported")
    add("-m", "--model", help="alias, local folder or hub id; its candidates are exported")
    add("-o", "--output", type=Path, metavar="FOLDER", help="where the results go")
    add("-q", "--quiet", action="store_true", help="no progress, no table")
    add = made.add_argument_group("limits, one at least").add_argument
    add("--memory", metavar="SIZE", help="of weights, caches and workspace: 4GB")
    add("--ttft", metavar="TIME", help="to the first token, median: 300ms")
    add(
        "--max-loss",
        metavar="PART",
        help="of the full model's quality: 1%%; the fastest within it is chosen (default: that of "
        "least loss)",
    )
    add = made.add_argument_group("load").add_argument
    add("--concurrency", type=int, default=1, metavar="N", help="requests at a time (default 1)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="text of each (default 32)")
    add("--new-tokens", type=int, default=64, metavar="N", help="of each answer (default 64)")
    add = made.add_argument_group("samples").add_argument
    add_data(add)
    add(
        "--metric",
        choices=METRICS,
        default=METRICS[0],
        help="quality: answers that are exact, or likeness to the full model's (default accuracy)",
    )
    add("--max-new-tokens", type=int, metavar="N", help=f"of answers (default {MAX_NEW_TOKENS})")
    add("--batch", type=int, default=1, metavar="N", help="prompts at a time (default 1)")
    add = made.add_argument_group("candidates").add_argument
    add(
        "--recipes",
        type=names,
        default=[],
        metavar="A,B",
        help="those that shorten images are tried alone and with those that compress the cache "
        f"(interval: lightvlm's own way); default {','.join(RECIPES)}",
    )
    add_set(add)
    add("--keep", type=fractions, default=[], metavar="R,…", help=_default("image tokens", KEEPS))
    add("--kv-keep", type=fractions, default=[], metavar="R,…", help=_default("cache", KV_KEEPS))
    add = made.add_argument_group("what they run on, and how they are exported").add_argument
    add("--device", default="cpu", help="what to run on (default cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add_export(add)
    return made


def _default(what: str, values: tuple[float, ...]) -> str:
    return f"fractions of the {what} (default {','.join(map(str, values))})"

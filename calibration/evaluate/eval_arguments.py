"""Arguments of ``lvlm-eval``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lvlm.core.console import Parser, add_verify

METRICS = "ppl,rouge,accuracy"
MAX_NEW_TOKENS = 256
MAX_TEXT_LEN = 2048


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(
        prog="lvlm-eval",
        description="Measure the quality of bundles on a data set, beside the cache and the time "
        "they take. A run that was cut short goes on where it stopped.",
        epilog="example: lvlm-eval -m tiny-llava --recipes none,lightvlm --data digits "
        "--samples 20 --keep 0.3,0.5 -o results/",
    )
    add = made.add_argument
    add("bundles", nargs="*", type=Path, metavar="BUNDLE", help="folders made by lvlm-export")
    add("-o", "--output", type=Path, metavar="FOLDER", help="where the results go")
    add_data(add)
    add(
        "--keep",
        type=fractions,
        default=[],
        metavar="R,…",
        help="fractions of the cache left after prefill, a row for each; where tokens are merged, "
        "by merging alone (default: as exported)",
    )
    add(
        "--kv-keep",
        type=fractions,
        default=[],
        metavar="R,…",
        help="rows of bundles that merge tokens and compress the cache: the latter alone",
    )
    add("--metrics", type=names, metavar="A,B", help=f"default {METRICS}")
    add("--max-new-tokens", type=int, metavar="N", help=f"of answers (default {MAX_NEW_TOKENS})")
    add("--reference", type=Path, metavar="BUNDLE", help="full-cache bundle that rouge compares to")
    add("--system", metavar="TEXT", help="system message")
    add("--batch", type=int, default=1, metavar="N", help="prompts at a time (default 1)")
    add("--device", default="cpu", help="what to run on (default cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the backend's choice)")
    add_verify(add)
    add("--no-timings", action="store_true", help="leave times out of the results")
    add("-q", "--quiet", action="store_true", help="no progress, no table")
    make = made.add_argument_group("bundles to make, kept below the output folder")
    add = make.add_argument
    add("-m", "--model", help="alias, local folder or hub id")
    add("--recipes", type=names, default=[], metavar="A,B", help="a bundle for each")
    add_set(add)
    add_export(add)
    return made


def add_set(add: Callable[..., object]) -> None:
    """The flag with recipes' parameters."""
    add(
        "--set",
        action="append",
        metavar="[RECIPE.]NAME=VALUE",
        help="a parameter of one recipe, or of all that have it; lvlm-export --help-recipe lists "
        "them",
    )


def add_data(add: Callable[..., object]) -> None:
    """The flags that say which samples."""
    add("--data", metavar="NAME|FILE", help="built-in data set, or a file")
    add("--format", metavar="NAME", help="the file's layout, where its suffix does not tell")
    add("--list-data", action="store_true", help="list what --data and --format take")
    add("--images", type=Path, metavar="FOLDER", help="where the file's image paths start from")
    add("--kinds", type=names, default=[], metavar="A,B", help="kinds of questions (digits)")
    add("--samples", type=int, metavar="N", help="the first N (default: all; digits: 120)")


def add_export(add: Callable[..., object]) -> None:
    """The flags that say how bundles are exported."""
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default: the checkpoint's own")
    add("--revision", help="of the hub repository: branch, tag or commit")
    add(
        "--max-text-len",
        type=int,
        metavar="N",
        help=f"text tokens of prompt and answer together (default {MAX_TEXT_LEN})",
    )
    add("--no-validate", action="store_true", help="do not compare with the checkpoint")


def names(text: str) -> list[str]:
    """a,b as a list without repetitions."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"'{text}' has an empty name; write a,b")
    return list(dict.fromkeys(found))


def fractions(text: str) -> list[float]:
    """0.2,0.5 as a list without repetitions."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list like 0.2,0.5") from None
    for value in values:
        if not 0 < value <= 1:  # NaN fails every comparison
            raise argparse.ArgumentTypeError(f"{value} is not above 0 and up to 1")
    return list(dict.fromkeys(values))

"""Cost of compression for ``tiny-llava``: exact answers, ROUGE-L and perplexity by how much is left
and how dense an image is, for token reductions, cache policies and both together.

    python scripts/eval_reductions.py --work /tmp/reductions
    python scripts/eval_reductions.py --work /tmp/reductions --rows divprune snapkv --questions 42

Questions are of seven kinds about held-out images of three densities, in turn; the same ones for
every row. Of reductions ``left`` is the mean over the blocks of the image tokens that enter them,
of those of the whole image: about what prefill computes. The cache is what is left of the
prompt's entries after prefill. Bundles are exported once, below --work; every answer is on disk
there as soon as its batch is done, and the same command goes on from there, with more questions,
too. Writes results.md and results.png there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from cost_tables.rows import KEPT, LEFT, ROWS, TOTAL, USUAL, Cell, TableRow, cells
from cost_tables.tables import MeasuredCell, tables
from cost_tables.tables_plot import draw

from lvlm.calibration.datasets import digits
from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.datasets.scenes.questions import KINDS
from lvlm.calibration.evaluate.evaluation import evaluate, pending, plan_jobs
from lvlm.calibration.evaluate.recipe_bundles import make, order
from lvlm.calibration.evaluate.records import RecordStore, Run, SampleRecord
from lvlm.calibration.evaluate.variant_runner import Conditions
from lvlm.calibration.evaluate.variants import Bundle, Variant
from lvlm.core.progress import Progress, duration
from lvlm.export.packages import set_logging
from lvlm.export.recipes.recipe import known_recipe, parse_settings
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.kv.image_tokens import keep_ratios, tokens_per_layer

ASKED = tuple(kind for kind in KINDS if kind not in ("pictures", "turns"))
BATCH = len(ASKED)
NEW_TOKENS = 160  # the longest answer has 132
RUNS: tuple[Run, ...] = ("greedy", "forced")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=126, help="of each cell, all densities")
    parser.add_argument("--left", nargs="*", type=float, default=LEFT, help="image tokens")
    parser.add_argument("--kept", nargs="*", type=float, default=KEPT, help="cache entries")
    parser.add_argument("--total", nargs="*", type=float, default=TOTAL, help="cache, with both")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(USUAL))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    set_logging(False)
    asked = questions(args.questions)
    wanted = list(cells(args.rows, args.left, args.kept, args.total))
    progress = Progress(0)
    bundles = made({cell.row: None for cell in wanted}, args.work / "bundles", progress)
    how = Conditions(BATCH, NEW_TOKENS, threads=args.threads)
    found = measured(wanted, bundles, asked, how, args.work, progress)
    text = tables(found, asked)
    (args.work / "results.md").write_text(text)
    draw(args.work / "results.png", found, asked)
    print(text)


def questions(count: int) -> list[EvaluationSample]:
    """About held-out images; more of them begin with the fewer."""
    return [
        EvaluationSample(
            f"{n}-{asked.kind}-{asked.scenes[0].density}",
            (asked.scenes[0].image,),
            asked.question,
            asked.answer,
            f"question {n}",
        )
        for n, asked in enumerate(digits.samples("heldout", count, seed=17, kinds=ASKED), 1)
    ]


def made(rows: dict[TableRow, None], folder: Path, progress: Progress) -> dict[TableRow, Bundle]:
    """A bundle for each, exported where it is not there yet; equal recipes share one."""
    recipes = {
        (row.recipe, row.settings): parse_settings(known_recipe(row.recipe), row.settings)
        for row in rows
    }
    orders = order(
        list(recipes.values()),
        folder,
        model="tiny-llava",
        dtype="fp32",
        revision=None,
        max_text_len=512,
        max_images=1,
        validate=False,
    )
    progress.stages += sum(not wanted.is_there for wanted in orders)
    bundles = dict(zip(recipes, make(orders, progress), strict=True))
    return {row: bundles[row.recipe, row.settings] for row in rows}


def measured(
    wanted: Sequence[Cell],
    bundles: dict[TableRow, Bundle],
    asked: Sequence[EvaluationSample],
    how: Conditions,
    work: Path,
    progress: Progress,
) -> list[MeasuredCell]:
    """The cells' answers, computed where they are not on disk."""
    variants = [variant(cell, bundles[cell.row]) for cell in wanted]
    pairs = [(v, run) for v in by_bundle(variants) for run in RUNS]
    jobs = plan_jobs(pairs, asked, how)
    store = RecordStore(work / "records.jsonl", SampleRecord)
    progress.stages += len(pending(jobs, how, store))
    for job, steps in groupby(evaluate(jobs, asked, how, store), key=lambda step: step.job):
        with progress.stage(f"{job.variant.name}, {job.run}") as stage:
            for step in steps:
                if step.seconds_left is not None:
                    left = duration(step.seconds_left)
                    stage.show(f"{step.done} of {len(asked)}, about {left} left for all")
    records = {
        (id(job.variant), job.run): [r for key in job.keys if (r := store.get(key)) is not None]
        for job in jobs
    }
    return [
        MeasuredCell(cell, entering(v), *(records.get((id(v), run), []) for run in RUNS))
        for cell, v in zip(wanted, variants, strict=True)
    ]


def by_bundle(variants: Sequence[Variant | None]) -> Iterator[Variant]:
    """Those that can be run, the ones of a bundle one after another, so that it is loaded once."""
    some = [v for v in variants if v is not None]
    first = {v.bundle.digest: n for n, v in reversed(list(enumerate(some)))}
    yield from sorted(some, key=lambda v: first[v.bundle.digest])


def variant(cell: Cell, bundle: Bundle) -> Variant | None:
    """The variant to run for a cell; None where even no image token at all would leave more."""
    keep = None
    if cell.left is not None:
        keep = keep_for(bundle.manifest, cell.left)
        if keep is None:
            return None
    kept = cell.kept
    if kept is None and bundle.manifest.cache_policy is not None:
        kept = 1.0
    return Variant(bundle, f"{cell.name} {cell.left} {cell.kept}", keep=keep, kv_keep=kept)


def keep_for(manifest: Manifest, left: float) -> float | None:
    """The ``keep`` by which that part of the image tokens enters the blocks, on average; None where
    even none at all would leave more."""
    low, high = 1e-6, 1.0
    if share(manifest, low) > left:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(manifest, middle) <= left else (low, middle)
    return low


def share(manifest: Manifest, keep: float | None) -> float:
    """The fraction of an image's tokens that enters the blocks, on average."""
    tokens, layers = manifest.images.tokens, manifest.text.layers
    ratios = keep_ratios(manifest.shortenings, manifest.keep, keep)
    counts = tokens_per_layer(manifest.shortenings, ratios, tokens, layers)
    return sum(counts) / layers / tokens


def entering(variant: Variant | None) -> float | None:
    return None if variant is None else share(variant.bundle.manifest, variant.keep)


if __name__ == "__main__":
    main()

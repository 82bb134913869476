"""Generated inputs and kills against every command; none may end in a traceback, hang, or damage.

    export PYTHONPATH=tests
    python -m campaign                        # 300 inputs, 10 kills
    python -m campaign --inputs 10000 --kills 200 --write docs/notes/campaign.md
    python -m campaign --case manifests:17    # one again; its files are kept

Needs Linux, and what the tests need. Nothing outside a temporary folder is written, but for files
of failing inputs (--keep).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from campaign import children, kills, report
from campaign.case import Base

ROOT = Path(__file__).resolve().parents[2]
# In this order: what imports torch comes last, forked processes of less are quicker to make
GENERATORS = (
    *("manifests", "graphs", "weights", "images", "prompts", "templates"),
    *("datasets", "checkpoints", "commands"),
)
BATCH = 50  # inputs of one process


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    work = Path(tempfile.mkdtemp(prefix="lvlm-campaign-"))
    began = time.monotonic()
    tally = report.Tally()
    try:
        base = _base(work, args.bundle)
        if args.share is not None:
            for result in _results(args, base, work):
                _keep(result, work, args.keep)
                os.write(args.pipe, json.dumps(vars(result)).encode() + b"\n")
            return 0
        for result in _shared(args) if args.jobs > 1 else _results(args, base, work):
            tally.add(result)
            if args.verbose:
                print(
                    f"{result.generator}:{result.number} {result.status} {result.message[-200:]!r}"
                )
            if result.faults:
                print(report.line(result), flush=True)
                _keep(result, work, args.keep)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.monotonic() - began
    print(tally.table())
    print(f"{seconds:.0f} s")
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(_page(args, tally, seconds))
    return 1 if tally.bad.total() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--inputs", type=int, default=300, help="all generators together (300)")
    add("--kills", type=int, default=10, help="(10)")
    add("--seed", type=int, default=1)
    add("--only", type=lambda text: text.split(","), help="these generators: images,prompts")
    add("--jobs", type=int, default=1, help="processes at a time (1)")
    add("--share", type=int, help=argparse.SUPPRESS)
    add("--pipe", type=int, help=argparse.SUPPRESS)
    add("--case", metavar="GENERATOR:N", help="this input alone; its files are kept")
    add("--bundle", type=Path, help="a whole bundle (default: a small one of the tests)")
    add("--keep", type=Path, metavar="FOLDER", help="where files of failing inputs go")
    add("--verbose", action="store_true", help="what every input ended with")
    add("--write", type=Path, metavar="FILE.md", help="the table, as a page")
    return parser


def _results(args: argparse.Namespace, base: Base, work: Path) -> Iterator[children.Result]:
    modules = {name: _generator(name) for name in GENERATORS}
    if args.case:
        name, _, number = args.case.partition(":")
        yield from _run(name, modules[name], [int(number)], args.seed, base, work)
        return
    parts = sum(module.WEIGHT for module in modules.values())
    for name, module in modules.items():
        if args.only and name not in args.only:
            continue
        numbers = range(-(-args.inputs * module.WEIGHT // parts))
        for start in range((args.share or 0) * BATCH, len(numbers), BATCH * args.jobs):
            yield from _run(name, module, numbers[start : start + BATCH], args.seed, base, work)
    if args.kills and not (args.only and "kills" not in args.only):
        _warm(kills)
        yield from kills.kills(args.kills, args.seed, base, work, args.share or 0, args.jobs)


def _shared(args: argparse.Namespace) -> Iterator[children.Result]:
    """The results of as many processes of this command."""
    reader, writer = os.pipe()
    given = [a for a in sys.argv[1:] if a != "--verbose"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "campaign", *given, "--share", str(i), "--pipe", str(writer)],
            pass_fds=[writer],
        )
        for i in range(args.jobs)
    ]
    os.close(writer)
    with os.fdopen(reader) as lines:
        for text in lines:
            found = json.loads(text)
            yield children.Result(**{**found, "faults": tuple(found["faults"])})
    for process in started:
        if process.wait():
            raise RuntimeError(f"a process of the campaign ended with {process.returncode}")


def _generator(name: str) -> ModuleType:
    return importlib.import_module(f"campaign.gen_{name}")


def _run(
    name: str, module: ModuleType, numbers: Sequence[int], seed: int, base: Base, work: Path
) -> Iterator[children.Result]:
    _warm(module)
    yield from children.run(name, module, numbers, seed, base, work)


def _warm(module: ModuleType) -> None:
    for name in module.WARM:
        importlib.import_module(name)


def _base(work: Path, bundle: Path | None) -> Base:
    assets = ROOT / "tests/assets"
    if bundle is None:
        with zipfile.ZipFile(ROOT / "tests/data/bundles/schema-3.zip") as archive:
            archive.extractall(work / "base")
        bundle = work / "base/s3"
        path = bundle / "lvlm.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 4}))
    images = tuple(sorted((assets / "samples").glob("*.png")))
    return Base(bundle.resolve(), assets / "digits-llava", images)


def _keep(result: children.Result, work: Path, keep: Path | None) -> None:
    folder = work / f"{result.generator.replace('s of ', 's-')}-{result.number}"
    if not result.faults:
        return
    if keep is not None and folder.is_dir():
        shutil.copytree(
            *(folder, keep / folder.name), symlinks=True, dirs_exist_ok=True, ignore=_no_pipes
        )


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_fifo()]


def _page(args: argparse.Namespace, tally: report.Tally, seconds: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    command = f"PYTHONPATH=tests python -m campaign --inputs {args.inputs} --kills {args.kills}"
    return "\n".join(
        [
            "# The campaign: generated inputs and kills",
            "",
            "Written by the command below; do not edit. An input is bad if a command ends in a",
            "traceback or by a signal, takes over 30 s or 4 GB, exits with another status than 0,",
            "2, 130 or 143, refuses without a cause or in over 3 lines, leaves files, leaves",
            "half an output, or accepts a bundle whose bytes are not those that its manifest",
            "lists. Others than exit 0 are refusals, and for kills the signal's",
            "status. Kills come in series on one output; an end is the run after a series. What",
            "takes over 30 s is run once more, and that counts: others used the same cores.",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}, {os.cpu_count()} CPU cores, Python "
            f"{sys.version.split()[0]}: `{command} --seed {args.seed}`, {seconds:,.0f} s.",
            "",
            tally.table(),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

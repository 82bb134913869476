"""Check of the plugins' kernels on this GPU against the ops' torch references, and their speed.

usage: scripts/gpu_check.sh [--tensorrt-root FOLDER] [-o FILE] [--dry-run] …

Builds the plugin library and its harness; runs every op on every sample in fp32, fp16 and bf16,
outside and inside of a CUDA graph; runs the samples again under compute-sanitizer, if that is
installed; measures calls as large as real models make them; writes tables into docs/notes/gpu.md,
each line when it is known, so that a run that is cut off leaves what it had. --parts chooses.
Needs torch, triton, onnx, numpy and setuptools, a C++ compiler and cmake; of TensorRT the headers.
A machine without a network takes a library built elsewhere: --make FOLDER there, --build FOLDER.
--dry-run does the same without a GPU, up to the launches; a stand-in for the driver notes them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from gpu_cases import LENGTHS
from gpu_compare import FAILED, OPS, converted, difference, ran, run_calls
from gpu_times import timings

from lvlm.core.progress import Progress
from lvlm.plugins_trt.plugins import library_build
from lvlm.plugins_trt.plugins.library_harness import Harness, read_outputs
from lvlm.plugins_trt.plugins.registry import plugins

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MARK = "<!-- from here on written by scripts/gpu_check.sh -->\n\n"
PARTS = ("samples", "times", "sanitizer")
TOOLS = ("memcheck", "racecheck", "initcheck")


def main() -> int:
    args = _arguments()
    if args.make is not None:
        _build(args, args.make, args.make)
        return 0
    with tempfile.TemporaryDirectory() as name, _page(args) as say:
        for line in _lines(args, Path(name)):
            say(line)
        for line in FAILED:
            say(f"Failed: {line}")
    return 1 if FAILED else 0


@contextmanager
def _page(args: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """A writer of the page's lines: they are printed and, but for a dry run, in the file at
    once."""
    with ExitStack() as stack:
        file = None
        if not args.dry_run:
            before = args.output.read_text(encoding="utf-8") if args.output.exists() else ""
            file = stack.enter_context(args.output.open("w", encoding="utf-8"))
            file.write(before.partition(MARK)[0] + MARK)

        def say(line: str) -> None:
            print(line, flush=True)
            if file is not None:
                file.write(line + "\n")
                file.flush()

        yield say


def _lines(args: argparse.Namespace, work: Path) -> Iterator[str]:
    harness = _harness(args, work)
    environment = _fake_driver(work, args.arch) if args.dry_run else {}
    yield from _title(args)
    if "samples" in args.parts:
        yield from _samples(harness, work, environment, args)
    if "times" in args.parts:
        yield from timings(
            harness, work, environment, args.ops, args.longest, args.repeats, dry_run=args.dry_run
        )
    if "sanitizer" in args.parts:
        yield from _sanitizer(harness, work, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--dry-run", action="store_true", help="no GPU: up to the launches")
    add("--arch", type=int, help="compute capability (default: this GPU's; without one, 87)")
    add("--tensorrt-root", type=Path, help="folder with include/ (default: fetched)")
    add("--build", type=Path, help="folder with a library and harness that are built already")
    add("--make", type=Path, metavar="FOLDER", help="only build library and harness, into FOLDER")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the page")
    add("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="of compute-sanitizer")
    add("--dtypes", default="fp32,fp16,bf16", help="of the samples")
    add("--ops", default=",".join(sorted(plugins())), help="which ones")
    add("--longest", type=int, default=LENGTHS[-1], help="positions of the longest measured call")
    add("--repeats", type=int, default=20, help="runs of a measured call, nine times")
    add("--jobs", type=int, default=os.cpu_count() or 1)
    add("-o", "--output", type=Path, default=ROOT / "docs/notes/gpu.md")
    args = parser.parse_args()
    without = args.dry_run or args.make is not None
    if not without and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run goes up to the launches without one")
    if args.arch is None:
        major, minor = (8, 7) if without else torch.cuda.get_device_capability()
        args.arch = 10 * major + minor
    args.dtypes, args.ops = args.dtypes.split(","), args.ops.split(",")
    return args


def _harness(args: argparse.Namespace, work: Path) -> Harness:
    folder = args.build
    if folder is None:
        folder = work / "library"
        _build(args, folder, work)
    return Harness(folder / library_build.LIBRARY, folder / library_build.HARNESS)


def _build(args: argparse.Namespace, folder: Path, work: Path) -> None:
    """Library and harness into ``folder``."""
    root = args.tensorrt_root
    if root is None:
        root = work / "headers"
        subprocess.run(
            ["bash", str(ROOT / "scripts/fetch_tensorrt_headers.sh"), str(root)],
            check=True,
            env=os.environ | {"PYTHON": sys.executable},
        )
    headers = library_build.Headers(root)
    chosen = [plugins()[name] for name in args.ops]
    library_build.build_library(
        chosen, [args.arch], folder, headers=headers, jobs=args.jobs,
        progress=Progress(library_build.STAGES),
    )  # fmt: skip
    library_build.run_cmake(
        folder / "source", folder / "build", library_build.HARNESS, headers, args.jobs
    )
    shutil.copy(folder / "build" / library_build.HARNESS, folder)


def _fake_driver(work: Path, arch: int) -> dict[str, str]:
    include = library_build.triton_headers()
    assert include is not None, "Triton comes without CUDA's headers"
    subprocess.run(
        [
            *("c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-isystem", str(include / "include")),
            *(str(library_build.SHELL / "test/fake_cuda.cpp"), "-o", str(work / "libcuda.so.1")),
        ],
        check=True,
    )
    launches = str(work / "launches")
    return {"LD_LIBRARY_PATH": str(work), "FAKE_CUDA_SM": str(arch), "FAKE_CUDA_LOG": launches}


def _title(args: argparse.Namespace) -> Iterator[str]:
    yield "## Kernels"
    yield ""
    if args.dry_run:
        yield "**Dry run: nothing ran on a GPU.** Calls went up to the launch."
    else:
        properties = torch.cuda.get_device_properties(0)
        import triton

        yield (
            f"{datetime.now(UTC):%Y-%m-%d}{_commit()}: `scripts/gpu_check.sh` on {properties.name} "
            f"(sm_{args.arch}, {properties.total_memory / 1e9:.0f} GB), CUDA {torch.version.cuda}, "
            f"torch {torch.__version__}, triton {triton.__version__}."
        )
    yield ""


def _commit() -> str:
    """The commit of the checkout; a copy of the files without git has none."""
    if shutil.which("git") is None:
        return ""
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return "" if said.returncode else f", commit {said.stdout.strip()}"


def _samples(
    harness: Harness, work: Path, environment: Mapping[str, str], args: argparse.Namespace
) -> Iterator[str]:
    """Every op on its samples, against the reference."""
    yield "### Results"
    yield ""
    yield "Largest difference from the op's torch reference over all samples (relative above 1),"
    yield "beside what the op's contract allows; integers are equal. In a CUDA graph, with aliased"
    yield "outputs in place, the bits are the same."
    yield ""
    yield "| op | type | samples | difference | allowed |"
    yield "| --- | --- | --- | --- | --- |"
    for name in args.ops:
        for dtype in args.dtypes:
            chosen = list(converted(plugins()[name], DTYPES[dtype]))
            reports = run_calls(harness, work, plugins()[name], chosen, environment)
            largest = 0.0
            for sample, report in zip(chosen, reports, strict=True):
                what = f"{name} {dtype} {sample.name}"
                if not ran(report, what) or args.dry_run:
                    continue
                largest = max(largest, difference(what, name, sample, read_outputs(report)))
            allowed = OPS[name].tolerance[DTYPES[dtype]]
            if largest > allowed:
                FAILED.append(f"{name} {dtype}: {largest:.2g} is more than {allowed:.2g}")
            found = "not run" if args.dry_run else f"{largest:.1e}"
            yield f"| {name} | {dtype} | {len(chosen)} | {found} | {allowed:.0e} |"
    yield ""


def _sanitizer(harness: Harness, work: Path, args: argparse.Namespace) -> Iterator[str]:
    """The samples in half precision under compute-sanitizer."""
    yield "### compute-sanitizer"
    yield ""
    program = shutil.which("compute-sanitizer")
    if program is None or args.dry_run:
        yield "Not run: " + ("it is not installed." if program is None else "there is no GPU.")
        yield ""
        return
    yield "| op | " + " | ".join(args.tools) + " |"
    yield "| --- |" + " --- |" * len(args.tools)
    for name in args.ops:
        results = []
        for tool in args.tools:
            prefix = (program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "1")
            checked = Harness(harness.library, harness.program, prefix)
            before = len(FAILED)
            chosen = list(converted(plugins()[name], torch.float16))
            run_calls(checked, work, plugins()[name], chosen, {}, raw_memory=tool == "initcheck")
            results.append("errors" if len(FAILED) > before else "clean")
        yield f"| {name} | " + " | ".join(results) + " |"
    yield ""


if __name__ == "__main__":
    sys.exit(main())

"""Kills at random times of export, build, calibrate and eval, and what is left of them.

A few kills hit one output folder, then the same command runs to its end: it must succeed, and
nothing of the killed ones may be left. After SIGTERM and SIGINT nothing may be left at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from campaign.case import Base, Case, random_of
from campaign.children import Result, open_streams
from campaign.judge import SECONDS, TRACES, leftovers

WARM = (
    *("lvlm.export.exporter", "lvlm.export.export_cli", "lvlm.calibration.profile.measure"),
    *("lvlm.calibration.evaluate.study", "lvlm.plugins_trt.engines.engine_builder", "onnxscript"),
)
SERIES = 10  # kills before the command may finish
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: 137}
# Of ten series: an export takes far longer than the others
KINDS = ("eval", "calibrate", "build", "eval", "calibrate", "build", "eval", "calibrate", "export")


def command(kind: str, folder: Path, base: Base) -> Case:
    """The command, its output in ``folder/out``."""
    out = folder / "out"
    image = str(base.images[0])
    data = folder / "data.jsonl"
    lines = [{"image": image, "prompt": f"Read {i}.", "answer": "7"} for i in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags: tuple[str, ...]
    match kind:
        case "eval":
            flags = (
                "--metrics",
                "ppl,accuracy",
                "--max-new-tokens",
                "8",
                "-q",
                "-o",
                str(out / "results"),
            )
            return Case("lvlm-eval", (str(base.bundle), "--data", str(data), *flags))
        case "calibrate":
            flags = ("--data", str(data), "-q", "-o", str(out / "profile.json"))
            return Case("lvlm-calibrate", ("-m", str(base.checkpoint), *flags))
        case "build":
            bundle = out / "bundle"
            if not bundle.exists():
                shutil.copytree(base.bundle, bundle)
            target = ("--target", "openvino", "-q")
            return Case("lvlm-build", ("engine", str(bundle), *target), output=bundle)
        case _:
            flags = ("--no-validate", "-q", "-o", str(out / "bundle"))
            argv = ("-m", str(base.checkpoint), *flags)
            return Case("lvlm-export", argv, output=out / "bundle")


def kills(
    count: int, seed: int, base: Base, work: Path, share: int, shares: int
) -> Iterator[Result]:
    """One result per kill, and one per series: the run that was let finish."""
    lasts: dict[str, float] = {}
    for start in range(share * SERIES, count, shares * SERIES):
        kind = KINDS[start // SERIES % len(KINDS)]
        folder = work / f"kills-{start}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        if kind not in lasts:
            case = command(kind, folder, base)
            status, lasts[kind], said = _run(case, folder, None, 0)
            if status:
                raise RuntimeError(f"{case} fails without a kill: {said}")
            shutil.rmtree(folder)
            (folder / "out").mkdir(parents=True)
        bad = False
        for number in range(start, min(start + SERIES, count)):
            rng = random_of(seed, "kills", number)
            result = _kill(kind, number, rng, lasts[kind], folder, base)
            if "hang" in result.faults:  # a second time, as inputs
                rng = random_of(seed, "kills", number)
                result = _kill(kind, number, rng, lasts[kind], folder, base)
            bad |= bool(result.faults)
            yield result
        _unfinished(kind, folder)
        case = command(kind, folder, base)
        status, seconds, said = _run(case, folder, None, 0)
        found = [f"status {status} at the end"] if status else []
        found += leftovers(case, folder)
        yield Result(f"ends of {kind}", start, str(case), tuple(found), status, said, seconds, 0)
        if not bad and not found:
            shutil.rmtree(folder, ignore_errors=True)


def _kill(
    kind: str, number: int, rng: random.Random, lasts: float, folder: Path, base: Base
) -> Result:
    _unfinished(kind, folder)
    case = command(kind, folder, base)
    before = leftovers(case, folder)  # of a SIGKILL: gone once a command gets to its output
    sent = rng.choice(SIGNALS)
    delay = rng.random() * (rng.choice((0.05, lasts, lasts, lasts)))
    status, seconds, said = _run(case, folder, sent, delay)
    found = []
    if status not in (0, STATUS[sent]):
        found.append(f"status {status}")
    if any(trace in said for trace in TRACES):
        found.append("traceback")
    if seconds - delay > SECONDS and status != 0:
        found.append("hang")
    if sent != signal.SIGKILL:
        found += [fault for fault in leftovers(case, folder) if fault not in before]
    described = f"{sent.name} after {delay:.2f} s: {case}"
    return Result(f"kills of {kind}", number, described, tuple(found), status, said, seconds, 0)


def _unfinished(kind: str, folder: Path) -> None:
    """Takes away what a run completed: it would be refused, or there would be nothing to do."""
    out = folder / "out"
    if kind == "export" or (kind == "build" and list(out.glob("bundle/*openvino*"))):
        shutil.rmtree(out / "bundle", ignore_errors=True)
    if kind == "calibrate":
        for name in ("profile.json", "profile.png"):
            (out / name).unlink(missing_ok=True)


def _run(
    case: Case, folder: Path, sent: signal.Signals | None, delay: float
) -> tuple[int, float, str]:
    """Status (as shells say it), seconds and standard error of a process that gets a signal."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        _child(case, folder, writer)
    os.close(writer)
    os.read(reader, 1)  # what Python itself does after a fork swallows a signal
    os.close(reader)
    began = time.monotonic()
    limit = None if sent is None else began + delay
    while True:
        ended, code = os.waitpid(process, os.WNOHANG)
        now = time.monotonic()
        if ended:
            break
        if sent is not None and limit is not None and now >= limit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, sent)
            limit = None
        if now - began > 600 or (sent is not None and now - began > delay + 2 * SECONDS):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return 124, now - began, _said(folder)
        time.sleep(0.005)
    status = os.waitstatus_to_exitcode(code)
    return (128 - status if status < 0 else status), time.monotonic() - began, _said(folder)


def _said(folder: Path) -> str:
    path = folder / "stderr"
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def _child(case: Case, folder: Path, writer: int) -> None:
    """What the installed command does, in this process."""
    status = 1
    try:
        os.close(writer)
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        open_streams()
        status = case.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        status = 130  # before or after the command itself, where its own start answers
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError, KeyboardInterrupt):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

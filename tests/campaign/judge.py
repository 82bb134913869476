"""What no command may do, whatever it is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from campaign.case import MESSAGE_LINES, Case

SECONDS = 30
MEMORY = 4 << 30
STATUSES = (0, 2, 130, 143)
TRACES = ("Traceback (most recent call last)", "panicked at", "Fatal Python error")


@dataclass(frozen=True)
class Outcome:
    """What was seen of one run; ``peak``: bytes resident."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    peak: int


def faults(case: Case, outcome: Outcome, folder: Path) -> list[str]:
    """What is wrong with it; [] for nothing."""
    found = []
    text = outcome.stdout + outcome.stderr
    if any(trace in text for trace in TRACES):
        found.append("traceback")
    if outcome.status not in STATUSES:
        found.append(f"status {outcome.status}")
    if outcome.seconds > SECONDS:
        found.append("hang")
    if outcome.peak > MEMORY or "not enough memory" in text:
        found.append("memory")
    if outcome.status == 2:
        lines = [line for line in outcome.stderr.splitlines() if line.strip()]
        if not any("error:" in line for line in lines) and not _diagnosed(case, outcome):
            found.append("refused without a cause")
        if len(lines) > MESSAGE_LINES:
            found.append(f"{len(lines)} lines")
    if case.refused and outcome.status == 0:
        found.append("damage accepted")
    return found + leftovers(case, folder)


def _diagnosed(case: Case, outcome: Outcome) -> bool:
    """lvlm-doctor's causes are its output."""
    says = ("✗ ", '"broken": true')
    doctor = case.program == "lvlm-doctor" or case.argv[:1] == ("doctor",)
    return doctor and any(cause in outcome.stdout for cause in says)


def leftovers(case: Case, folder: Path) -> list[str]:
    """What lies beside the output, and an output that is half there."""
    found = []
    out = folder / "out"
    allowed = case.output.name if case.output else None
    hidden = [p.name for p in out.rglob(".*")] if out.is_dir() else []
    if hidden:
        found.append(f"left {hidden[0]}")
    if allowed and out.is_dir():
        found += [f"left {p.name}" for p in out.iterdir() if p.name != allowed and p.name[0] != "."]
    if case.output and case.output.exists():
        found += incomplete(case.output)
    return found


def incomplete(bundle: Path) -> list[str]:
    """A bundle with a file that is missing, unlisted or not as its manifest says."""
    from lvlm.core.errors import LvlmError
    from lvlm.runtime.bundle.manifest import MANIFEST
    from lvlm.runtime.bundle.reader import read_bundle

    try:
        manifest = read_bundle(bundle, verify="full")
    except LvlmError as error:
        return [f"half-written: {error}"]
    here = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    extra = here - set(manifest.files) - {MANIFEST, "validation.json"}
    return [f"unlisted {name}" for name in sorted(extra)]

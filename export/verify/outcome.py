"""The outcome of a validation: its comparisons, and what was run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lvlm.core.errors import ValidationError, shown
from lvlm.export.verify.checks import Check, table
from lvlm.export.verify.graph_forms import GraphForm
from lvlm.runtime.tools.recorded_answers import RecordedAnswer

SOME = 8  # names in a line
NOT_RUN = "not run: "
AS_IT_IS = ", and as it is"


@dataclass
class ValidationOutcome:
    """The comparisons; ``files``: what was run of the bundle's graphs, by file, and of the rest why
    not; ``unlike``: added tokens that no prompt here has and on which the tokenizers differ;
    ``estimate``: how many tokens were compared and why; ``answers``: what the bundle says, for
    devices to compare with."""

    checks: list[Check] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    estimate: str = ""
    answers: list[RecordedAnswer] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def told(self) -> list[str]:
        """Other findings, a line each: notes, tokens, what was not run and why."""
        lines = list(self.notes)
        if self.unlike:
            lines.append(
                f"added tokens that transformers reads or shows otherwise: {some(self.unlike)}; no "
                "prompt compared here has them"
            )
        reasons: dict[str, list[str]] = {}
        for file, said in self.files.items():
            if NOT_RUN in said:
                reasons.setdefault(said.partition(NOT_RUN)[2], []).append(file)
        return lines + [f"{NOT_RUN}{', '.join(f)}: {reason}" for reason, f in reasons.items()]

    def check(self) -> None:
        """ValidationError, with the table, where a comparison failed."""
        failed = [check.name for check in self.checks if not check.passed]
        if not failed:
            return
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        error = ValidationError(
            f"the bundle does not compute what the checkpoint computes (✗ {failed[0]}{more})"
        )
        error.details = table(self.checks)
        raise error

    def ran(self, form: GraphForm, compacted: bool) -> None:
        """A form's files were run, or its reason says why not."""
        for graph, file in form.files.items():
            said = f"{NOT_RUN}{form.reason}" if form.reason else "run"
            if graph == "compact" and not compacted and not form.reason:
                said = f"loaded, {NOT_RUN}fewer tokens than an interval"
            elif form.how and not form.reason:
                said = f"run, {form.how}"
            self._note(file, said)

    def _note(self, file: str, said: str) -> None:
        before = self.files.get(file, "")
        more = max(before, said, key=len)
        if not before.startswith("run") or not said.startswith("run"):
            self.files[file] = before if before.startswith("run") else said
        elif "run" in (before, said) and not more.endswith(("run", AS_IT_IS)):
            self.files[file] = more + AS_IT_IS
        else:
            self.files[file] = more

    def add(self, other: ValidationOutcome) -> None:
        self.checks += other.checks
        self.notes += other.notes
        self.unlike += other.unlike
        for file, said in other.files.items():
            self._note(file, said)


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    return ", ".join(map(shown, names[:SOME])) + more

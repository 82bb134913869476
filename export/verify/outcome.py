"""What a validation found: its comparisons, and what was run."""

from __future__ import annotations

from dataclasses import dataclass, field

from lvlm.core.errors import ValidationError
from lvlm.export.verify.checks import Check, table
from lvlm.export.verify.forms import Form

AS_IT_IS = ", and as it is"


@dataclass
class Outcome:
    """The comparisons; ``files``: what was run of the bundle's graphs, by file, and of the rest why
    not; ``estimate``: how many tokens were compared and why."""

    checks: list[Check] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    estimate: str = ""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

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

    def ran(self, form: Form, compacted: bool) -> None:
        """A form's files were run, or its reason says why not."""
        for graph, file in form.files.items():
            said = f"not run: {form.reason}" if form.reason else "run"
            if graph == "compact" and not compacted and not form.reason:
                said = "loaded, not run: fewer tokens than an interval"
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

    def add(self, other: Outcome) -> None:
        self.checks += other.checks
        self.notes += other.notes
        for file, said in other.files.items():
            self._note(file, said)

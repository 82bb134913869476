"""What a campaign found: a line per failing input, and the table of docs/notes/campaign.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from campaign.children import Result


@dataclass
class Tally:
    """Counts by generator."""

    inputs: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    slowest: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    largest: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, result: Result) -> None:
        name = result.generator
        self.inputs[name] += 1
        self.answered[name] += result.status == 0
        self.bad[name] += bool(result.faults)
        self.slowest[name] = max(self.slowest[name], result.seconds)
        self.largest[name] = max(self.largest[name], result.peak)

    def table(self) -> str:
        lines = [
            "| generator | inputs | exit 0 | others | bad | slowest | most memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, count in self.inputs.items():
            memory = f"{self.largest[name] / 1e9:.1f} GB" if self.largest[name] else "not read"
            lines.append(
                f"| {name} | {count:,} | {self.answered[name]:,} | "
                f"{count - self.answered[name]:,} | {self.bad[name]} | "
                f"{self.slowest[name]:.1f} s | {memory} |"
            )
        total, answered = self.inputs.total(), self.answered.total()
        lines.append(
            f"| all | {total:,} | {answered:,} | {total - answered:,} | {self.bad.total()} | | |"
        )
        return "\n".join(lines)


def line(result: Result) -> str:
    """One failing input, on one line."""
    said = " ".join(result.message.split())[-300:]
    faults = "; ".join(result.faults)[:200]
    return f"BAD {result.generator}:{result.number} [{faults}] {result.case[:200]} — {said}"

"""Results of a search: the choice as a command, the table of candidates, JSON, the plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lvlm.calibration.evaluate.eval_report import write
from lvlm.calibration.evaluate.study import RESULTS
from lvlm.calibration.tune.candidates import Candidate
from lvlm.calibration.tune.search import Choice, Trial
from lvlm.core.progress import size

UNKNOWN = "–"  # noqa: RUF001 - a dash, as tables have it
HEAD = (
    *("candidate", "quality", "lost", "samples", "TTFT ms", "tokens/s", "memory"),
    *("prefill work", "decode work", ""),
)


def write_choice(
    output: Path, choice: Choice, command: str | None, settings: Mapping[str, Any], about: str
) -> str:
    """Write the three files; the table as text. Raises ResultsError."""
    from lvlm.calibration.tune.tune_plot import draw

    best = pareto(choice.trials)
    text = markdown(choice, command, best, about)
    data = {
        "settings": settings,
        "chosen": None if choice.chosen is None else choice.chosen.candidate.label,
        "command": command,
        "trials": [
            asdict(trial) | {"label": trial.candidate.label, "pareto": trial.candidate in best}
            for trial in choice.trials
        ],
    }
    write(output / RESULTS[0], json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    write(output / RESULTS[1], text)
    draw(output / RESULTS[2], choice, best)
    return text


def pareto(trials: Sequence[Trial]) -> list[Candidate]:
    """The candidates, of those measured on as many samples as any, that none is better than, by
    loss and tokens per second."""
    known = {
        t.candidate: (t.loss.samples, t.loss.part, -t.speed.tokens_per_s)
        for t in trials
        if t.loss and t.speed and t.speed.error is None
    }
    max_samples = max((samples for samples, *_ in known.values()), default=0)
    last = {one: figures for one, (samples, *figures) in known.items() if samples == max_samples}
    return [
        one
        for one, own in last.items()
        if not any(
            theirs != own and all(a <= b for a, b in zip(theirs, own, strict=True))
            for theirs in last.values()
        )
    ]


def markdown(choice: Choice, command: str | None, best: list[Candidate], about: str) -> str:
    """The choice, and all candidates: those that were measured longest first."""
    lines = [about, ""]
    if choice.chosen is not None and command is not None:
        lines += [f"Take {choice.chosen.candidate.label}:", "", f"    {command}", ""]
    lines += [_line(HEAD), _line(["---", *["--:"] * (len(HEAD) - 2), "---"])]
    ordered = sorted(choice.trials, key=lambda t: (-(t.loss.samples if t.loss else 0), _speed(t)))
    lines += [_line(_cells(trial, choice.chosen, best)) for trial in ordered]
    lines += [
        "",
        "- lost: of the full model's quality, ± what few samples leave open (95 %, one-sided).",
        "- memory: what an engine plans for all requests at a time, from the manifest; work: "
        "multiplications, as parts of the full model's. Both are predicted.",
        "- best: none of those on as many samples loses less and is as fast, or is faster and "
        "loses no more.",
    ]
    return "\n".join(lines) + "\n"


def _speed(trial: Trial) -> float:
    return -trial.speed.tokens_per_s if trial.speed else 0.0


def _cells(trial: Trial, chosen: Trial | None, best: list[Candidate]) -> list[str]:
    loss, speed, work = trial.loss, trial.speed, trial.prediction
    known = speed is not None and speed.error is None
    note = trial.out or ("best" if trial.candidate in best else "")
    if chosen is not None and trial.candidate == chosen.candidate:
        note = "**chosen**"
    return [
        trial.candidate.label,
        f"{loss.quality:.1%}" if loss else UNKNOWN,
        f"{loss.part:.1%} ± {loss.margin:.1%}" if loss else UNKNOWN,
        str(loss.samples) if loss else UNKNOWN,
        f"{speed.ttft_ms:.0f}" if known and speed else UNKNOWN,
        f"{speed.tokens_per_s:.1f}" if known and speed else UNKNOWN,
        size(work.memory) if work.memory else UNKNOWN,
        f"{work.prefill:.0%}" if work.memory else UNKNOWN,
        f"{work.decode:.0%}" if work.memory else UNKNOWN,
        note.replace("|", "\\|"),
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"

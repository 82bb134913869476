"""One JSON object a line: {"image": path or list of paths, "prompt": …, "answer": …}."""

from __future__ import annotations

from typing import ClassVar

from lvlm.calibration.datasets.evaluation_samples import (
    Dataset,
    EvaluationRequest,
    EvaluationSample,
)
from lvlm.calibration.datasets.files import DatasetEntry, first, parse, read_text


class JsonLinesDataset(Dataset):
    """Layout ``jsonl``: paths start from the file's folder; other keys are left alone."""

    name: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = 'file: one {"image", "prompt", "answer"} a line'
    suffix: ClassVar[str | None] = ".jsonl"

    def read(self, request: EvaluationRequest) -> list[EvaluationSample]:
        assert request.path is not None
        path, root = request.path, request.images or request.path.parent
        # Split at newlines only: JSON texts may hold other line separators.
        lines = enumerate(read_text(path).split("\n"), 1)
        entries = [
            DatasetEntry(str(number), parse(line, f"{path} line {number}"), f"{path} line {number}")
            for number, line in lines
            if line.strip()
        ]
        for entry in entries:
            for key in ("image", "prompt", "answer"):
                entry.get(key)
        return [
            EvaluationSample(
                e.id, e.images("image", root), e.text("prompt"), e.text("answer"), e.where
            )
            for e in first(entries, path, request)
        ]


DATASET = JsonLinesDataset()

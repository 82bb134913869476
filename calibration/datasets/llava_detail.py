"""Detailed descriptions of COCO images, from LLaVA's instruction data (arXiv 2304.08485)."""

from __future__ import annotations

from typing import ClassVar

from lvlm.calibration.datasets.evaluation_samples import (
    DataError,
    Dataset,
    EvaluationRequest,
    EvaluationSample,
)
from lvlm.calibration.datasets.files import DatasetEntry, first, parse, read_text


class LlavaDetail(Dataset):
    """Layout ``llava-detail``: a list of {"image", "conversations": [{"value"}, {"value"}, …]}, as
    in LLaVA's detail_23k.json and the detail_1k.json that PrefixKV measures on.

    The first turn is the question, with ``<image>`` in its place, the second the answer; of longer
    conversations the rest is left out. Paths start from the file's folder.
    """

    name: ClassVar[str] = "llava-detail"
    summary: ClassVar[str] = (
        "file: LLaVA's conversations, as detail_23k.json; the first pair of turns"
    )
    suffix: ClassVar[str | None] = ".json"

    def read(self, request: EvaluationRequest) -> list[EvaluationSample]:
        assert request.path is not None
        path, root = request.path, request.images or request.path.parent
        data = parse(read_text(path), str(path))
        if not isinstance(data, list):
            raise DataError(f"{path} is not a list of entries; is its --format llava-detail?")
        entries = [
            DatasetEntry(str(n), value, f"{path} entry {n}") for n, value in enumerate(data, 1)
        ]
        pairs = [_turns(entry) for entry in entries]
        for entry in entries:
            entry.text("image")
        return [
            EvaluationSample(entry.id, entry.images("image", root), question, answer, entry.where)
            for entry, (question, answer) in zip(first(entries, path, request), pairs, strict=False)
        ]


def _turns(entry: DatasetEntry) -> tuple[str, str]:
    """The texts of the first question and answer."""
    turns = entry.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise DataError(f"{entry.where}: 'conversations' needs a question and an answer")
    question, answer = (
        DatasetEntry(entry.id, turn, f"{entry.where}, turn {n}").text("value")
        for n, turn in enumerate(turns[:2], 1)
    )
    return question, answer


DATASET = LlavaDetail()

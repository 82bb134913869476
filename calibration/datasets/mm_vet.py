"""MM-Vet (arXiv 2308.02490): questions that need several abilities at once, with short answers."""

from __future__ import annotations

from typing import ClassVar

from lvlm.calibration.datasets.evaluation_samples import (
    PLACEHOLDER,
    DataError,
    Dataset,
    EvaluationRequest,
    EvaluationSample,
)
from lvlm.calibration.datasets.files import DatasetEntry, first, parse, read_text


class MMVet(Dataset):
    """Layout ``mm-vet``: the benchmark's object {id: {"imagename", "question", "answer"}}, or the
    list [{"image", "question", "answer"}] that the Elastic Cache and PrefixKV scripts read.

    Images are in ``images/`` beside the file. As in those scripts, the image follows the
    question, unless the question has a place for it.
    """

    name: ClassVar[str] = "mm-vet"
    summary: ClassVar[str] = (
        "file: MM-Vet's object keyed by id, or a list of image, question, answer"
    )
    suffix: ClassVar[str | None] = ".json"

    def read(self, request: EvaluationRequest) -> list[EvaluationSample]:
        assert request.path is not None
        path = request.path
        beside = path.parent / "images"
        root = request.images or (beside if beside.is_dir() else path.parent)
        data = parse(read_text(path), str(path))
        if isinstance(data, dict):
            key = "imagename"
            entries = [DatasetEntry(k, value, f"{path} entry {k}") for k, value in data.items()]
        elif isinstance(data, list):
            key = "image"
            entries = [DatasetEntry(str(n), v, f"{path} entry {n}") for n, v in enumerate(data, 1)]
        else:
            raise DataError(f"{path} is neither an object nor a list; is its --format mm-vet?")
        for entry in entries:
            for wanted in (key, "question", "answer"):
                entry.text(wanted)
        return [
            EvaluationSample(
                e.id, e.images(key, root), _prompt(e.text("question")), e.text("answer"), e.where
            )
            for e in first(entries, path, request)
        ]


def _prompt(question: str) -> str:
    return question if PLACEHOLDER in question else f"{question}\n{PLACEHOLDER}"


DATASET = MMVet()

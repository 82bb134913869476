"""Measuring a PrefixKV profile: the model reads samples, the importances decide the budgets.

The checkpoint's torch reference in fp32 does the reading, with the recipe's merging, so that a
layer is measured on the shortened sequence that it will cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ExportError, ParameterError
from lvlm.export.budgets.importance_recording import record_importances
from lvlm.export.budgets.prefix_profiles import (
    SCHEMA,
    DataId,
    LayerSpread,
    ModelId,
    PrefixProfile,
    RecipeId,
)
from lvlm.export.budgets.prefix_search import grid, mean_rows, search_fractions
from lvlm.export.reference.torch_reference import Reference
from lvlm.runtime.prompt.prompts import Prompt

TOOLS = ("lvlm-deploy", "torch", "transformers")


def calibrate(
    reference: Reference,
    model: ModelId,
    prompts: Iterable[Prompt],
    keep: float,
    *,
    work: Path | None = None,
    on_sample: Callable[[int, bool], None] | None = None,
) -> PrefixProfile:
    """The profile of the model that ``reference`` runs, from prompts read one at a time.

    ``work``: a file that remembers finished samples, so that a run that was cut short goes on from
    there; the caller removes it. ``on_sample`` gets the number of samples done, and whether the
    last one was remembered. Raises ParameterError for no prompts, a keep out of range or a model
    that computes no finite numbers; ExportError if ``work`` cannot be written.
    """
    keep = float(keep)
    keeps = grid(keep)
    recipe = RecipeId(reference.recipe.name, _plain(reference.recipe.parameters()))
    setup = digest(json.dumps([SCHEMA, model.sha256, recipe.name, recipe.parameters, keeps]))
    shape = len(keeps), len(reference.language.attending)
    finished = _Finished(work, setup, shape)
    fractions, hashes = [], []
    for prompt in prompts:
        sample = prompt_hash(prompt)
        reused = sample in finished.found
        if not reused:
            found = search_fractions(record_importances(reference, prompt), keeps)
            finished.add(sample, found)
        hashes.append(sample)
        fractions.append(finished.found[sample])
        if on_sample is not None:
            on_sample(len(hashes), reused)
    if not fractions:
        raise ParameterError("there are no samples to calibrate on; give at least one")
    measured = np.stack(fractions)
    asked = measured[:, keeps.index(keep)]
    return PrefixProfile(
        kind="prefixkv",
        schema=SCHEMA,
        keep=keep,
        rows=mean_rows(measured, keeps),
        spread=LayerSpread(
            tuple(asked.std(0).tolist()), tuple(tuple(row) for row in asked.tolist())
        ),
        layers=shape[1],
        model=model,
        data=DataId(digest(*hashes), len(hashes)),
        recipe=recipe,
        tools={name: metadata.version(name) for name in TOOLS},
    )


class _Finished:
    """Samples done so far, by hash: a file of one JSON line each, or nothing but memory."""

    def __init__(self, path: Path | None, setup: str, shape: tuple[int, int]) -> None:
        self.path, self.setup = path, setup
        self.found: dict[str, npt.NDArray[np.float64]] = {}
        text = path.read_text("utf-8", "replace") if path is not None and path.is_file() else ""
        self._before = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            # A line may be cut short by what ended the run, or be of another setup: left alone.
            try:
                data = json.loads(line)
                fractions = np.array(data["fractions"], np.float64)
                usable = data["setup"] == setup and fractions.shape == shape
            except (ValueError, TypeError, LookupError):
                continue
            if usable and ((fractions > 0) & (fractions <= 1)).all():
                self.found[str(data["sample"])] = fractions

    def add(self, sample: str, fractions: npt.NDArray[np.float64]) -> None:
        self.found[sample] = fractions
        if self.path is None:
            return
        line = {"setup": self.setup, "sample": sample, "fractions": fractions.tolist()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._before + json.dumps(line) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise ExportError(f"{self.path} cannot be written: {reason}") from None
        self._before = ""


def prompt_hash(prompt: Prompt) -> str:
    """Hash of what the model is given: tokens, places of images, images."""
    arrays = np.asarray(prompt.ids, np.int64), prompt.image_id
    parts = [part for x in arrays for part in (str(x.shape), x.tobytes())]
    return digest(*parts, *(image.digest() for image in prompt.images))


def digest(*parts: str | bytes) -> str:
    """sha256 of the parts, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(parameters))
    return plain

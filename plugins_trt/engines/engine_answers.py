"""Engines' answers on this machine, beside what was recorded when their bundle was exported."""

from __future__ import annotations

from pathlib import Path

from lvlm.core.errors import BuildError, ParameterError
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines.shape_profiles import EngineLimits
from lvlm.runtime.backends import devices
from lvlm.runtime.backends.trt.engines import TensorRtBackend
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.model import load
from lvlm.runtime.tools import recorded_answers
from lvlm.runtime.tools.recorded_answers import RecordedAnswer


def device_of(target: Target) -> str:
    """The device that runs a target's engines or lowered graphs."""
    names = (target.flavour, target.name, target.name.removeprefix("ort-"))
    return next(name for name in names if name in devices())


def check_limits(limits: EngineLimits, manifest: Manifest, answers: list[RecordedAnswer]) -> None:
    """Raises ParameterError for engines that could not be asked what was recorded, one prompt at a
    time, before anything is built."""
    if limits.batch.min > 1:
        raise ParameterError(
            f"--validate asks one prompt at a time, which --batch from {limits.batch.min} on does "
            "not take; begin it at 1, or leave --validate out"
        )
    longest = max(len(answer.ids) for answer in answers)
    # Where tokens are dropped before the language model, prompts are shorter than they are written
    if limits.max_prompt is not None and limits.max_prompt < longest and manifest.encoder is None:
        raise ParameterError(
            f"--validate asks a prompt of {longest} tokens: give --max-prompt as many, or leave "
            "--validate out"
        )


def check_answers(bundle: Path, device: str, built: Path | None = None) -> None:
    """Print a line for each recorded answer; ``built``: the engines that are meant.

    Raises BundleError where nothing was recorded, BackendError where the bundle does not load, and
    BuildError where what is answered is something else.
    """
    answers = recorded_answers.recorded_answers(bundle, read_bundle(bundle, "none"))
    with load(bundle, device=device) as model:
        what, mend = f"{bundle} on {device}", "export it again"
        backend = model.calls.graphs.backend
        if isinstance(backend, TensorRtBackend):
            folder = backend.engines_of(model.calls.graphs.folder, model.manifest).folder
            what, mend = str(folder), "build it with --weights embedded, or for another --target"
            if built is not None and folder.resolve() != built.resolve():
                raise BuildError(
                    f"device {device} takes {folder}, not {built}; remove what is not meant"
                )
        found = recorded_answers.compare(model, answers)
    print(f"{what}, beside what was recorded when the bundle was exported:")
    for comparison in found:
        print(f"  {comparison}")
    if not recorded_answers.agree(model.manifest, found):
        if all(comparison.passed or comparison.problem for comparison in found):
            problem = next(comparison.problem for comparison in found if comparison.problem)
            raise BuildError(f"{what} cannot be compared with what was recorded: {problem}")
        raise BuildError(
            f"{what} does not answer as the bundle did when it was exported; do not use it: {mend}"
        )

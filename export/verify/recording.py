"""Record of a bundle's answers about shipped images at export, for devices to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lvlm.export.verify import model_inputs
from lvlm.export.verify.graph_forms import Opened, canonical
from lvlm.export.verify.run import run_form
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.generate.call_plan import read_at
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.tools.recorded_answers import RecordedAnswer, highest


def record(
    folder: Path,
    manifest: Manifest,
    image: str,
    prompt: Prompt,
    tokens: Sequence[int],
    opened: Opened,
    *,
    template: bool,
) -> RecordedAnswer:
    """The answer of the canonical graphs, in fp32 over the stored weights, fed with ``tokens``.

    Args:
        image: the file of lvlm.assets that ``prompt`` shows; ``template``: it was written with the
            bundle's chat template.
        opened: sessions of the same folder.
    """
    form, read = canonical(manifest, widened=True), read_at(manifest, prompt, None)
    run = run_form(folder, form, manifest, read, tokens, opened)
    return RecordedAnswer(
        image,
        model_inputs.question(manifest.images.token, template=template),
        template,
        tuple(map(int, prompt.ids)),
        tuple(map(int, tokens)),
        tuple(map(highest, run.logits)),
    )

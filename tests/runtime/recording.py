"""A bundle's answers on the CPU, recorded as an export records them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import lvlm
from lvlm.runtime.tools.recorded_answers import RecordedAnswer, highest

IMAGE = "samples/digits-1.png"


def record(folder: Path) -> RecordedAnswer:
    """Four steps, fed with any tokens."""
    with lvlm.load(folder) as model:
        options = lvlm.GenerationOptions(max_new_tokens=5, chat_template=False)
        text = f"{model.manifest.images.token}\nHi"
        image = (resources.files("lvlm.assets") / IMAGE).read_bytes()
        prompt = model.prepare(0, text, [image], options)
        batch, steps = model.calls.start([prompt]), []
        for number in range(4):
            steps.append(highest(batch.logits[0]))
            if number < 3:
                batch.feed([9 + number])
    return RecordedAnswer(IMAGE, text, False, tuple(prompt.ids), (9, 10, 11, 12), tuple(steps))

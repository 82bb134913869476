"""What tests of Model ask."""

from __future__ import annotations

from typing import Any

from settings import ASSETS

from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

IMAGE = ASSETS / "samples/digits-1.png"
OTHER = ASSETS / "samples/digits-2.png"
QUESTION = "Describe the picture."
AS_IT_IS: dict[str, Any] = {"chat_template": False}


def text_of(model: Model, tokens: int, start: str = "") -> str:
    """A prompt of exactly so many text tokens, as it stands."""
    text = start
    images = [IMAGE] * start.count("<image>")
    for _ in range(4 * tokens):
        prompt = model.prepare(0, text or "7", images, GenerationOptions(chat_template=False))
        count = int((prompt.image_id == 0).sum())
        if count == tokens:
            return text
        text += "7"
    raise AssertionError(f"no prompt of {tokens} tokens")

"""InternVL's own repositories: the weights of the -hf ones, but code in place of the chat template
and of the image processor's settings."""

from __future__ import annotations

import re

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.checkpoint_form import Form, Source

# The end that the twin's name has on the hub, by version
ENDS = {"InternVL3": "-hf", "InternVL3_5": "-HF"}


class InternVLOriginal:
    """See Layout."""

    name = "internvl-original"

    def read(self, found: Source) -> Form | None:
        if found.config.get("model_type") != "internvl_chat":
            return None
        raise CheckpointError(
            f"{found.source} is in the layout of InternVL's own repositories, whose prompts and "
            f"images are made by code of theirs; take {_twin(found)}, the same weights for "
            "transformers"
        )


def _twin(found: Source) -> str:
    """The name on the hub of the checkpoint in transformers' layout."""
    for name in (found.source, str(found.config.get("_name_or_path", ""))):
        match = re.search(r"(InternVL[\d_]+)(-\d+B)(-Instruct)?/?$", name, re.ASCII)
        if match is not None and match[1] in ENDS:
            return f"OpenGVLab/{match[1]}{match[2]}{match[3] or ''}{ENDS[match[1]]}"
    return "its twin, whose name ends in -hf: OpenGVLab/InternVL3-8B-hf or alike"


LAYOUT = InternVLOriginal()

"""LLaVA's own repository: without the vision tower and the image token, so that renaming is not
enough."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.checkpoint_form import Form, Source


class LlavaOriginal:
    """See Layout."""

    name = "llava-original"

    def read(self, found: Source) -> Form | None:
        if "mm_vision_tower" not in found.config:
            return None
        raise CheckpointError(
            f"{found.source} is in the layout of LLaVA's own repository, which transformers does "
            f"not read; take {_converted(found.source, found.config)}, the same weights converted"
        )


def _converted(source: str, config: Mapping[str, Any]) -> str:
    """The name on the hub of the checkpoint in transformers' layout."""
    for name in (source, str(config.get("_name_or_path", ""))):
        found = re.search(r"llava-(v1\.[56])-([\w-]+?)/?$", name, re.ASCII)
        if found is not None:
            version = found[1].removeprefix("v") if found[1] == "v1.5" else found[1]
            return f"llava-hf/llava-{version}-{found[2]}-hf"
    return "its twin of llava-hf, llava-hf/llava-1.5-7b-hf or alike"


LAYOUT = LlavaOriginal()

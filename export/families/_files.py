"""Reading the small files beside a checkpoint's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlm.export.families._base import PromptFiles
from lvlm.runtime.errors import CheckpointError

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} if it is missing and not required."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}; is the checkpoint complete?")
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def prompt_files(folder: Path, text_config: Any) -> PromptFiles:
    """Chat template, special tokens and end-of-text ids, wherever a checkpoint keeps them."""
    tokenizer = read_json(folder / "tokenizer_config.json")
    template = tokenizer.get("chat_template")
    template = read_json(folder / "chat_template.json").get("chat_template", template)
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    specials = {}
    for name in SPECIAL:
        token = tokenizer.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            specials[name] = token
    eos = read_json(folder / "generation_config.json").get("eos_token_id")
    eos = getattr(text_config, "eos_token_id", None) if eos is None else eos  # Qwen3-VL: no default
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return PromptFiles(
        chat_template=template if isinstance(template, str) else None,
        special_tokens=specials,
        eos_ids=ids,
        files=tuple(name for name in COPIED if (folder / name).is_file()),
    )

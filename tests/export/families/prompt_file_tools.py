"""A checkpoint's small files, read and changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lvlm.export.families.family import PromptFiles
from lvlm.export.families.parts.side_files import prompt_files

SMALL = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"),
    *("generation_config.json", "processor_config.json"),
)


def read(folder: Path) -> PromptFiles:
    return prompt_files(folder, SimpleNamespace())


def edit(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    data |= values
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

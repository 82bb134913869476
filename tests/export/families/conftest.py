"""digits-llava's small files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from prompt_file_tools import SMALL
from settings import ASSETS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """digits-llava's files without its weights, to be changed."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    for name in SMALL:
        shutil.copyfile(ASSETS / "digits-llava" / name, made / name)
    return made

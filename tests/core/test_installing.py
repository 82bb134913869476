"""The command that messages give for what is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm.core import installing


def recorded(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return text

    monkeypatch.setattr(installing.metadata, "distribution", lambda _: Distribution())


def test_what_was_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = tmp_path / "my lvlm"
    checkout.mkdir()
    recorded(monkeypatch, json.dumps({"url": checkout.as_uri(), "dir_info": {}}))
    assert installing.install("cpu", "export") == f'pip install "{checkout}[cpu,export]"'
    checkout.rmdir()  # moved since
    assert installing.install("cpu") == 'pip install ".[cpu]" in a checkout of lvlm-deploy'


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"url": 3}', '{"url": "https://x/y.whl"}'])
def test_from_elsewhere(monkeypatch: pytest.MonkeyPatch, text: Any) -> None:
    recorded(monkeypatch, text)
    assert installing.install("cuda") == 'pip install ".[cuda]" in a checkout of lvlm-deploy'

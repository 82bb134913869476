"""What a running command shows of its stages."""

from __future__ import annotations

import io
import threading

import pytest

from lvlm.core import progress
from lvlm.core.progress import Progress


class Screen(io.StringIO):
    """Says when something new was written often enough."""

    def __init__(self, terminal: bool, wanted: int) -> None:
        super().__init__()
        self.terminal, self.wanted = terminal, wanted
        self.seen = threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.wanted -= " s" in text
        if self.wanted <= 0:
            self.seen.set()
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_shows_how_long_it_has_run(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being told to: tracing reports nothing in between."""
    monkeypatch.setattr(progress, "TICKS", (0.01, 0.01))
    screen = Screen(terminal, wanted=3)
    with Progress(2, stream=screen).stage("trace prefill") as stage:
        assert screen.seen.wait(60)
        stage.result = "9 nodes"
    text = screen.getvalue()
    assert text.count("[1/2] trace prefill  …  0.") >= 2
    assert text.endswith(" s\n")
    assert ("\033[K" in text) == terminal
    assert "9 nodes" in text.splitlines()[-1]


def test_a_stage_that_fails_ends_its_line() -> None:
    screen = Screen(True, wanted=0)
    with pytest.raises(ValueError, match="no"), Progress(1, stream=screen).stage("trace"):
        raise ValueError("no")
    assert screen.getvalue().endswith("…\n")


def test_quiet_is_silent() -> None:
    screen = Screen(True, wanted=0)
    with Progress(1, quiet=True, stream=screen).stage("trace") as stage:
        stage.add_bytes(1, 2)
    assert screen.getvalue() == ""

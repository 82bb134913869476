"""Text in lines that fit a terminal of 80 columns."""

from __future__ import annotations

import textwrap

WIDTH = 80


def wrapped(first: str, text: str) -> str:
    """``text`` after ``first``, in lines that are indented alike; a word is never cut."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * min(len(first), WIDTH // 2),
        break_long_words=False,
        break_on_hyphens=False,
    )

"""Lines for a terminal of 80 columns: indented alike, words whole."""

from __future__ import annotations

from lvlm.core.wrapping import WIDTH, wrapped

WORDS = [f"word{i}" for i in range(40)]


def test_lines_fit_and_lose_nothing() -> None:
    lines = wrapped("  --flag  ", " ".join(WORDS)).splitlines()
    assert lines[0].startswith("  --flag  word0 ")
    assert len(lines) > 2
    assert all(line.startswith(" " * 10) and line[10] != " " for line in lines[1:])
    assert max(map(len, lines)) <= WIDTH
    assert [word for line in lines for word in line.split()] == ["--flag", *WORDS]


def test_words_are_never_cut() -> None:
    path = "/a-long/" + "folder-" * 20
    assert path in wrapped("", f"see {path} there").splitlines()


def test_a_long_beginning_indents_by_half_of_a_line() -> None:
    _, *lines = wrapped("x" * 70 + " ", " ".join(WORDS)).splitlines()
    assert all(line.startswith(" " * (WIDTH // 2) + "word") for line in lines)

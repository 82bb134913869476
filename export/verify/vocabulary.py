"""The bundle's tokenizer against transformers' own: plain texts, and every token of the vocabulary.

What prompts and answers have must agree. Of other added tokens (reserved ones, say) a difference is
told by name: it shows only where somebody writes such a token, or the model chooses one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence, Set
from typing import TypeVar

from lvlm.core.errors import PromptError
from lvlm.export.verify.checks import Check
from lvlm.export.verify.judge import Judge
from lvlm.export.verify.outcome import ValidationOutcome, some
from lvlm.runtime.prompt.prompts import PromptMaker

TEXTS = (
    "Hello, world!",
    " two  spaces,\ta tab\nand a line",
    "Größe 12½ — naïve “quotes”",
    "東京 مرحبا привет 👩‍👧",
    "def f(x): return x**2  # code",
)
TOKENS_A_TEXT, AT_ONCE = 16, 64
T = TypeVar("T")


def compare(judge: Judge, maker: PromptMaker, used: Set[int]) -> ValidationOutcome:
    """``used``: ids of tokens on which both must agree, added or not, besides those of TEXTS."""
    outcome, count = ValidationOutcome(), len(judge.tokenizer)
    added = {str(token): number for token, number in judge.tokenizer.get_added_vocab().items()}
    used = used | {number for text in TEXTS for number in judge.encode(text, True)}
    kinds = {_kind(token) for token, number in added.items() if number in used}
    spared = {token for token in added if _kind(token) not in kinds}

    wrong = {text for text in TEXTS if not _encoded_alike(judge, maker, text)}
    wrong |= _apart(sorted(added), TOKENS_A_TEXT, lambda group: _around_alike(judge, maker, group))
    name = f"tokenizer: {len(TEXTS)} texts, {len(added)} added tokens"
    outcome.checks.append(_check(name, wrong - spared))

    numbers = _apart(range(count), AT_ONCE, lambda group: _tokens_alike(judge, maker, group))
    tokens = {str(judge.tokenizer.convert_ids_to_tokens(number)) for number in numbers}
    outcome.checks.append(_check(f"tokenizer: its {count} tokens", tokens - spared))
    outcome.unlike += sorted((wrong | tokens) & spared)
    return outcome


def _kind(token: str) -> str:
    """<row_3_col_4> is in use where <row_1_col_1> is: another image has it."""
    return re.sub(r"\d+", "0", token)


def _apart(items: Sequence[T], at_once: int, alike: Callable[[Sequence[T]], bool]) -> set[T]:
    """The items that are not alike; all of a group where only several together are not."""
    found: set[T] = set()
    for first in range(0, len(items), at_once):
        group = items[first : first + at_once]
        if alike(group):
            continue
        alone = {item for item in group if not alike([item])}
        found |= alone if alike([item for item in group if item not in alone]) else set(group)
    return found


def _encoded_alike(judge: Judge, maker: PromptMaker, text: str) -> bool:
    try:
        return all(
            maker.tokenizer.encode(text, special) == judge.encode(text, special)
            for special in (True, False)
        )
    except PromptError:
        return False


def _around_alike(judge: Judge, maker: PromptMaker, tokens: Sequence[str]) -> bool:
    """Added tokens with text around them."""
    return _encoded_alike(judge, maker, f"{' a'.join(tokens)} b {'c '.join(tokens)}")


def _tokens_alike(judge: Judge, maker: PromptMaker, numbers: Sequence[int]) -> bool:
    """Tokens' text in both tokenizers, and what these make of that text."""
    text = judge.decode(numbers)
    same = maker.tokenizer.decode(numbers) == text
    return same and maker.tokenizer.encode(text, False) == judge.encode(text, False)


def _check(name: str, wrong: Collection[str]) -> Check:
    named = f" ({some(sorted(wrong))})" if wrong else ""
    return Check(name + named, len(wrong), 0, "that differ")

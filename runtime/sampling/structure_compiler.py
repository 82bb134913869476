"""Structures of answers, compiled by llguidance for one tokenizer (extra ``structured``)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from lvlm.core.errors import BackendError, ParameterError
from lvlm.core.installing import install, require
from lvlm.runtime.options.structure_kinds import Asked
from lvlm.runtime.sampling import structure_trial
from lvlm.runtime.sampling.structure import Structure, failures, said

KEPT = 32  # compiled structures: each has up to megabytes of lexer states
PATIENCE = 30.0  # seconds for a trial, which has far fewer of the processor
# llguidance's own limits, but for the states of one answer's lexer, of up to 2 kB each
LIMITS = {"max_lexer_states": 50_000, "verbose_errors": False}
# Between JSON's parts: a space, or a new line that is indented. llguidance's own default is white
# space without end, and some models then write nothing else
SPACE = r" |[ ]?\r?\n[ \t]{0,24}"


class StructureCompiler:
    """Compiles structures, and keeps the last ones. Any thread may use it.

    ``tokenizer_json`` gives the text of the tokenizer, which is read with the first structure.
    ``vocab`` is the number of logits, ``eos_ids`` end a text.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab: int, eos_ids: Collection[int]
    ) -> None:
        self._tokenizer_json, self._vocab = tokenizer_json, vocab
        self._eos_ids = sorted(eos_ids)
        self._tokens: Any = None
        self._trial: dict[str, Any] = {}
        self._kept = lru_cache(maxsize=KEPT)(self._compiled)

    def compiled(self, asked: Asked, lead: str) -> Structure:
        """The structure that is asked for, which the text ``lead`` may come before.

        Raises ParameterError for one that is not valid or takes too much work, BackendError where
        llguidance is not installed.
        """
        return self._kept(asked, lead)

    def _compiled(self, asked: Asked, lead: str) -> Structure:
        library = require("llguidance", install("structured"))
        if self._tokens is None:
            self._open(library, asked.kind)
        grammar = json.dumps({"grammars": _grammars(library, asked, lead)})
        try_out(asked.kind, self._trial | {"grammar": grammar}, Path(library.__file__).parents[1])
        with failures(asked.kind):
            limits = library.LLParserLimits(**LIMITS)
            matcher = library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
            matcher.compute_bitmask()  # the first answer's first step finds it done
            check(asked.kind, matcher.get_error())
        return Structure(asked.kind, matcher, self._eos_ids)

    def _open(self, library: Any, name: str) -> None:
        """Read the tokenizer. It may have more tokens than there are logits, or fewer."""
        text = self._tokenizer_json()
        error: Exception | None = None
        for size in (self._vocab, None):
            try:
                tokens = library.LLTokenizer(text, n_vocab=size, eos_token=self._eos_ids)
                break
            except ValueError as reason:
                error = reason
        else:
            raise BackendError(
                f"{name} cannot be had from this bundle, whose tokenizer llguidance does not take "
                f"({said(error)}); leave {name} out"
            )
        self._trial = {
            "tokenizer": json.dumps(_small(json.loads(text)["added_tokens"])),
            "vocab": tokens.vocab_size,
            "eos_ids": self._eos_ids,
            "limits": LIMITS,
        }
        self._tokens = tokens  # last: another thread may look


def try_out(name: str, asked: dict[str, Any], folder: Path) -> None:
    """Compile a structure in a process of its own. Raises ParameterError."""
    command = [sys.executable, "-I", "-S", structure_trial.__file__, str(folder)]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=PATIENCE
        )
    except OSError as error:
        raise BackendError(f"{name}: no process can be started to try it ({error})") from None
    except subprocess.TimeoutExpired:
        raise _too_much(name) from None
    if done.returncode < 0:  # ended by a signal, as of a crash
        raise _too_much(name)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2]
        raise BackendError(f"{name} cannot be tried in a process of its own ({last})") from None
    check(name, found)


def _too_much(name: str) -> ParameterError:
    return ParameterError(
        f"{name} takes too much time or memory to compile, or its rules are nested too deeply; "
        "give a simpler one"
    )


def check(name: str, error: str) -> None:
    """Raises ParameterError if llguidance says that something is wrong with a structure."""
    if error:
        reason = said(error)
        if name == "regex":  # our own rule around it begins there
            reason = reason.removeprefix("at 1(8): ")
        if "NoExtension" in reason:
            reason = "there is no text that fits it"
        raise ParameterError(
            f"{name} is not valid ({reason}); give one that llguidance takes (docs/prompts.md)"
        )


def _grammars(library: Any, asked: Asked, lead: str) -> list[dict[str, Any]]:
    """Grammars for llguidance: the structure, within a rule of its own where a lead may come."""
    body = _body(library, asked)
    if not lead:
        return [body]
    return [{"lark_grammar": f"start: {json.dumps(lead)}? @body"}, body | {"name": "body"}]


def _body(library: Any, asked: Asked) -> dict[str, Any]:
    value = asked.value
    if isinstance(value, tuple):  # one terminal: as rules there may be 2,000
        return {"lark_grammar": f"start: TEXT\nTEXT: {' | '.join(map(json.dumps, value))}"}
    if asked.kind == "grammar":
        return {"lark_grammar": value}
    if asked.kind == "regex":
        (body,) = json.loads(library.LLMatcher.grammar_from_regex(value))["grammars"]
        return dict(body)
    schema = json.loads(value)
    own = schema.get("x-guidance", {})
    if isinstance(own, dict) and not {"whitespace_flexible", "whitespace_pattern"} & own.keys():
        schema["x-guidance"] = own | {"whitespace_pattern": SPACE}
    return {"json_schema": schema}


def _small(added: list[dict[str, Any]]) -> dict[str, Any]:
    """A tokenizer that a trial reads at once: the special tokens, whose names a grammar may have,
    and the bytes."""
    special = [token for token in added if token["special"]]
    taken = {token["id"] for token in special}
    free = (number for number in range(len(taken) + 256) if number not in taken)
    # As byte-level tokenizers write bytes: those that are no visible characters from 256 on
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    letters = [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
    vocab = {letter: next(free) for letter in letters}
    vocab |= {token["content"]: token["id"] for token in special}
    return {
        "added_tokens": special,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }

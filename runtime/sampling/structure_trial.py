"""The trial of a structure, run as a process of its own: ``python structure_trial.py FOLDER``.

Some kilobytes of rules that name each other in a chain overflow the stack where llguidance compiles
them, and others take minutes: here that ends nobody else. It is told of the structure on standard
input, in JSON (structure_compiler.py), and writes what is wrong with it. FOLDER is where llguidance
lies; there is nothing else that it needs but Python's own modules.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from typing import Any

SECONDS = 2  # of the processor, the start of Python among them
STACK = 4 * 2**20  # bytes: half of what threads have, so that what passes here passes there
MEMORY = 2 * 2**30


def main() -> None:
    asked = json.load(sys.stdin)
    limit()
    sys.path.append(sys.argv[1])
    threading.stack_size(STACK)
    thread = threading.Thread(target=attempt, args=(asked,))
    thread.start()
    thread.join()


def limit() -> None:
    """Be ended by the system where it takes too much."""
    try:
        import resource
    except ImportError:  # not on Windows: the parent's patience is the limit there
        return
    for what, limit in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
    ):
        soft, hard = resource.getrlimit(what)
        allowed = [limit, *(n for n in (soft, hard) if n != resource.RLIM_INFINITY)]
        resource.setrlimit(what, (min(allowed), hard))


def attempt(asked: dict[str, Any]) -> None:
    """Compile, and tell which tokens may come first."""
    library = importlib.import_module("llguidance")
    tokens = library.LLTokenizer(
        asked["tokenizer"], n_vocab=asked["vocab"], eos_token=asked["eos_ids"]
    )
    limits = library.LLParserLimits(**asked["limits"])
    matcher = library.LLMatcher(tokens, asked["grammar"], log_level=0, limits=limits)
    matcher.deep_copy().compute_bitmask()
    matcher.compute_bitmask()
    sys.stdout.write(json.dumps(matcher.get_error()))


if __name__ == "__main__":
    main()

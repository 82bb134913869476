"""Entry points of the commands. Ctrl-C is seen to before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """``lvlm-VERB …``, by the name it was started with, or ``lvlm VERB …``."""
    signal.signal(signal.SIGINT, _leave)  # later exceptions: console.run_main
    program = os.path.basename(sys.argv[0]).removesuffix(".exe")
    from lvlm.core.console import run_main
    from lvlm.main import main as dispatch
    from lvlm.main import run_verb
    from lvlm.verbs import MODULES, PREFIX

    verb = program.removeprefix(PREFIX)
    if program == PREFIX + verb and verb in MODULES:
        return run_main(program, lambda: run_verb(verb, sys.argv[1:]))
    return dispatch()


def _leave(*_: object) -> None:
    """Nothing was begun that would have to be undone."""
    os._exit(130)

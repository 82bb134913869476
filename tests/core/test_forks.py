"""A model and an engine in a forked child: refused at once, never a wait."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, warnings
import lvlm

warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: what is tried here
model = lvlm.load(sys.argv[1], threads=1)
engine = lvlm.Engine(sys.argv[1], threads=1, slots=1)
model.generate("Hi", max_new_tokens=2)
engine.generate("Hi", max_new_tokens=2)
long = engine.submit("Hi", max_new_tokens=1000, ignore_eos=True)
waiting = engine.submit("Hi")

def told(call):
    try:
        call()
    except lvlm.LvlmError as error:
        print(type(error).__name__, str(error).partition(",")[0], flush=True)

child = os.fork()
if child == 0:
    signal.alarm(30)
    told(lambda: model.generate("Hi"))
    told(lambda: list(model.stream("Hi")))
    told(lambda: engine.generate("Hi"))
    told(lambda: engine.submit("Hi"))
    told(long.result)
    told(lambda: list(waiting))
    print(engine.stats().submitted, flush=True)
    engine.close()
    model.close()
    del engine, model  # and then the interpreter's own end
    sys.exit(7)
status = os.waitpid(child, 0)[1]
print(os.waitstatus_to_exitcode(status), flush=True)
long.cancel()
waiting.cancel()
print(engine.generate("Hi", max_new_tokens=2).stats.new_tokens, flush=True)
print(model.generate("Hi", max_new_tokens=2).stats.new_tokens, flush=True)
"""


@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="no fork here")
def test_a_forked_child_is_refused_and_ends(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", max_images=2)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, timeout=120
    )
    model, engine = (
        f"BackendError this {what} was opened before os.fork()" for what in ("model", "engine")
    )
    expected = [*[model] * 2, *[engine] * 4, "3", "7", "2", "2"]
    assert done.stdout.splitlines() == expected, done.stderr
    assert done.stderr == ""

"""The process of one contender: opens it, then serves rounds on command.

``python -m lvlm.bench.child`` reads one JSON object a line from standard input and answers each
with one: ``{"do": "open", "setup": …}``, ``{"do": "round", "work": …}`` or ``{"do": "costs",
"work": …}``, then the end of input. An answer with ``error`` is one line about what went wrong.
What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lvlm.bench.contenders import BUNDLE, Serving, Setup, peers
from lvlm.bench.resident_memory import forget_peak, peak_bytes
from lvlm.bench.workload import RoundWorkload
from lvlm.core.errors import LvlmError
from lvlm.core.typed_json import decode


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    served: list[Serving] = []
    commands: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "open": lambda message: _open(decode(Setup, message["setup"], "setup"), served),
        "round": lambda message: _round(decode(RoundWorkload, message["work"], "work"), served[0]),
        "costs": lambda message: _costs(message["work"], served[0]),
    }
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = commands[message["do"]](message)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": _line(error)}
        print(json.dumps(answer), file=answers, flush=True)
    for serving in served:
        serving.close()


def _open(setup: Setup, served: list[Serving]) -> dict[str, Any]:
    began = time.perf_counter()
    if setup.kind == BUNDLE:
        from lvlm.bench.own import open_bundle

        serving: Serving = open_bundle(setup)
    else:
        serving = peers()[setup.kind].open(setup)
    served.append(serving)
    return {
        "load_s": time.perf_counter() - began,
        "load_peak_bytes": peak_bytes(),
        "facts": serving.facts(),
    }


def _round(work: RoundWorkload, serving: Serving) -> dict[str, Any]:
    forget_peak()
    records = serving.serve(work)
    for index, (record, request) in enumerate(zip(records, work.requests, strict=True)):
        if len(record.tokens) != request.new_tokens:
            raise LvlmError(
                f"request {index + 1} was answered with {len(record.tokens)} tokens instead of "
                f"{request.new_tokens}; is there room for prompt and answer?"
            )
    return {"records": [asdict(record) for record in records], "peak_bytes": peak_bytes()}


def _costs(work: dict[str, Any], serving: Serving) -> dict[str, Any]:
    from lvlm.bench.engine_costs import CostWork
    from lvlm.bench.own import Together

    assert isinstance(serving, Together), "the parts of an engine are asked for"
    forget_peak()
    engine, costs = serving.costs(decode(CostWork, work, "work"))
    return {"engine": asdict(engine), "costs": asdict(costs), "peak_bytes": peak_bytes()}


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, LvlmError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main()

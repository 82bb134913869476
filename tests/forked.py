"""Code in a fork of this process: most of a short process is imports, which are done here.

For code that changes what stays in a process, such as paths, folders and constants of others.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from subprocess import CompletedProcess


def run_forked(code: str, *arguments: str, folder: Path) -> CompletedProcess[str]:
    """``code`` in ``folder``, which is also where its modules are looked for first; what it prints
    and its status, as of a process of its own."""
    said = {name: folder / f"{name}.txt" for name in ("stdout", "stderr")}
    child = os.fork()
    if child == 0:
        os._exit(_run(code, arguments, folder, said))
    _, status = os.waitpid(child, 0)
    printed = {name: file.read_text() for name, file in said.items()}
    return CompletedProcess(code, os.waitstatus_to_exitcode(status), **printed)


def _run(code: str, arguments: tuple[str, ...], folder: Path, said: dict[str, Path]) -> int:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["forked", *arguments]
    with contextlib.ExitStack() as stack:
        for number, (name, file) in enumerate(said.items(), 1):
            stream = stack.enter_context(file.open("w"))
            os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)
        try:
            exec(compile(code, "forked", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

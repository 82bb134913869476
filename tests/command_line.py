"""A command as a user meets it: its arguments, its status, what it prints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest


class Run:
    """Calls a command's main function: run(*argv) -> status, standard output, standard error."""

    def __init__(self, capfd: pytest.CaptureFixture[str], main: Callable[[list[str]], int]) -> None:
        self.capfd, self.main = capfd, main

    def __call__(
        self, *argv: object, command: Callable[[list[str]], int] | None = None
    ) -> tuple[int, str, str]:
        try:
            code = (command or self.main)([str(a) for a in argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out = self.capfd.readouterr()
        return code, out.out, out.err


def help_of(module: str) -> tuple[str, list[str]]:
    """What ``--help`` of a command prints, and which heavy packages it imported."""
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        f"from {module} import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'numpy', 'matplotlib', 'sklearn', 'PIL'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    return "\n".join(lines), imported.split()


def one_line(err: str, program: str) -> str:
    """What the program said, which is one line."""
    assert err.startswith(f"{program}: error: ")
    assert err.count("\n") == 1
    return err

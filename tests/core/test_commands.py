"""What all commands share, and lvlm itself: its verbs, their help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from command_line import Run, one_line

from lvlm import main as dispatcher
from lvlm import verbs
from lvlm.core.console import run_main
from lvlm.core.errors import BundleError, ValidationError


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, dispatcher.main)


def test_run_main_maps_errors_to_lines_and_statuses(run: Run) -> None:
    def raising(error: BaseException) -> Callable[[Any], int]:
        def body() -> int:
            raise error

        return lambda _: run_main("prog", body)

    assert run(command=raising(BundleError("bad; mend it"))) == (
        *(2, "", "prog: error: bad; mend it\n"),
    )
    checks = ValidationError("the graphs differ", details="  a 1\n  b 2")
    assert str(checks) == "the graphs differ"
    assert run(command=raising(checks))[2] == "prog: error: the graphs differ\n  a 1\n  b 2\n"
    odd = BundleError("bad\nname\x1b[1m \ud800" + "x" * 5000)
    assert len(said := run(command=raising(odd))[2]) < 1000
    assert said.startswith("prog: error: bad name [1m  xxx")
    code, _, err = run(command=raising(MemoryError("Unable to allocate 9 GiB")))
    assert code == 2
    assert "not enough memory (Unable to allocate 9 GiB)" in one_line(err, "prog")
    assert "not enough memory;" in run(command=raising(MemoryError()))[2]
    assert run(command=raising(KeyboardInterrupt())) == (130, "", "")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        raising(ZeroDivisionError())(None)
    assert run_main("prog", lambda: 3) == 3


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, check=False, **options
    )


def test_an_answer_that_the_terminal_cannot_show_is_no_error() -> None:
    code = """
import sys
from lvlm.core.console import run_main
sys.exit(run_main("prog", lambda: print("caf\\u00e9 \\u2192") or 0))
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = python(code, stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout) == (0, "caf? ?\n")


def test_help_imports_neither_numpy_nor_onnxruntime() -> None:
    code = """
import sys
from lvlm.runtime.run_cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print(sorted({"numpy", "onnxruntime", "PIL", "tokenizers", "jinja2"} & set(sys.modules)))
"""
    done = python(code, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert "usage: lvlm-run" in done.stdout
    assert done.stdout.endswith("[]\n")


# lvlm VERB


def test_lvlm_lists_its_verbs(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert re.search(r"^  run +ask a bundle a question about images$", out, re.MULTILINE)
    assert re.search(r"^  export +a checkpoint and a recipe in", out, re.MULTILINE)
    assert run("--help") == (0, out, "")


def test_lvlm_unknown_verb(run: Run) -> None:
    code, out, err = run("exprot", "-h")
    assert (code, out) == (2, "")
    assert "unknown verb 'exprot'; did you mean export?" in one_line(err, "lvlm")


def test_lvlm_version(run: Run) -> None:
    from importlib.metadata import version

    expected = f"lvlm-deploy {version('lvlm-deploy')}\n"
    assert run("--version") == (0, expected, "")


def test_python_m_lvlm() -> None:
    code = """
import runpy, sys
sys.argv = ["lvlm", "exprot"]
runpy.run_module("lvlm", run_name="__main__", alter_sys=True)
"""
    done = python(code, stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert "did you mean export" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_whose_module_is_gone_is_listed_with_the_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verbs.MODULES, "gone", "lvlm.gone.cli")
    assert "gone       cannot start: there is no module lvlm.gone" in run()[1]
    code, _, err = run("gone")
    assert code == 2
    assert "lvlm-gone cannot start: No module named" in one_line(err, "lvlm")

"""Mistakes on the command line of lvlm-serve: one line each, before anything is served."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm.runtime.server.serve_cli import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("a/x", "b/x"), "two bundles are named x"),
        (("=x",), "name the bundle"),
        (("x", "--port", "99999"), "--port 99999"),
        (("x", "--host", "no such host"), "--host no such host"),
        (("x", "--api-key", ""), "--api-key is empty"),
        (("x", "--api-key", "@missing"), "--api-key @missing: No such file"),
        (("x", "--certificate", "c.pem"), "belong together"),
        (("x", "--drain", "0"), "--drain is 0"),
        (("x", "--media-pixels", "-1"), "--media-pixels is -1"),
        (("x", "--allow-media-domain", "*"), "the media domain '*'"),
        (("x", "--allow-media-path", "missing"), "missing"),
        (("x", "--prot", "1"), "did you mean"),
        ((), "BUNDLE"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: Any = main([*arguments, *(() if "--port" in arguments else ("--port", "0"))])
    except SystemExit as ended:  # of argparse
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert says in said
    assert len(said.splitlines()) == 1, said


def test_a_port_that_is_taken(
    bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([str(bundle("digits-llava", max_images=2)), "--port", port]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


def test_a_certificate_that_is_none(
    bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.pem"
    file.write_text("no certificate")
    given = ["--certificate", str(file), "--certificate-key", str(file), "--port", "0"]
    assert main([str(bundle("digits-llava", max_images=2)), *given]) == 2
    assert "--certificate and --certificate-key: " in capsys.readouterr().err.splitlines()[-1]

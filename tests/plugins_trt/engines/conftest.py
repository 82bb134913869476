"""lvlm-build engine on a copy of a bundle, in this process; a bundle with engines for a GPU that is
not there, as the runtime's tests have it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import built as with_engines
from fake_gpu import driver, trt
from settings import SMALL

from lvlm.core import own_process
from lvlm.plugins_trt.build_cli import main
from lvlm.plugins_trt.engines.tensorrt_builder import open_tensorrt

__all__ = ["driver", "trt", "with_engines"]


@pytest.fixture
def folder(bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle(SMALL, dtype="fp16", max_images=2), tmp_path / "out"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what making a bundle for the test printed
        try:
            code = main(["engine", *map(str, argv)])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def refused(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The one line that says why not; nothing is left of the attempt."""

    def call(*argv: object) -> str:
        code, out, err = run(*argv, "-q")
        assert (code, out) == (2, "")
        assert err.startswith("lvlm-build")
        assert err.count("\n") == 1, err
        for word in argv:
            if isinstance(word, Path) and word.is_dir():
                assert not list(word.glob("engines/*"))
                assert not list(word.glob(".*"))
        return err

    return call


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines are built in this process, which has what a test put in place of packages."""

    def call(program: str, work: Callable[..., None], *arguments: Any) -> int:
        del program
        work(*arguments)
        return 0

    monkeypatch.setattr(own_process, "in_own_process", call)
    yield
    open_tensorrt.cache_clear()

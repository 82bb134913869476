"""What lvlm-export lists, and what that takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from bundles import FAMILIES
from command_line import Run, help_of

from lvlm.export.export_cli import main


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


def test_listings(run: Run) -> None:
    assert "lightvlm" in run("--help-recipe")[1]
    text = run("--help-recipe", "lightvlm")[1]
    assert "--set keep=0.35" in text
    assert "--set merge=recycle" in text
    assert "trt-rtx" in run("--list-targets")[1]


def test_models_are_listed_as_the_families_say(run: Run) -> None:
    text = run("--list-models")[1]
    assert "tiny-llava  shipped" in text
    parts = {part.partition("\n")[0]: part for part in text.split("\n\n")}
    for name, family in FAMILIES.items():
        lines = [line.split() for line in parts[name].splitlines()]
        for alias, hub_id in family.aliases.items():
            assert [alias, hub_id] in lines
        words = " ".join(parts[name].split())
        assert f"an image becomes: {family.image_handling} video: {family.video or 'no'} " in words
    assert "The weights on the hub were not run" in text
    assert "lightvlm" in text


def test_torchs_threads_wait_asleep(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before torch is imported, which listings do not (next test); not over a user's own."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run("--list-targets")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run("--list-targets")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


LISTINGS = (
    ("--list-models",),
    ("--list-targets",),
    ("--help-recipe",),
    *(("--help-recipe", name) for name in ("none", "lightvlm", "prefixkv")),
)


def test_listings_need_no_torch(run: Run) -> None:
    """In a process that cannot import it, they say what they say here, in 80 columns."""
    code = (
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Blocked(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'onnx', 'onnx_ir'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from lvlm.export.export_cli import main\n"
        f"for argv in {LISTINGS!r}: assert main(argv) == 0\n"
        "assert main(['--help-recipe', 'lightvml']) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(run(*argv)[1] for argv in LISTINGS)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "did you mean lightvlm" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_imports_nothing_heavy() -> None:
    text, imported = help_of("lvlm.export.export_cli")
    assert "--recipe" in text
    assert not imported

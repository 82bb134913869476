"""examples/jetson/Dockerfile: what it copies, installs and starts is what there is."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tomllib
from pathlib import Path

import lvlm
from lvlm.core.discovery import discover
from lvlm.plugins_trt.engines import engine_cli
from lvlm.plugins_trt.plugins import library_build
from lvlm.runtime.backends import devices
from lvlm.runtime.bundle.engine_sets import PLUGINS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "examples/jetson/Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_it_takes_the_wheel_and_what_it_needs() -> None:
    wheel = f"lvlm_deploy-{lvlm.__version__}-py3-none-any.whl"
    assert set(re.findall(r"lvlm_deploy\S*?\.whl", TEXT)) == {wheel}
    (extra,) = re.findall(r"\.whl\[(\w+)\]", TEXT)
    assert extra in PROJECT["optional-dependencies"]


def test_the_library_is_the_one_that_cmake_makes_and_engines_look_for() -> None:
    assert f"{PLUGINS}=/opt/lvlm/{library_build.LIBRARY}" in TEXT
    assert f"/build/{library_build.LIBRARY}" in TEXT
    made = (library_build.SHELL / "CMakeLists.txt").read_text()
    assert library_build.LIBRARY.removeprefix("lib").removesuffix(".so") in made


def test_its_commands_are_those_that_there_are() -> None:
    commands = [
        shlex.split(line.partition(" lvlm-jetson ")[2])
        for line in TEXT.splitlines()
        if line.startswith("#") and " lvlm-jetson lvlm-" in line
    ]
    commands.append(json.loads(TEXT.splitlines()[-1].removeprefix("CMD ")))
    assert {words[0] for words in commands} == {"lvlm-build", "lvlm-run", "lvlm-doctor"}
    assert {words[0] for words in commands} <= set(PROJECT["scripts"])
    (build,) = (words[1:] for words in commands if words[0] == "lvlm-build")
    parser = argparse.ArgumentParser()
    engine_cli.add_parser(parser.add_subparsers())
    target = discover("lvlm.export.targets", "TARGET")[parser.parse_args(build).target]
    assert (target.flavour, 87 in target.sms) == ("tensorrt", True)
    (run,) = (words for words in commands if words[0] == "lvlm-run")
    assert run[run.index("--device") + 1] in devices()

"""Checkpoints and bundles that many tests share, each made once per run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU kernels run in Triton's interpreter, which must be asked for before anything at all
# imports Triton; transformers does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import drawn
from bundles import ASSETS, FAMILIES, TINY
from filelock import FileLock
from random_weights import randomise

from lvlm.core.discovery import discover
from lvlm.core.progress import Progress
from lvlm.export import export_plan as planning
from lvlm.export import exporter
from lvlm.export.checkpoint.skeleton import default_dtype
from lvlm.export.export_options import ExportOptions
from lvlm.export.recipes._base import parse_settings
from lvlm.export.targets.target import Target
from lvlm.runtime.backends import cpu

torch.set_num_threads(1)  # small models: more threads only wait for one another


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="every combination of models and recipes, 256 tokens"
    )
    parser.addoption(
        "--stress-steps", type=int, default=90, help="random operations on the engine (90)"
    )


@pytest.fixture(scope="session")
def stress_steps(pytestconfig: pytest.Config) -> int:
    """How long tests of chance go on."""
    return int(pytestconfig.getoption("--stress-steps"))


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stamps of verified files go to a folder of this run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_session() -> Any:
    """ONNX Runtime, too: test processes share the cores."""
    patch = pytest.MonkeyPatch()
    init = cpu.Backend.__init__
    patch.setattr(cpu.Backend, "__init__", lambda self, threads=None: init(self, threads or 1))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Callable[[str], Path]:
    """A checkpoint folder by name: tiny-llava, a family's tiny configuration or a drawn one, with
    random weights."""

    def make(name: str) -> Path:
        if name == "tiny-llava":
            return ASSETS / name
        folder = shared / "checkpoints" / name.replace(":", "-")
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / "complete").exists():
                return folder
            if name.startswith(drawn.PREFIX):
                number = int(name.removeprefix(drawn.PREFIX))
                family, config, seed = FAMILIES["llava"], drawn.draw_config(number), number
            else:
                (family, config), seed = TINY[name], 1 + list(TINY).index(name)
            with default_dtype(torch.float32):
                model = family.build(config)
            randomise(model, seed)
            model.save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(ASSETS / "tiny-llava" / file, folder)
            for file, content in family.tiny_files(config).items():
                (folder / file).write_text(content)
            (folder / "complete").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def bundle(shared: Path, checkpoint: Callable[[str], Path]) -> Callable[..., Path]:
    """An exported bundle: bundle("tiny-llava", "lightvlm", "keep=0.5", dtype="fp16").

    Shared between tests: do not change it, copy it.
    """

    def make(
        model: str,
        recipe: str = "none",
        *settings: str,
        dtype: str = "fp32",
        targets: tuple[str, ...] = (),
        **options: Any,
    ) -> Path:
        key = (model, recipe, settings, dtype, targets, *sorted(options.items()))
        output = shared / "bundles" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        output.parent.mkdir(exist_ok=True)
        with FileLock(f"{output}.lock"):
            if not output.exists():
                known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
                parsed = parse_settings(discover("lvlm.export.recipes", "RECIPE")[recipe], settings)
                plan = planning.make_plan(
                    ExportOptions(
                        model=str(checkpoint(model)),
                        recipe=parsed,
                        output=output,
                        dtype=dtype,
                        validate=False,
                        targets=tuple(known[t] for t in targets),
                        **options,
                    )
                )
                exporter.export(plan, Progress(0, quiet=True))
        return output

    return make

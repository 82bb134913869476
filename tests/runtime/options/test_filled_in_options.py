"""defaults="model": what generation_config.json says of drawing, where it is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lvlm
from lvlm.core.errors import BundleError, ParameterError
from lvlm.runtime.run_cli import main

SAID = {"do_sample": True, "temperature": 1.5, "min_p": 0.02, "max_new_tokens": 7}


@pytest.fixture
def saying(bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A bundle whose checkpoint says this of drawing."""

    def make(**sampling: Any) -> Path:
        own = shutil.copytree(bundle("digits-llava", max_images=2), tmp_path / "bundle")
        manifest = json.loads((own / "lvlm.json").read_text())
        manifest["generation"] = {"top_k": 20, "sampling": sampling}
        (own / "lvlm.json").write_text(json.dumps(manifest))
        return own

    return make


def test_the_callers_words_come_first(saying: Callable[..., Path]) -> None:
    folder = saying(**SAID)
    with lvlm.load(folder) as model, lvlm.Engine(folder, slots=1) as engine:
        base = lvlm.GenerationOptions(ignore_eos=True, seed=3)
        plain = model.generate("Hi", options=base)
        assert len(plain.token_ids) > 7
        for who in (model, engine):
            drawn = who.generate("Hi", options=base, defaults="model")
            spelt = who.generate(
                "Hi", options=base, temperature=1.5, min_p=0.02, max_new_tokens=7, top_k=20
            )
            assert drawn.token_ids == spelt.token_ids
            assert drawn.token_ids != plain.token_ids[:7]
            own = who.generate(
                "Hi", options=base, defaults="model", temperature=0, max_new_tokens=9
            )
            assert own.token_ids == plain.token_ids[:9]


def test_what_cannot_be_is_said_before_any_work(
    saying: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saying(do_sample=True, typical_p=0.5)
    with lvlm.load(folder) as model, lvlm.Engine(folder, slots=1) as engine:
        assert model.generate("Hi", max_new_tokens=1).token_ids
        for who in (model, engine):
            with pytest.raises(ParameterError, match=r"draws with typical_p = 0\.5"):
                who.stream("Hi", defaults="model")
    assert main([str(folder), "Hi", "--defaults", "model", "--seed", "1"]) == 2
    assert "draws with typical_p = 0.5" in capsys.readouterr().err
    shutil.rmtree(folder)
    with (
        lvlm.load(saying(do_sample=True, temperature="hot")) as model,
        pytest.raises(BundleError, match="temperature is 'hot'; say it in the call"),
    ):
        model.stream("Hi", defaults="model")


def test_flags(saying: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = saying(**SAID)

    def said(*flags: str) -> list[int]:
        argv = [str(folder), "Hi", "--ignore-eos", "--json", "--defaults", "model", *flags]
        assert main(argv) == 0
        ids: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return ids

    assert said("--seed", "3") == said("--seed", "3")
    assert len(said("--max-new-tokens", "2")) == 2
    assert (
        main([str(folder), "Hi", "--defaults", "model", "--temperature", "0", "--seed", "3"]) == 2
    )
    assert "--seed has no effect at temperature 0" in capsys.readouterr().err
    assert main([str(folder), "Hi", "--defaults", "checkpoint"]) == 2
    assert "defaults is 'checkpoint'; give 'model' or None" in capsys.readouterr().err

"""A new recipe is one file: it is listed, exported, run and combined with merging, and nothing else
knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from parity_tools import ROWS, make_reference

import lvlm
from lvlm.core import discovery
from lvlm.export import export_cli, listings, recipes
from lvlm.export.recipes.recipe import parse_settings
from lvlm.runtime.policies.evictions import Oldest
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Window
from lvlm.runtime.policies.selections import Merge
from lvlm.runtime.policies.shares import Uniform

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.recipe import Recipe, parameter
from lvlm.runtime.policies.evictions import Oldest
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Window
from lvlm.runtime.policies.selections import Merge
from lvlm.runtime.policies.shares import Uniform


@dataclass(frozen=True)
class Glance(Recipe):
    name: ClassVar[str] = "glance"
    summary: ClassVar[str] = "what the last few tokens see, merged, in a window that slides"
    source: ClassVar[str] = "a test"

    kv_keep: float = parameter(0.5, "fraction that stays")
    last: int = parameter(6, "tokens that rank the others")

    def cache_policy(self) -> CachePolicy:
        return CachePolicy(
            score=Window(self.last, 3, "max"),
            select=Merge(),
            decode=Oldest(),
            budget=Uniform(self.kv_keep),
            sinks=2,
            recent=self.last,
        )


RECIPE = Glance
"""
POLICY = CachePolicy(Window(4, 3, "max"), Merge(), Oldest(), Uniform(1.0), sinks=2, recent=4)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "more/glance.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    recipes.__path__.append(str(path.parent))
    discovery.discover.cache_clear()
    yield path
    recipes.__path__.remove(str(path.parent))
    discovery.discover.cache_clear()


def test_a_recipe_in_a_file_of_its_own(
    file: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    assert file.name == "glance.py"
    assert "merged, in a window that slides" in listings.recipes()
    assert "--set last=6" in listings.recipe("glance")
    model, out = checkpoint("drawn:0"), tmp_path / "out"
    given = ["kv_keep=1.0", "last=4"]
    settings = [word for setting in given for word in ("--set", setting)]
    flags = ["-m", str(model), "-r", "glance", *settings, "-o", str(out), "-q", "--no-validate"]
    assert export_cli.main(flags) == 0
    reference = make_reference(model, "glance", *given)
    text, images = ROWS[0]
    with lvlm.load(out) as bundle:
        assert bundle.manifest.cache_policy == POLICY
        assert bundle.manifest.parameters == {"kv_keep": 1.0, "last": 4}
        options = {"chat_template": False, "max_new_tokens": 24, "ignore_eos": True}
        found = bundle.generate(text, images=images, kv_keep=0.3, **options)
        prompt = bundle.prepare(
            0, text, images, lvlm.GenerationOptions(chat_template=False, max_new_tokens=24)
        )
    expected = reference.generate(
        prompt, reference.encode(prompt.images), max_new_tokens=24, kv_keep=0.3
    )
    assert list(found.token_ids) == expected.tokens
    assert list(found.stats.kept_per_layer) == expected.kept
    assert sum(expected.kept) < sum(expected.entries) / 2


def test_merging_combines_with_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert file.exists()
    kind = discovery.discover("lvlm.export.recipes", "RECIPE")["lightvlm"]
    recipe = parse_settings(kind, ["kv=glance", "kv.last=4", "kv_keep=1.0"]).for_layers(6)
    assert recipe.cache_policy() == POLICY
    assert recipe.parameters()["kv_sinks"] is None
    flags = ["-m", "tiny-llava", "-r", "lightvlm", "-o", "out"]
    for more, said in (
        (["kv=glance", "kv_sinks=3"], "kv=glance takes no kv_sinks; leave kv_sinks out"),
        (["kv=glance", "kv.last=0"], "window is 0; give an integer of 1 or more"),
        (["kv=glanse"], "did you mean glance"),
    ):
        assert export_cli.main([*flags, *(word for one in more for word in ("--set", one))]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1

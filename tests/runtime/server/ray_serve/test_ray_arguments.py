"""Arguments of the application for Ray Serve, in its example and on its page, too."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import yaml

from lvlm.core.errors import BackendError, ParameterError
from lvlm.runtime.server.ray import app
from lvlm.runtime.server.ray.arguments import ENGINE, INGRESS, Arguments, read_arguments

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "bundle is missing"),
        ({"bundle": "x", "replica": "2"}, "did you mean replicas"),
        ({"bundle": "x", "replicas": "two"}, "replicas is 'two'"),
        ({"bundle": "x", "slots": "0"}, "slots is '0'"),
        ({"bundle": "x", "replicas": "3", "max_replicas": "2"}, "max_replicas is 2"),
        ({"bundle": "x", "replicas": "0"}, "replicas is 0"),
        ({"bundle": "x", "routing": "chance"}, "routing is 'chance'"),
    ],
)
def test_mistakes_in_arguments(given: dict[str, str], says: str) -> None:
    with pytest.raises(ParameterError, match=says) as error:
        read_arguments(given)
    assert len(str(error.value).splitlines()) == 1


def test_arguments_from_a_command_line() -> None:
    made = read_arguments({"bundle": "a/tiny", "slots": "2", "api_key": "@keys", "keep": "0.5"})
    assert (made.served_name, made.slots, made.api_key, made.keep) == ("tiny", 2, ["@keys"], 0.5)
    assert made.max_ongoing > made.slots + made.queue


def test_without_ray_the_application_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"\[ray\]"):
        app({"bundle": "x"})


def test_the_example_of_a_configuration_names_what_there_is() -> None:
    file = yaml.safe_load((ROOT / "examples/serving/ray.yaml").read_text())
    (application,) = file["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is app
    given = read_arguments(application["args"])
    by_name = {one["name"]: one for one in application["deployments"]}
    assert by_name.keys() == {ENGINE, INGRESS}
    scaling = by_name[ENGINE]["autoscaling_config"]
    assert scaling["target_ongoing_requests"] == given.max_slots
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (
        given.replicas,
        given.max_replicas,
    )


def test_the_page_has_every_argument() -> None:
    page = (ROOT / "docs/ray.md").read_text()
    assert [name for name in Arguments.model_fields if f"`{name}" not in page] == []

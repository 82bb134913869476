"""What docs/serving.md, examples/serving/ and the example of a client name is in the server."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI
from server_tools import SAMPLES, running
from settings import LIGHTVLM

from lvlm.runtime.engine import Engine
from lvlm.runtime.server import fields, refusals
from lvlm.runtime.server.app import make_app
from lvlm.runtime.server.metrics import Metrics
from lvlm.runtime.server.serve_cli import make_parser
from lvlm.runtime.server.service import Service
from lvlm.runtime.server.triton_server import triton_cli

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples/serving"
PAGE = (ROOT / "docs/serving.md").read_text()
METRIC = re.compile(r"\b(?:vllm|lvlm):\w+")
SERIES = {"histogram": ("_bucket", "_count", "_sum")}


def metrics() -> dict[str, str]:
    """Name -> type of every metric of /metrics."""
    told = re.findall(r"^# TYPE (\S+) (\w+)$", Metrics({}).text().decode(), re.MULTILINE)
    return dict(told)


def series() -> set[str]:
    return {name + end for name, kind in metrics().items() for end in SERIES.get(kind, ("",))}


def paths() -> set[str]:
    async def read(url: str) -> bytes:
        raise NotImplementedError(url)

    return set(make_app(Service([], read)).openapi()["paths"])


def parsed(words: Sequence[str]) -> Namespace:
    """The arguments of lvlm-serve; those that do not exist end it."""
    return make_parser().parse_args(words)


def test_the_folder_has_what_is_looked_at_here() -> None:
    assert sorted(file.name for file in FOLDER.iterdir()) == [
        *("Dockerfile.cpu", "Dockerfile.cuda", "Dockerfile.triton", "grafana.json"),
        *("kubernetes.yaml", "lvlm-serve.service", "nginx.conf", "prometheus.yml", "ray.yaml"),
    ]


def test_the_page_has_every_metric() -> None:
    assert sorted(METRIC.findall(PAGE)) == sorted(metrics())


def test_the_page_has_every_field_and_status() -> None:
    for kind in (fields.ChatFields, fields.CompletionFields, fields.ResponseFields):
        for name in kind.model_fields:
            assert f"`{name}" in PAGE, name
    for status in refusals.KINDS:
        assert re.search(rf"\b{status}\b", PAGE), status
    for _, _, code in refusals.STATUS:
        assert code is None or code == "cancelled" or f"`{code}`" in PAGE, code


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    board = json.loads((FOLDER / "grafana.json").read_text())
    shown = set()
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            found = METRIC.findall(target["expr"])
            assert found, target
            assert target["expr"].count("(") == target["expr"].count(")")
            shown |= set(found)
    assert shown <= series()
    assert all(any(one.startswith(name) for one in shown) for name in metrics())
    names = [panel["id"] for panel in board["panels"]]
    assert len(set(names)) == len(names)
    (variable,) = (one for one in board["templating"]["list"] if one["name"] == "model")
    assert set(METRIC.findall(variable["query"])) <= series()


def test_the_scrape_leads_to_the_metrics() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] in paths()


def test_the_deployment_probes_and_waits_as_the_server_needs() -> None:
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {name: one["path"] for name, one in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    assert {one["path"] for one in probes.values()} <= paths()
    (port,) = container["ports"]
    args = parsed([*entry("cpu")[1:], *container["args"]])
    assert args.port == port["containerPort"]
    assert {one["port"] for one in probes.values()} == {port["name"]}
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    _, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + args.drain
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_load_balancer_lets_through_what_the_server_takes() -> None:
    text = re.sub(r"#.*", "", (FOLDER / "nginx.conf").read_text())
    settings = dict(re.findall(r"^ +(\w+) ([^;{]+);", text, re.MULTILINE))
    assert settings["client_max_body_size"] == f"{parsed(['out']).body_bytes >> 20}m"
    assert settings["proxy_buffering"] == "off"  # tokens come one by one
    again = {int(word[5:]) for word in settings["proxy_next_upstream"].split() if "http_" in word}
    assert again == {429, 503} <= set(refusals.KINDS)
    assert settings["hash"] == "$lvlm_key consistent"


def test_nginx_takes_the_load_balancer(tmp_path: Path) -> None:
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed")
    own = "".join(f"{n}_temp_path {tmp_path};" for n in ("client_body", "proxy", "fastcgi"))
    own += "".join(f"{n}_temp_path {tmp_path};" for n in ("uwsgi", "scgi")) + "access_log off;"
    text = (FOLDER / "nginx.conf").read_text().replace("http {", "http {" + own, 1)
    file = tmp_path / "nginx.conf"
    file.write_text(f"pid {tmp_path}/pid;\n{text}")
    words = (nginx, "-t", "-c", file, "-p", tmp_path, "-e", tmp_path / "log")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_unit_stops_the_server_as_it_ends() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((FOLDER / "lvlm-serve.service").read_text())
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "lvlm-serve"
    args = parsed(words)
    assert service["KillSignal"] == "SIGTERM"
    assert float(service["TimeoutStopSec"]) > args.drain
    credential = service["LoadCredential"].partition(":")[0]
    assert args.api_key == [f"@${{CREDENTIALS_DIRECTORY}}/{credential}"]


def instructions(kind: str) -> list[tuple[str, str]]:
    text = (FOLDER / f"Dockerfile.{kind}").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(first, rest) for first, _, rest in (line.partition(" ") for line in lines if line)]


def entry(kind: str) -> list[str]:
    return list(json.loads(dict(instructions(kind))["ENTRYPOINT"]))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "triton"])
def test_containers_install_what_there_is(kind: str) -> None:
    found = instructions(kind)
    for name, rest in found:
        sources = rest.split()[:-1] if name == "COPY" and "--from" not in rest else []
        assert all((ROOT / source).exists() for source in sources), rest
    copied = {word.split("/")[0] for name, rest in found if name == "COPY" for word in rest.split()}
    homes = re.findall(r"^    \"([\w/]+)\": \"lvlm", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert {"src", *(home.split("/")[0] for home in homes)} <= copied
    assert len(homes) > 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\"\.\[([a-z,]+)\]\"", " ".join(rest for _, rest in found))
    assert extras
    assert set(",".join(extras).split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_containers_start_what_there_is(kind: str) -> None:
    last = dict(instructions(kind))
    assert int(last["USER"]) > 0
    args = parsed([*entry(kind)[1:], *json.loads(last["CMD"])])
    assert entry(kind)[0] == "lvlm-serve"
    assert args.host == "0.0.0.0"
    assert args.port == int(last["EXPOSE"])
    assert args.device == kind


def test_the_container_of_triton_starts_it() -> None:
    text = (FOLDER / "Dockerfile.triton").read_text()
    program, repository = json.loads(dict(instructions("triton"))["CMD"])
    assert program == "tritonserver"
    (mounted,) = re.findall(r"model_repository:(\S+):ro", text)
    assert repository == f"--model-repository={mounted}"
    (command,) = re.findall(r"^#   lvlm-build triton (.*)$", text, re.MULTILINE)
    parser = argparse.ArgumentParser()
    triton_cli.add_parser(parser.add_subparsers())
    assert parser.parse_args(["triton", *shlex.split(command)]).device == "cuda"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_containers_ask_for_their_health(kind: str) -> None:
    words = json.loads(re.sub(r"^.* CMD ", "", dict(instructions(kind))["HEALTHCHECK"]))
    compile(words[2], "HEALTHCHECK", "exec")
    assert words[:2] == ["python", "-c"]
    assert (str(parsed([*entry(kind)[1:], "x"]).port)) in words[2]
    assert re.findall(r"'(/\w+)'", words[2]) == ["/health"]


def test_the_example_asks_a_server(
    bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    example: dict[str, Any] = runpy.run_path(str(ROOT / "examples/serve_client.py"))
    folder = bundle("digits-llava", *LIGHTVLM, max_images=2)
    with (
        running(Engine(folder, slots=2, threads=1), name="model") as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        example["ask"](client, str(SAMPLES[0]))
    row, tokens, description = capsys.readouterr().out.splitlines()
    assert row == "5 5 8"
    assert tokens == "image tokens: 144, 72 of them in the last block"
    assert description.startswith("The picture shows a grid of nine handwritten digits.")

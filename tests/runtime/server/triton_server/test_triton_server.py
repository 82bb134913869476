"""A real Triton Inference Server with a model of ours; where there is none these are skipped.

``LVLM_TRITON`` names its folder (with bin/ and backends/), as /opt/tritonserver; else the one in
the package nvidia-pytriton is taken.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from server_tools import PATIENCE, QUESTION, SAMPLES, asking

import lvlm
from lvlm.plugins_trt.build_cli import main
from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.answers import Generation

triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")

LONG = {"max_tokens": 1500, "ignore_eos": True}
SHORT = {"max_tokens": 24, "ignore_eos": True}
STUB = "triton_python_backend_stub"
IMAGES = [path.read_bytes() for path in SAMPLES]


def found() -> Path:
    """The server's folder, or a skip."""
    if given := os.environ.get("LVLM_TRITON"):
        return Path(given)
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        pytest.skip("no Triton Inference Server: LVLM_TRITON is not set, no nvidia-pytriton")
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("the Python backend of nvidia-pytriton takes NumPy 1 alone")
    return Path(package.origin).parent / "tritonserver"


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    metrics: str

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def figure(self, name: str) -> float:
        """A metric of ours."""
        text = httpx.get(self.metrics).text
        value = re.search(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)
        assert value, text
        return float(value[1])

    def post(self, how: str, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.http}/v2/models/tiny/{how}", json=fields, timeout=PATIENCE)


def free_ports(count: int) -> list[int]:
    places = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [place.getsockname()[1] for place in places]
    for place in places:
        place.close()
    return ports


def start(folder: Path, place: Path) -> Server:
    """A server over a repository that lvlm-build writes."""
    home = found()
    models = place / "models"
    assert main(["triton", str(folder), "-o", str(models), "--name", "tiny", "--link",
                 "--slots", "3", "--threads", "1"]) == 0  # fmt: skip
    model = models / "tiny/1/model.py"
    here = str(Path(str(lvlm.__file__)).parents[1])  # an old backend ignores PYTHONPATH
    model.write_text(f"import sys; sys.path.insert(0, {here!r})\n" + model.read_text())
    backends, libraries = home / "backends", [str(sysconfig.get_config_var("LIBDIR"))]
    stub = home / "python_backend_stubs/{}.{}".format(*sys.version_info) / STUB
    if stub.exists():  # nvidia-pytriton has one for each Python, which it puts to the rest itself
        backends = Path(shutil.copytree(backends, place / "backends"))
        (backends / "python" / STUB).unlink(missing_ok=True)
        (backends / "python" / STUB).symlink_to(stub)
        libraries.append(str(home.parents[1] / "nvidia_pytriton.libs"))
    http, grpc, metrics = free_ports(3)
    libraries.append(os.environ.get("LD_LIBRARY_PATH", ""))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }
    command = [
        *(
            f"{home}/bin/tritonserver",
            f"--model-repository={models}",
            f"--backend-directory={backends}",
        ),
        *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--exit-timeout-secs=20"),
    ]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    server = Server(
        process,
        f"http://127.0.0.1:{http}",
        f"127.0.0.1:{grpc}",
        f"http://127.0.0.1:{metrics}/metrics",
    )
    until = time.monotonic() + 2 * PATIENCE
    while not ready(server):
        if process.poll() is not None or time.monotonic() > until:
            server.kill()
            pytest.fail((place / "log").read_text(errors="replace"))
        time.sleep(0.1)
    return server


def ready(server: Server) -> bool:
    try:
        return httpx.get(f"{server.http}/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = start(folder, tmp_path_factory.mktemp("triton"))
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def lone(folder: Path) -> list[Generation]:
    """Answers of an engine of its own: an image each."""
    with Engine(folder, slots=1, threads=1) as engine:
        return [
            engine.generate(QUESTION, [image], max_new_tokens=24, ignore_eos=True)
            for image in IMAGES
        ]


class Asked:
    """A question over gRPC; what comes of it, one response or error after the other."""

    def __init__(self, server: Server, inputs: Sequence[Any], **given: Any) -> None:
        self.client = triton.InferenceServerClient(server.grpc)
        self.came: queue.Queue[Any] = queue.Queue()
        self.client.start_stream(lambda result, error: self.came.put(error or result))
        self.client.async_stream_infer("tiny", list(inputs), **given)

    def all(self) -> list[Any]:
        """Until the last one."""
        got = []
        while True:
            got.append(self.came.get(timeout=PATIENCE))
            if isinstance(got[-1], Exception) or final(got[-1]):
                self.client.stop_stream()
                self.client.close()
                return got


def final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def tensor(name: str, *values: object) -> Any:
    kind = "BOOL" if isinstance(values[0], bool) else "BYTES"
    array = np.array(values, dtype=bool if kind == "BOOL" else np.object_)
    made = triton.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def question(number: int, stream: bool, **fields: Any) -> list[Any]:
    return [
        tensor("text_input", QUESTION.encode()),
        tensor("image", IMAGES[number]),
        tensor("stream", stream),
        tensor("sampling_parameters", json.dumps(fields).encode()),
    ]


def together(results: Sequence[Any]) -> tuple[str, list[int], str]:
    """Text, tokens and end of one answer."""
    text = b"".join(one.as_numpy("text_output")[0] for one in results).decode()
    tokens = [token for one in results for token in one.as_numpy("token_ids")[0].tolist()]
    return text, tokens, results[-1].as_numpy("finish_reason")[0].decode()


def expected(answer: Generation) -> tuple[str, list[int], str]:
    return answer.text, list(answer.token_ids), answer.finish_reason


def test_it_is_as_it_was_written(server: Server) -> None:
    told = httpx.get(f"{server.http}/v2/models/tiny/config").json()
    assert told["model_transaction_policy"] == {"decoupled": True}
    assert told["parameters"]["slots"] == {"string_value": "3"}


def test_answers_are_those_of_a_lone_engine(server: Server, lone: list[Generation]) -> None:
    """Streams and whole ones, twelve at once on three slots."""

    def one(number: int) -> None:
        stream = number % 3 > 0
        results = Asked(server, question(number % 2, stream, **SHORT)).all()
        assert not isinstance(results[-1], Exception), results[-1]
        assert stream or len(results) == 1
        assert together(results) == expected(lone[number % 2])
        usage = json.loads(results[-1].as_numpy("usage")[0])
        assert usage["completion_tokens"] == 24

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(12)))


def test_the_generate_endpoints(server: Server, lone: list[Generation]) -> None:
    image = base64.b64encode(IMAGES[0]).decode()
    response = server.post("generate", text_input=QUESTION, image=image, parameters=SHORT)
    assert response.json()["text_output"] == lone[0].text
    assert response.json()["token_ids"] == list(lone[0].token_ids)
    asked = json.dumps(asking(QUESTION, SAMPLES[0]))
    response = server.post("generate_stream", messages=asked, stream=True, **SHORT)
    lines = [line for line in response.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    events = [json.loads(line[6:]) for line in lines]
    assert "".join(one["text_output"] for one in events) == lone[0].text
    assert [one["finish_reason"] for one in events] == [""] * (len(events) - 1) + ["length"]
    assert json.loads(events[-1]["usage"])["completion_tokens"] == 24


def test_mistakes(server: Server) -> None:
    refused = server.post("generate", text_input="x", top_p=9)
    assert refused.status_code == 400
    assert refused.json()["error"].startswith("top_p is 9")
    (error,) = Asked(server, question(0, True, n=4)).all()
    assert "n is 4, but this engine answers 3 at once" in error.message()
    *_, error = Asked(server, question(0, True, **LONG), timeout=20_000).all()
    assert "timeout" in error.message()
    (error,) = Asked(server, [tensor("image", b"\0")]).all()
    assert "give one of text_input and messages" in error.message()


def test_slots_of_those_who_leave(
    server: Server, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    """By cancelling over gRPC, and by leaving a stream over HTTP."""
    before = server.figure("vllm:generation_tokens_total")
    asked = Asked(server, question(0, True, **LONG))
    asked.came.get(timeout=PATIENCE)
    body = {"text_input": QUESTION, "stream": True, **LONG}
    url = f"{server.http}/v2/models/tiny/generate_stream"
    with httpx.Client() as client, client.stream("POST", url, json=body) as stream:
        lines = stream.iter_lines()  # without it the stream is left at once
        assert next(lines).startswith("data: ")
        wait_for(lambda: server.figure("vllm:num_requests_running") == 2)
    asked.client.stop_stream(cancel_requests=True)
    asked.client.close()
    wait_for(lambda: server.figure("vllm:num_requests_running") == 0)
    assert server.figure("vllm:generation_tokens_total") - before < LONG["max_tokens"]


def test_it_ends_when_what_was_begun_is_answered(folder: Path, tmp_path: Path) -> None:
    server = start(folder, tmp_path)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.post, "generate", text_input="Hello", **LONG)
            until = time.monotonic() + PATIENCE
            while server.figure("vllm:num_requests_running") == 0:
                assert time.monotonic() < until
                time.sleep(0.02)
            server.process.send_signal(signal.SIGTERM)
            assert len(asked.result().json()["token_ids"]) == LONG["max_tokens"]
        assert server.process.wait(PATIENCE) == 0
    finally:
        server.kill()

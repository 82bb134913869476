"""What a model uses of Triton's Python API, in this process: requests, and what was sent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PATIENCE = 30.0


class TritonModelException(Exception):  # noqa: N818 - as Triton names it
    pass


@dataclass
class TritonError:
    message: str
    code: str

    UNKNOWN = "unknown"
    INTERNAL = "internal"
    NOT_FOUND = "not found"
    INVALID_ARG = "invalid"
    UNAVAILABLE = "unavailable"
    UNSUPPORTED = "unsupported"
    ALREADY_EXISTS = "exists"
    CANCELLED = "cancelled"


@dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclass
class InferenceResponse:
    output_tensors: Sequence[Tensor] = ()
    error: TritonError | None = None

    def __getitem__(self, name: str) -> Any:
        """An output's values; of usage and logprobs what their JSON says."""
        (found,) = (one.values for one in self.output_tensors if one.name == name)
        texts = name in ("usage", "logprobs", "tool_calls")
        return [json.loads(value) for value in found] if texts else found.tolist()

    def __contains__(self, name: str) -> bool:
        return any(one.name == name for one in self.output_tensors)


@dataclass
class Sender:
    """Keeps what was sent, as Triton would pass it on."""

    responses: list[InferenceResponse] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "a response after the last one"
        if response is not None:
            self.responses.append(response)
        if flags == Api.TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


@dataclass
class Request:
    inputs: Mapping[str, np.ndarray]
    given: Mapping[str, Any] = field(default_factory=dict)
    microseconds: int = 0
    sender: Sender = field(default_factory=Sender)

    def get_response_sender(self) -> Sender:
        return self.sender

    def parameters(self) -> str:
        return json.dumps(self.given)

    def timeout(self) -> int:
        return self.microseconds

    def wait(self) -> list[InferenceResponse]:
        """All responses, when the last one is there."""
        assert self.sender.ended.wait(PATIENCE)
        return self.sender.responses

    def begun(self) -> None:
        """Wait for the first response."""
        until = time.monotonic() + PATIENCE
        while not self.sender.responses:
            assert time.monotonic() < until
            time.sleep(0.005)


def asks(
    text: str | bytes | None = None,
    *images: bytes,
    messages: object = None,
    stream: bool | None = None,
    alone: bool | None = None,
    given: Mapping[str, Any] | None = None,
    microseconds: int = 0,
    **sampling: Any,
) -> Request:
    """A request; ``sampling`` goes into sampling_parameters, ``given`` are parameters of its
    own."""
    found: dict[str, np.ndarray] = {}

    def texts(name: str, *values: bytes) -> None:
        found[name] = np.array(values, dtype=np.object_)

    if text is not None:
        texts("text_input", text if isinstance(text, bytes) else text.encode())
    if images:
        texts("image", *images)
    if messages is not None:
        said = messages if isinstance(messages, bytes) else json.dumps(messages).encode()
        texts("messages", said)
    for name, value in (("stream", stream), ("exclude_input_in_output", alone)):
        if value is not None:
            found[name] = np.array([value])
    if sampling:
        texts("sampling_parameters", json.dumps(sampling).encode())
    return Request(found, given or {}, microseconds)


@dataclass
class Metric:
    value: float = 0.0

    def set(self, value: float) -> None:
        self.value = value

    def increment(self, value: float) -> None:
        assert value > 0, "Triton's counters do not fall"
        self.value += value


class Families:
    """MetricFamily."""

    GAUGE, COUNTER = "gauge", "counter"

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        self.labels: Mapping[str, str] = {}
        self.off = False

    def __call__(self, name: str, description: str, kind: str) -> Any:
        if self.off:
            raise TritonModelException("metrics not supported")
        assert description
        assert kind == (self.COUNTER if name.endswith("_total") else self.GAUGE)
        families = self

        class Family:
            def Metric(self, labels: Mapping[str, str]) -> Metric:  # noqa: N802
                families.labels = labels
                return families.metrics.setdefault(name, Metric())

        return Family()


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log_info(self, message: str) -> None:
        self.lines.append(message)

    def log_error(self, message: str) -> None:
        self.lines.append(message)


class Api:
    """The module triton_python_backend_utils."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonError = TritonError
    TritonModelException = TritonModelException
    Tensor = Tensor
    InferenceResponse = InferenceResponse

    def __init__(self) -> None:
        self.MetricFamily = Families()
        self.Logger = Log()

    def get_input_tensor_by_name(self, request: Request, name: str) -> Tensor | None:
        values = request.inputs.get(name)
        return None if values is None else Tensor(name, values)


def arguments(folder: str, parameters: Mapping[str, str]) -> dict[str, str]:
    """What initialize is given."""
    told = {name: {"string_value": value} for name, value in parameters.items()}
    return {
        "model_config": json.dumps({"parameters": told}),
        "model_repository": folder,
        "model_version": "1",
        "model_name": "tiny",
    }

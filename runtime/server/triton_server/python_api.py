"""The part of ``triton_python_backend_utils`` that a model uses; only Triton can import it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Input(Protocol):
    """An input of a request."""

    def as_numpy(self) -> np.ndarray:
        """Its values; TYPE_STRING as objects, which are bytes."""


class Sender(Protocol):
    """Sender of the responses to one request, from any thread."""

    def send(self, response: Any = None, flags: int = 0) -> None: ...

    def is_cancelled(self) -> bool:
        """True where the client is gone, or has cancelled."""


class InferenceRequest(Protocol):
    """One request."""

    def get_response_sender(self) -> Sender: ...

    def parameters(self) -> str:
        """JSON of the request's parameters, each a text, a number or a switch."""

    def timeout(self) -> int:
        """Microseconds, 0: none."""


class TritonErrors(Protocol):
    """The class TritonError: its codes, and making one."""

    UNKNOWN: Any
    INTERNAL: Any
    NOT_FOUND: Any
    INVALID_ARG: Any
    UNAVAILABLE: Any
    UNSUPPORTED: Any
    ALREADY_EXISTS: Any
    CANCELLED: Any

    def __call__(self, message: str, code: Any) -> Any: ...


class MakeTensor(Protocol):
    def __call__(self, name: str, values: np.ndarray) -> Any: ...


class MakeResponse(Protocol):
    def __call__(self, output_tensors: Sequence[Any] = ..., error: Any = ...) -> Any: ...


class Log(Protocol):
    """Triton's log."""

    def log_info(self, message: str) -> None: ...

    def log_error(self, message: str) -> None: ...


class Metric(Protocol):
    """A metric of one set of labels."""

    def set(self, value: float) -> None: ...

    def increment(self, value: float) -> None: ...


class MetricFamily(Protocol):
    """A metric's name and kind."""

    def Metric(self, labels: Mapping[str, str]) -> Metric: ...  # noqa: N802


class MakeFamily(Protocol):
    GAUGE: Any
    COUNTER: Any

    def __call__(self, name: str, description: str, kind: Any) -> MetricFamily: ...


class PythonApi(Protocol):
    """The module."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL: int
    Logger: Log

    @property
    def Tensor(self) -> MakeTensor: ...  # noqa: N802 - as Triton names them

    @property
    def InferenceResponse(self) -> MakeResponse: ...  # noqa: N802

    @property
    def TritonError(self) -> TritonErrors: ...  # noqa: N802

    @property
    def MetricFamily(self) -> MakeFamily: ...  # noqa: N802

    @property
    def TritonModelException(self) -> type[Exception]: ...  # noqa: N802

    def get_input_tensor_by_name(self, request: InferenceRequest, name: str) -> Input | None:
        """An input; None where the request has none of that name."""

"""``lvlm.runtime.server.ray:app``: replicas of an engine behind one address, by Ray Serve.

Each replica has an engine and the whole application of lvlm-serve; the ingress checks who asks,
chooses the replica and hands its ASGI messages on. Only ``deployments``, ``by_image`` and
``mistakes`` know Ray or its command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lvlm.core.errors import LvlmError
from lvlm.core.installing import install, require


def app(given: Mapping[str, Any]) -> Any:
    """The application for ``serve run`` and ``serve deploy``, by ``Arguments`` (arguments.py).

    Raises Mistake, which Ray shows in one line, and BackendError where Ray is not installed.
    """
    for module in ("ray.serve", "prometheus_client"):
        require(module, install("ray"))
    from lvlm.runtime.server.ray.arguments import read_arguments
    from lvlm.runtime.server.ray.deployments import application
    from lvlm.runtime.server.ray.mistakes import Mistake

    try:
        return application(read_arguments(given))
    except LvlmError as error:
        raise Mistake(str(error)) from None

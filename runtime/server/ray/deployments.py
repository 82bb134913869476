"""The two deployments: replicas that answer, and the ingress before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import Message, Scope

from lvlm.core.errors import BackendError, EngineClosedError, QueueFullError
from lvlm.runtime.bundle.reader import bundle_path, read_bundle
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.options.option_flags import read_text
from lvlm.runtime.server.app import Limits, make_app
from lvlm.runtime.server.media.media_reader import MediaReader
from lvlm.runtime.server.media.media_rules import MediaRules
from lvlm.runtime.server.ray.arguments import ENGINE, INGRESS, Arguments
from lvlm.runtime.server.ray.asgi_calls import messages
from lvlm.runtime.server.ray.by_image import ByImage
from lvlm.runtime.server.ray.forwarding import Forward, ReplicaLost
from lvlm.runtime.server.ray.ingress import make_ingress
from lvlm.runtime.server.refusals import Refusal
from lvlm.runtime.server.running import set_logging
from lvlm.runtime.server.serve_cli import read_keys
from lvlm.runtime.server.service import Served, Service

LOST = (RayActorError, ObjectLostError)
MAX_AT_INGRESS = 10_000  # requests; their bodies are bounded, and replicas say when they are full
CHECK_SECONDS = 2.0  # between two looks at a replica's engine
READY_SECONDS = 2.0
METRICS_SECONDS = 5.0
BEHIND_DRAIN = 5.0  # seconds, before Ray kills what it stops
LOGS = {"enable_access_log": False}  # of Ray: ours has the path and the model, too


class Replica:
    """An engine with the whole application of lvlm-serve."""

    async def __init__(self, given: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        set_logging(given.log_level)
        self._id = serve.get_replica_context().replica_id.unique_id
        reader = media_reader(given)
        usual = usual_options(given)
        self._engine = Engine(
            given.bundle,
            device=given.device,
            threads=given.cpus,
            verify=given.verify,
            slots=given.slots,
            memory_budget=given.memory_budget,
            max_text_len=given.max_text_len,
            max_images=given.max_images,
            keep=given.keep,
            kv_keep=given.kv_keep,
            queue_limit=given.queue,
            image_cache=given.image_cache,
        )
        served = Served(given.served_name, AsyncEngine(self._engine), usual)
        self._service = Service([served], reader.read)
        # Keys are the ingress's; bodies have passed there
        self._app = make_app(self._service, Limits(max_bytes=given.body_bytes))
        await self._service.warm_up()
        if not self._service.ready:
            raise BackendError(f"{given.bundle} cannot answer; the replica's log says why")

    async def answer(
        self,
        scope: Scope,
        body: bytes,
        **routed: str,  # noqa: ARG002 - for the router
    ) -> AsyncGenerator[list[Message]]:
        """The messages of the answer to one request.

        Raises ReplicaLost where the engine has died.
        """
        self._check()
        async with aclosing(messages(self._app, scope, body)) as batches:
            async for batch in batches:
                yield batch

    async def ready(self) -> bool:
        """True where requests are taken."""
        return self._service.ready

    async def metrics(self) -> tuple[str, list[Metric]]:
        """The replica's id, and its metrics."""
        return self._id, self._service.metrics.families()

    async def check_health(self) -> None:
        """Raise where the engine has died: Ray starts another replica then."""
        self._check()

    def _check(self) -> None:
        try:
            self._engine.check_room()
        except QueueFullError:
            return
        except EngineClosedError:
            raise ReplicaLost(self._id) from None

    async def __del__(self) -> None:
        """Close. Ray calls it when all that was begun is answered."""
        service = getattr(self, "_service", None)
        if service is not None:
            service.draining = True
            await service.close()


class Ingress:
    """Ingress: checks who asks, and chooses the replica that answers."""

    def __init__(self, replicas: Any, given: Arguments) -> None:
        set_logging(given.log_level)
        self._replicas = replicas
        self._answer = replicas.options(method_name="answer", stream=True)
        keys = read_keys(given.api_key, "api_key")
        limits = Limits(keys, given.body_bytes, given.body_seconds, given.allow_origin)
        name = f"ingress-{serve.get_replica_context().replica_id.unique_id}"
        self._app = make_ingress(Forward(self._ask), self._ready, self._metrics, limits, name)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def _ask(self, scope: Scope, body: bytes, **routed: str) -> AsyncGenerator[list[Message]]:
        response = self._answer.remote(scope, body, **routed)
        try:
            async for batch in response:
                yield batch
        except (GeneratorExit, asyncio.CancelledError):
            response.cancel()
            raise
        except LOST as error:
            raise ReplicaLost from error
        except BackPressureError:
            raise Refusal(
                429, "too many requests wait already; ask later", code="queue_full"
            ) from None
        except DeploymentUnavailableError:
            raise Refusal(503, "there are no replicas; ask again later") from None

    async def _ready(self) -> bool:
        """True where any replica takes requests."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                return bool(await self._replicas.ready.remote())
        except (*LOST, TimeoutError, BackPressureError, DeploymentUnavailableError):
            return False

    async def _metrics(self) -> dict[str, Sequence[Metric]]:
        """Metrics of all replicas; none where one does not answer in time."""
        try:
            asked = self._replicas.broadcast("metrics")
            told = await asked.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return {}
        return dict(one for one in told if isinstance(one, tuple))


def usual_options(given: Arguments) -> dict[str, Any]:
    """Options of requests that say nothing. Raises ParameterError."""
    usual: dict[str, Any] = {"max_image_pixels": given.media_pixels}
    usual |= {} if given.defaults is None else {"defaults": given.defaults}
    if given.chat_template is not None:
        usual["chat_template"] = read_text("chat_template", Path(given.chat_template))
    GenerationOptions(**usual)  # a mistake shows here
    return usual


def media_reader(given: Arguments) -> MediaReader:
    """Raises ParameterError."""
    domains, folders = tuple(given.allow_media_domain), tuple(given.allow_media_path)
    return MediaReader(MediaRules(domains, folders, given.media_bytes, given.media_seconds))


def application(given: Arguments) -> Any:
    """Both, bound together, as Ray runs them.

    Raises ParameterError and BundleError for what every replica would find.
    """
    read_bundle(bundle_path(given.bundle), "none")
    read_keys(given.api_key, "api_key")
    usual_options(given)
    media_reader(given)
    scaled: dict[str, Any] = {"num_replicas": given.replicas}
    if given.max_replicas is not None:
        scaled = {
            "autoscaling_config": {
                "min_replicas": given.replicas,
                "max_replicas": given.max_replicas,
                "target_ongoing_requests": given.max_slots,
            }
        }
    if given.routing == "image":
        path = f"{ByImage.__module__}:{ByImage.__name__}"
        kwargs = {"spare": given.max_slots}
        scaled["request_router_config"] = RequestRouterConfig(
            request_router_class=path, request_router_kwargs=kwargs
        )
    engine = serve.deployment(
        Replica,
        name=ENGINE,
        max_ongoing_requests=given.max_ongoing,
        max_queued_requests=given.max_ongoing,  # while there is no replica
        health_check_period_s=CHECK_SECONDS,
        graceful_shutdown_timeout_s=given.drain + BEHIND_DRAIN,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
        logging_config=LOGS,
        **scaled,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        max_ongoing_requests=MAX_AT_INGRESS,
        # Where both are stopped it tells, or asks again, what replicas did not finish
        graceful_shutdown_timeout_s=2 * (given.drain + BEHIND_DRAIN),
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
        logging_config=LOGS,
    )
    return ingress.bind(engine.bind(given), given)

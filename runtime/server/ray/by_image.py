"""Ray's router of requests, with this project's order of replicas."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from lvlm.runtime.server.ray.preference import ranked


class ByImage(RequestRouter):  # type: ignore[misc]
    """Sends what is asked about an image to the replica that has it (``ranked``)."""

    def initialize_state(self, **given: Any) -> None:
        """Take what RequestRouterConfig says: ``spare`` requests."""
        self._spare = int(given["spare"])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All of them in the request's order; Ray takes the first that has room."""
        asked: dict[Any, Any] = {}
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            asked = pending_request.kwargs
        found = {one.replica_id.unique_id: one for one in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {name: known.get(one.replica_id) or 0 for name, one in found.items()}
        order = ranked(asked.get("key", ""), loads, self._spare, asked.get("avoid", ""))
        return [[found[name]] for name in order]

"""Where a request goes: back to the replica that holds the conversation, unless that one is much busier.

A new conversation goes to the less busy of two; what it has in common with others (a system prompt) can be fetched from
the holder, which the replica is told.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from random import Random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from kvbits.ray.balance import ReplicaLoad, choose
from kvbits.ray.messages import Route
from kvbits.ray.prefix import PrefixMap, Recorded
from kvbits.ray.scaling import USAGE

ON_THE_WAY_SECONDS = 2.0
"""How long a choice counts as a request under way, unless the replica has taken or refused it before."""


class Router(RequestRouter):  # type: ignore[misc]
    """One in each process that sends requests. Its first argument of every call is a :class:`Route`.

    ``by_prefix``: whether it remembers who was given what; without, every request goes to the less busy of two.
    ``imbalance``: how many more requests than the least loaded the holder of a prefix may have. ``capacity``: blocks
    that are remembered.
    """

    def initialize_state(self, by_prefix: bool = True, imbalance: int = 8, capacity: int = 200_000) -> None:
        self._by_prefix = by_prefix
        self._imbalance = imbalance
        self._map = PrefixMap(capacity)
        self._random = Random()
        # Chosen, but not counted by Ray yet: of many requests that come at once, each one sees the ones before it.
        self._on_the_way: dict[str, tuple[str, float]] = {}
        # Prompts of which it is not known yet whether their replica took them; the bound is for senders that never say.
        self._sent: deque[tuple[Route, Recorded]] = deque(maxlen=10_000)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, the best first."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        route = _route(pending_request)
        if pending_request is None or route is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        route.alive = tuple(sorted(by_name))
        if route.target in by_name:
            return [[by_name[route.target]]]
        self._settle()
        continues = False
        if self._by_prefix:
            route.holder, continues = self._map.holder(route.blocks, by_name)
        request_id, now = pending_request.metadata.internal_request_id, time.monotonic()
        self._on_the_way.pop(request_id, None)
        coming = self._coming(now)
        loads = {name: self._load(replica, coming[name]) for name, replica in by_name.items()}
        order = choose(route.holder if continues else None, loads, self._imbalance, self._random)
        self._on_the_way[request_id] = order[0], now
        return [[by_name[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember who got the prompt."""
        self._on_the_way.pop(pending_request.metadata.internal_request_id, None)
        route = _route(pending_request)
        if self._by_prefix and route is not None and route.target is None:
            self._sent.append((route, self._map.record(route.blocks, replica_id.unique_id)))

    def _coming(self, now: float) -> Counter[str]:
        while self._on_the_way:
            first, (_, since) = next(iter(self._on_the_way.items()))
            if now - since < ON_THE_WAY_SECONDS:
                break
            del self._on_the_way[first]
        return Counter(name for name, _ in self._on_the_way.values())

    def _load(self, replica: RunningReplica, coming: int) -> ReplicaLoad:
        # What a replica said when it took its last request, and what was sent and ended since; 0 when that is long ago.
        requests = self.replica_queue_len_cache.get(replica.replica_id) or 0
        usage = float((replica.routing_stats or {}).get(USAGE, 0.0))
        return ReplicaLoad(requests + coming, usage, self._map.held[replica.replica_id.unique_id])

    def _settle(self) -> None:
        for _ in range(len(self._sent)):
            route, recorded = self._sent.popleft()
            if route.taken is None:
                self._sent.append((route, recorded))
            elif not route.taken:
                self._map.forget(recorded)


def _route(pending: PendingRequest | None) -> Route | None:
    if pending is None:
        return None
    return next((argument for argument in pending.args if isinstance(argument, Route)), None)

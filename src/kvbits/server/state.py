"""The live state for the page and ``kvbits top``."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from typing import Any

from kvbits.engine.engine import Engine
from kvbits.server.keys import Client
from kvbits.server.service import Service

MAX_CELLS = 4096
"""Most cells of the pool map; a larger pool is shown by every so many frames."""

MAX_SESSIONS = 100
"""Most sessions that are listed."""


async def state(service: Service, client: Client) -> dict[str, Any]:
    """Everything at one moment between two steps; where clients are kept apart, only the sessions of ``client``."""
    everybody = not service.options.apart or "operator" in client.permissions
    found = await service.worker.call(lambda: _engine_state(service.worker.engine, None if everybody else client.id))
    observer = service.observer
    return {
        "model": service.model,
        **found,
        "max_queue": service.options.max_queue,
        "draining": service.worker.draining,
        "latency": {
            "time_to_first_token": _quantiles(list(observer.recent_first)),
            "inter_token": _quantiles(list(observer.recent_between)),
        },
    }


def _engine_state(engine: Engine, client: str | None) -> dict[str, Any]:
    load, pool, stats = engine.load(), engine.pages.stats(), engine.stats
    frames = engine.pages.map().decode()
    every = -(-len(frames) // MAX_CELLS)
    requests = [*engine.scheduler.running, *engine.scheduler.waiting]
    return {
        "kv_cache_dtype": engine.pool.policy.name,
        "bits_per_element": engine.pool.bits_per_element(),
        "frame_bytes": engine.pool.layout.frame_bytes,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.config.max_num_seqs,
        "pool": {
            "frames": pool.num_frames,
            "free": pool.free,
            "open": pool.open,
            "sealed": pool.sealed,
            "shared": pool.shared,
            "cached": pool.cached,
            "usage": load.usage,
            "map": frames[::every],
            "frames_per_cell": every,
        },
        "running": load.running,
        "waiting": load.waiting,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "computed_tokens": stats.computed_tokens,
        "preemptions": stats.preemptions,
        "prefix_queries": pool.queries,
        "prefix_hits": pool.hits,
        "sessions": [
            {
                "id": request.group,
                "state": request.status.value,
                "prompt_tokens": len(request.prompt),
                "generated_tokens": request.num_output,
                "stored_tokens": request.computed,
                "cached_tokens": request.cached or 0,
            }
            for request in [r for r in requests if client in (None, r.client)][:MAX_SESSIONS]
        ],
    }


def _quantiles(seconds: Collection[float]) -> dict[str, float] | None:
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}

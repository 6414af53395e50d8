"""How many replicas there should be: by requests under way and by how full the pools are."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

USAGE = "kv_usage"
"""The statistic that a replica reports: share of its pool that running sequences hold, 0 to 1."""


def replicas_wanted(
    current: int, requests: float, usages: Collection[float], target_requests: float, target_usage: float
) -> int:
    """Enough for ``requests`` at ``target_requests`` each, and for the mean of ``usages`` to be ``target_usage``."""
    by_requests = math.ceil(requests / target_requests)
    by_usage = math.ceil(current * sum(usages) / len(usages) / target_usage) if usages else 0
    return max(by_requests, by_usage)


class ScalingPolicy:
    """What Ray Serve's controller asks from time to time; its limits and delays are applied to the answer."""

    def __init__(self, target_requests: float, target_usage: float) -> None:
        self._target_requests = target_requests
        self._target_usage = target_usage

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        usages = list((context.aggregated_metrics or {}).get(USAGE, {}).values())
        wanted = replicas_wanted(
            context.current_num_replicas, context.total_num_requests, usages, self._target_requests, self._target_usage
        )
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(low, min(high, wanted)), {}

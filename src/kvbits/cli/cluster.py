"""What ``kvbits serve --ray`` does in the place of a server in its own process."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvbits.cli.session import note
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.ray.options import ClusterOptions, ReplicaOptions


def check_ray(replicas: str | None, routing: str | None, drain_timeout: float) -> ClusterOptions:
    """What the options say. Raises ``ConfigError`` for a wrong value, or unless Ray Serve is installed."""
    from kvbits.ray.options import ClusterOptions

    low, high = replicas_of(replicas or "1")
    found = ClusterOptions(
        min_replicas=low, max_replicas=high, routing=routing or "prefix", drain_timeout=drain_timeout
    )
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray Serve, which is not installed; pip install 'kvbits[ray]'")
    return found


def replicas_of(text: str) -> tuple[int, int]:
    """``"2"`` or ``"1-4"`` as fewest and most replicas. Raises ``ConfigError`` for anything else."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise ConfigError(f"ray_replicas is '{text}'; write a number, or the fewest and the most such as 1-4")
    low = int(match.group(1))
    return low, int(match.group(2) or low)


def serve_cluster(replica: ReplicaOptions, cluster: ClusterOptions, host: str, port: int, address: str | None) -> None:
    """Serve from replicas on Ray until a signal ends it."""
    from kvbits.ray.run import run

    low, high = cluster.min_replicas, cluster.max_replicas
    note(
        f"kvbits serves {replica.server.served_model_name} at http://{host}:{port} from "
        f"{low if low == high else f'{low}-{high}'} replicas on Ray, {replica.engine.kv_cache_dtype}; "
        "they are starting ..."
    )
    run(replica, cluster, host, port, address)

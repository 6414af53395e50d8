"""What ``kvbits serve --ray`` does in the place of a server in its own process."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvbits.cli.session import note
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.ray.options import ReplicaOptions


def check_ray() -> None:
    """Raise ``ConfigError`` unless Ray Serve is installed."""
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray Serve, which is not installed; pip install 'kvbits[ray]'")


def replicas_of(text: str) -> tuple[int, int]:
    """``"2"`` or ``"1-4"`` as fewest and most replicas. Raises ``ConfigError`` for anything else."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise ConfigError(f"ray_replicas is '{text}'; write a number, or the fewest and the most such as 1-4")
    low = int(match.group(1))
    return low, int(match.group(2) or low)


def serve_cluster(
    replica: ReplicaOptions, replicas: str, routing: str, host: str, port: int, address: str | None
) -> None:
    """Serve from replicas on Ray until a signal ends it."""
    from kvbits.ray.options import ClusterOptions
    from kvbits.ray.run import run

    low, high = replicas_of(replicas)
    cluster = ClusterOptions(
        min_replicas=low, max_replicas=high, routing=routing, drain_timeout=replica.server.drain_timeout
    )
    note(
        f"kvbits serves {replica.server.served_model_name} at http://{host}:{port} from "
        f"{replicas} replicas on Ray, {replica.engine.kv_cache_dtype}; they are starting ..."
    )
    run(replica, cluster, host, port, address)

"""Start the application on a Ray cluster, or on this machine alone, and keep it up."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import suppress
from types import FrameType

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from kvbits.errors import ConfigError
from kvbits.ray.app import APPLICATION, build
from kvbits.ray.options import ClusterOptions, ReplicaOptions

log = logging.getLogger(__name__)


def connect(address: str | None) -> None:
    """Join the Ray cluster at ``address``, or start one in this process' machine.

    Raises ``ConfigError`` when the cluster cannot be reached.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"cannot join the Ray cluster at '{address}': {error}") from error


def start(replica: ReplicaOptions, cluster: ClusterOptions, host: str, port: int) -> None:
    """Run the application at ``host:port``; again, with other options: roll its replicas over one after another.

    Returns when the replicas are ready. Raises ``ConfigError`` when they cannot start.
    """
    serve.start(http_options=HTTPOptions(host=host, port=port))
    try:
        serve.run(build(replica, cluster), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ConfigError(f"the replicas of '{replica.model}' cannot start: {error}") from error


def run(replica: ReplicaOptions, cluster: ClusterOptions, host: str, port: int, address: str | None) -> None:
    """:func:`connect`, :func:`start`, then wait for SIGINT or SIGTERM and drain. Either may also come before that."""
    connect(address)
    # After connecting: Ray has handlers of its own, which end the process without a word to the replicas.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        start(replica, cluster, host, port)
        with suppress(KeyboardInterrupt):
            log.info(
                "kvbits serves %s at http://%s:%d with %d to %d replicas",
                replica.server.served_model_name, host, port, cluster.min_replicas, cluster.max_replicas,
            )  # fmt: skip
            threading.Event().wait()
        log.info("shutting down")
    finally:
        serve.shutdown()
        ray.shutdown()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

"""The application that Ray Serve runs: a front that speaks HTTP, and replicas of the engine behind it."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from kvbits.ray.front import front_of
from kvbits.ray.options import ClusterOptions, ReplicaOptions
from kvbits.ray.replica import Replica
from kvbits.ray.router import Router
from kvbits.ray.scaling import ScalingPolicy

APPLICATION = "kvbits"
ENGINES = "engines"

USAGE_PERIOD = 1.0
"""Seconds between two reports of how full a replica's pool is."""


def build(replica: ReplicaOptions, cluster: ClusterOptions, application: str = APPLICATION) -> serve.Application:
    """Bind the two deployments; ``serve.run(build(...), name=application)`` starts them or, again, rolls them over."""
    engines = serve.deployment(Replica).options(**_replica_settings(replica, cluster))

    application_of = front_of(
        deployment=ENGINES,
        application=application,
        max_body=replica.server.max_body,
        retries=cluster.retries,
        by_key=replica.server.apart,
    )
    front = serve.deployment(
        serve.ingress(application_of)(Front),
        name="front",
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(engines.bind(replica, ENGINES, cluster.fetch_pages))


class Front:
    """The deployment around the application of :mod:`kvbits.ray.front`, which is made in its process."""

    def __init__(self, engines: DeploymentHandle) -> None:
        """The handle is only named here so that both deployments belong to one application."""


def _replica_settings(replica: ReplicaOptions, cluster: ClusterOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "name": ENGINES,
        "max_ongoing_requests": replica.most_requests,
        # A replica that cannot start says so; what comes after is somebody else's try.
        "max_constructor_retry_count": 2,
        "ray_actor_options": {"num_cpus": cluster.cpus, "num_gpus": int(replica.device != "cpu")},
        "health_check_period_s": cluster.health_period,
        "health_check_timeout_s": max(30.0, 3 * cluster.health_period),
        "graceful_shutdown_timeout_s": cluster.drain_timeout,
    }
    settings["request_router_config"] = RequestRouterConfig(
        request_router_class=Router,
        request_router_kwargs={"by_prefix": cluster.routing == "prefix", "imbalance": cluster.imbalance},
        request_routing_stats_period_s=USAGE_PERIOD,
    )
    if cluster.min_replicas == cluster.max_replicas:
        return settings | {"num_replicas": cluster.min_replicas}
    policy = AutoscalingPolicy(
        policy_function=ScalingPolicy,
        policy_kwargs={"target_requests": cluster.target_requests, "target_usage": cluster.target_usage},
    )
    settings["autoscaling_config"] = AutoscalingConfig(
        min_replicas=cluster.min_replicas,
        max_replicas=cluster.max_replicas,
        initial_replicas=cluster.min_replicas,
        upscale_delay_s=cluster.scale_up_delay,
        policy=policy,
    )
    return settings

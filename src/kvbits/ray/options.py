"""What an operator decides about a cluster of replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvbits.auto.loss import Loss
from kvbits.engine.config import EngineConfig
from kvbits.errors import ConfigError
from kvbits.server.options import ServerOptions

if TYPE_CHECKING:
    from kvbits.auto.choose import Choice
    from kvbits.models import LoadedModel

ROUTINGS = ("prefix", "random")


@dataclass(frozen=True)
class ReplicaOptions:
    """One engine and its API, the same in every replica.

    ``threads``: CPU threads (``None``: torch's choice). On a ``device`` other than the CPU each replica has a GPU to
    itself. ``loss``: what the cache's dtype was measured to lose on this model (``None``: each replica looks it up).
    """

    model: str
    engine: EngineConfig
    server: ServerOptions
    dtype: str = "bfloat16"
    threads: int | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    weights: str = "auto"
    loss: Loss | None = None

    def load(self, progress: Callable[[str], None] | None = None) -> LoadedModel:
        """The model as each replica has it; sets the number of threads. Imports torch."""
        import torch

        from kvbits.engine.precheck import engine_check
        from kvbits.models import load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return load_model(
            self.model, self.dtype, progress, self.weights, self.device, self.trust_remote_code,
            self.engine.max_model_len, self.engine.disable_mla, engine_check(self.engine),
        )  # fmt: skip

    def with_choice(self, choice: Choice) -> ReplicaOptions:
        """The same with the dtype that was chosen before any replica starts, and what it loses."""
        return replace(self, engine=replace(self.engine, kv_cache_dtype=choice.policy), loss=choice.loss)

    @property
    def most_requests(self) -> int:
        """Requests that a replica takes at once; what is beyond its own limits gets its own 429."""
        places = self.engine.max_num_seqs + self.server.max_queue
        # Where one client has them all, others still get in.
        return places * min(2, max(1, len(self.server.keyring.client_ids))) + 16


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas, and where requests go.

    ``min_replicas`` to ``max_replicas`` run; between them ``target_requests`` under way and ``target_usage`` (share of
    the pool, 0 to 1) per replica decide. ``cpus`` is what Ray reserves for each. ``routing`` is ``"prefix"``, or
    ``"random"`` for the less busy of two. ``imbalance``: how many more requests than the least
    loaded the replica that holds a prompt's pages may have before another one fetches them; ``fetch_pages`` turns
    that transfer off. ``retries``: how often a request whose replica died before its answer began goes to another.
    ``health_period``, ``scale_up_delay`` and ``drain_timeout`` are in seconds. Raises
    ``ConfigError`` for a value that cannot work.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1.0
    routing: str = "prefix"
    imbalance: int = 8
    target_requests: float = 16.0
    target_usage: float = 0.8
    fetch_pages: bool = True
    retries: int = 2
    health_period: float = 5.0
    scale_up_delay: float = 10.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"there are {self.min_replicas} to {self.max_replicas} replicas; it must be at least 1, in this order"
            )
        if self.routing not in ROUTINGS:
            raise ConfigError(f"unknown routing '{self.routing}'; choose from {', '.join(ROUTINGS)}")
        for name in ("cpus", "target_requests", "health_period"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("imbalance", "retries", "scale_up_delay", "drain_timeout"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 < self.target_usage <= 1:
            raise ConfigError(f"target_usage is {self.target_usage}; it must be more than 0 and at most 1")

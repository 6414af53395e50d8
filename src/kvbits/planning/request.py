"""From a user's wishes to a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kvbits.codecs import SCHEMES, Policy, policy_of
from kvbits.config import AUTO, POLICY_PREFIX, ModelGeometry, parse_bytes
from kvbits.errors import ConfigError
from kvbits.planning.core import Plan, plan
from kvbits.planning.facts import ModelFacts
from kvbits.planning.memory import planned_bytes, workspace_bytes
from kvbits.planning.ranks import rank_geometry

SHORTEST = 1024
SEQUENCES = 256
"""Sequences whose logits the workspace counts when no limit is given."""


@dataclass(frozen=True)
class Options:
    """What ``kvbits plan`` was asked. Sizes are text such as ``80GiB`` and are those of one of ``ranks`` devices.

    Without ``contexts`` the model's whole context is planned, without ``dtypes`` and ``policies`` every dtype.
    """

    memory: str
    weights: str
    contexts: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    policies: tuple[Path, ...] = ()
    state_dtype: str = AUTO
    workspace: str | None = None
    ranks: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    watermark: int | None = None


@dataclass(frozen=True)
class Planned:
    """The plan for the contexts asked for; the same over a range of contexts; what they were made of.

    ``left_out``: dtypes that the model's heads do not fit, with the reason, where every dtype was asked for.
    """

    plan: Plan
    swept: Plan
    geometry: ModelGeometry
    policies: tuple[Policy, ...]
    left_out: dict[str, str]


def make_plan(facts: ModelFacts, options: Options) -> Planned:
    """Plan one rank. Raises ``ConfigError`` or ``UnsupportedError`` for what cannot be planned."""
    geometry = rank_geometry(facts.geometry.stored_in(options.state_dtype), options.ranks)
    if options.max_model_len is not None:
        if options.max_model_len < 1:
            raise ConfigError(f"max_model_len is {options.max_model_len}; it must be positive")
        geometry = replace(geometry, max_position=options.max_model_len)
    dtypes = options.dtypes or (() if options.policies else tuple(SCHEMES))
    names = [*dict.fromkeys(dtypes), *(f"{POLICY_PREFIX}{path}" for path in options.policies)]
    policies = [policy_of(name, geometry, None) for name in names]
    left_out = {}
    if names == list(SCHEMES):  # nobody asked for one of them by name
        left_out = {policy.name: reason for policy in policies if (reason := _unfit(policy, geometry))}
        policies = [policy for policy in policies if policy.name not in left_out]
    weights = -(-planned_bytes(facts, options.weights) // options.ranks)
    if options.workspace is None:
        sequences = options.max_num_seqs or SEQUENCES
        workspace = workspace_bytes(facts, options.max_num_batched_tokens, sequences, options.ranks)
    else:
        workspace = parse_bytes(options.workspace)
    contexts = options.contexts or (geometry.max_position,)

    def at(which: tuple[int, ...]) -> Plan:
        memory = parse_bytes(options.memory)
        return plan(geometry, policies, memory, which, weights, workspace, options.max_num_seqs, options.watermark)

    return Planned(at(contexts), at(_range(geometry.max_position, contexts)), geometry, tuple(policies), left_out)


def _unfit(policy: Policy, geometry: ModelGeometry) -> str | None:
    reasons = (s.supports(g) for s, g in zip(policy.layers, geometry.layers, strict=True))
    return next((reason for reason in reasons if reason), None)


def _range(longest: int, contexts: tuple[int, ...]) -> tuple[int, ...]:
    """Powers of two from 1,024 to the model's context, and the contexts asked for."""
    powers = []
    size = SHORTEST
    while size < longest:
        powers.append(size)
        size *= 2
    return tuple(sorted({*powers, longest, *contexts}))

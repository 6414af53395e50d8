"""The dtypes that ``auto`` chooses from, and what each is known by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from kvbits.codecs import Policy, PoolLayout, Scheme
from kvbits.evaluation.compare import REFERENCE
from kvbits.kernels import Backend
from kvbits.models import LoadedModel

LADDER = ("int8", "int6", "int5", "int4+sink:int8", "int4", "int3")
"""All that need no calibration, and no other of which takes as few bits and loses less; 16 bit is what remains.

``int2`` is not there: its KL is over the largest bound on every model that was measured.
"""

_CONTEXT = 4096
"""Tokens of the sequence whose effective bits decide which dtype is smaller."""


def rungs(loaded: LoadedModel, backend: Backend) -> list[Policy]:
    """The ladder's dtypes that the model's layers can be stored in, the fewest effective bits first."""
    geometry = loaded.geometry
    able = [policy for policy in map(loaded.policy, LADDER) if _runs(policy, loaded, backend)]
    context = min(_CONTEXT, geometry.max_position)
    return sorted(able, key=lambda policy: PoolLayout.of(geometry, policy).effective_bits(context))


def _runs(policy: Policy, loaded: LoadedModel, backend: Backend) -> bool:
    return all(
        backend.supports(scheme, layer) is None
        for schemes in (policy.layers, policy.sink or policy.layers)
        for scheme, layer in zip(schemes, loaded.geometry.layers, strict=True)
    )


def almost_nothing(loaded: LoadedModel) -> Policy | None:
    """16 bit but for the first layer's ``int8``: what any change, however small, costs in the model's arithmetic.

    In bfloat16 the layers behind it round otherwise at random, which gives a KL of its own (0.0002 nats a token with
    SmolLM2-135M, 0.0013 with Gemma 3 270M; all of what the whole cache in ``int8`` gives). ``None`` where nothing of
    the kind is to be taken off: in float32, and where the first layer is all there is.
    """
    last = loaded.geometry.num_layers - 1
    if loaded.model.dtype == torch.float32 or last == 0:
        return None
    return loaded.policy(f"0:int8,1-{last}:{REFERENCE}")


def identity(policy: Policy) -> str:
    """A name that equal bytes have in common, however the user wrote them: ``"2*int8,28*int4/int8+sink:30*int8"``."""
    if policy.rounding is not None:
        return policy.name
    sink = "" if policy.sink is None else f"+sink:{_runs_of(policy.sink)}"
    return _runs_of(policy.layers) + sink


def is_reference(policy: Policy) -> bool:
    """Whether the policy is 16 bit in all layers, which loses nothing."""
    return {scheme.name for scheme in (*policy.layers, *(policy.sink or ()))} == {REFERENCE}


def _runs_of(schemes: Sequence[Scheme]) -> str:
    groups = itertools.groupby(scheme.name for scheme in schemes)
    return ",".join(f"{len(list(group))}*{name}" for name, group in groups)

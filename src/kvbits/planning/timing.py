"""How long a step takes on a machine of which two numbers are known (the roofline model, Williams et al., 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from kvbits.config import ModelGeometry
from kvbits.planning.facts import ModelFacts


@dataclass(frozen=True)
class Machine:
    """One device: bytes a second from its memory, and floating-point operations a second, both as really reached."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one rank: the longer of moving the bytes and doing the arithmetic.

    A step reads all weights and every stored key and value of the sequences that decode; a token multiplies with the
    active parameters and attends to its context.
    """

    machine: Machine
    weights_bytes: float
    active: float
    geometry: ModelGeometry
    kv_bytes_per_token: float

    @classmethod
    def of(
        cls,
        machine: Machine,
        facts: ModelFacts,
        geometry: ModelGeometry,
        weights_bytes: int,
        kv_bytes_per_token: float,
        ranks: int,
    ) -> StepTime:
        """For one of ``ranks`` devices; ``geometry``, ``weights_bytes`` and ``kv_bytes_per_token`` are the rank's."""
        return cls(machine, weights_bytes, facts.parameters.active / ranks, geometry, kv_bytes_per_token)

    def seconds(self, decodes: int, decode_context: float, prefill: float, prefill_context: float) -> float:
        """A step of ``decodes`` sequences that store ``decode_context`` tokens together, and ``prefill`` prompt tokens
        that see ``prefill_context`` tokens each."""
        read = self.weights_bytes + self.kv_bytes_per_token * (decode_context + (prefill_context if prefill else 0.0))
        mean = decode_context / decodes if decodes else 0.0
        work = 2 * self.active * (decodes + prefill)
        work += decodes * self._attention(mean) + prefill * self._attention(prefill_context)
        return max(read / self.machine.bandwidth, work / self.machine.flops)

    def _attention(self, context: float) -> float:
        """Operations of one token's attention over ``context`` tokens, all layers."""
        return sum(
            2 * g.num_heads * (g.key_dim + g.value_dim) * (context if g.window is None else min(context, g.window))
            for g in self.geometry.layers
        )

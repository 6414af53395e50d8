"""From a table of choices to a policy under a budget."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.calibration.allocate import allocate, cheapest_within, total_cost
from kvbits.calibration.fit import FittedCodec
from kvbits.calibration.goal import Goal
from kvbits.codecs import SCHEMES, LayerRounding, Policy, PoolLayout, Scheme, parse_policy
from kvbits.config import PAGE_TOKENS, ModelGeometry
from kvbits.errors import ConfigError
from kvbits.kernels import Backend, default_backend

NAMES = tuple(name for name, s in SCHEMES.items() if s.key.candidate and s.value.candidate)
"""The dtypes that an allocation chooses from (:attr:`kvbits.codecs.Codec.candidate`)."""

Table = Sequence[Sequence[FittedCodec]]


def candidates(geometry: ModelGeometry, backend: Backend | None = None) -> tuple[str, ...]:
    """The dtypes that ``backend`` (default: this machine's) has kernels for wherever the head size allows them."""
    kernels = backend or default_backend()

    def runs(scheme: Scheme) -> bool:
        fitting = [g for g in geometry.layers if scheme.supports(g) is None]
        return all(kernels.supports(scheme, g) is None for g in fitting)

    return tuple(name for name in NAMES if runs(SCHEMES[name]))


def least_policy(geometry: ModelGeometry, sink: str | None) -> Policy:
    """The smallest policy that the model's head sizes allow."""
    layers = []
    for layer in geometry.layers:
        keys = [SCHEMES[n].key for n in NAMES if SCHEMES[n].key.supports(layer.key_dim) is None]
        values = [SCHEMES[n].value for n in NAMES if SCHEMES[n].value.supports(layer.value_dim) is None]
        layers.append(
            Scheme(
                min(keys, key=lambda c: c.page_bytes(layer.key_dim)),
                min(values, key=lambda c: c.page_bytes(layer.value_dim)),
            )
        )
    return Policy("least", tuple(layers), _sink(geometry, sink))


def check_bits(geometry: ModelGeometry, bits: float) -> None:
    """Raise ``ConfigError`` with the nearest possible when no policy has as few as ``bits`` per element."""
    least = least_policy(geometry, None).bits_per_element(geometry)
    if bits < least:
        raise ConfigError(f"{bits:g} bits per element cannot be met; the least possible is {least:.4g}")


def check_memory(geometry: ModelGeometry, sink: str | None, memory: int, sessions: int, context: int) -> None:
    """Raise ``ConfigError`` with the bytes needed when ``sessions`` of ``context`` tokens fit ``memory`` in no way."""
    needed = sessions * PoolLayout.of(geometry, least_policy(geometry, sink)).session_bytes(context)
    if needed > memory:
        raise ConfigError(
            f"{sessions} sessions of {context} tokens cannot fit {memory} bytes; the least possible is {needed} bytes"
        )


def check_goal(geometry: ModelGeometry, goal: Goal, sink: str | None) -> None:
    """:func:`check_bits` and :func:`check_memory` for what ``goal`` asks for."""
    if goal.bits is not None:
        check_bits(geometry, goal.bits)
    if goal.memory is not None:
        check_memory(geometry, sink, goal.memory, goal.sessions, goal.session_tokens)


def _sink(geometry: ModelGeometry, sink: str | None) -> tuple[Scheme, ...] | None:
    return None if sink is None else parse_policy(sink, geometry.num_layers).layers


class Planner:
    """Budgets in bytes of a sealed page of all layers, and the policies that meet them."""

    def __init__(self, geometry: ModelGeometry, table: Table, sink: str | None) -> None:
        """``table``: keys before values, layer after layer; ``sink``: the first page's dtype in every layer."""
        assert len(table) == 2 * geometry.num_layers, (len(table), geometry.num_layers)
        self.geometry = geometry
        self.table = table
        self._sink_name = sink
        self.sink = _sink(geometry, sink)
        self._elements = PAGE_TOKENS * geometry.bytes_per_token_16bit() // 2
        self.least = sum(min(choice.bytes for choice in row) for row in table)
        self.most = sum(max(choice.bytes for choice in row) for row in table)
        self.least_kl = sum(min(choice.cost for choice in row) for row in table)

    def bits(self, budget: int) -> float:
        """Bits per element of a page of ``budget`` bytes."""
        return 8 * budget / self._elements

    def of_bits(self, bits: float) -> int:
        """The budget of ``bits`` per element; raises ``ConfigError`` with the nearest that can be met."""
        check_bits(self.geometry, bits)
        return min(int(bits * self._elements / 8), self.most)

    def of_kl(self, most: float) -> int:
        """The least budget whose predicted KL is at most ``most``."""
        return cheapest_within(self.table, most)

    def of_memory(self, memory: int, sessions: int, context: int) -> int:
        """The largest budget with which ``sessions`` sequences of ``context`` tokens fit ``memory`` bytes.

        Open and first pages count. Raises ``ConfigError`` with the bytes that the least budget needs.
        """
        check_memory(self.geometry, self._sink_name, memory, sessions, context)

        def needed(budget: int) -> int:
            return sessions * PoolLayout.of(self.geometry, self.policy(budget)).session_bytes(context)

        low, high = self.least, self.most
        while high - low > PAGE_TOKENS:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle) <= memory else (low, middle)
        return high if needed(high) <= memory else low

    def policy(self, budget: int) -> Policy:
        """The best policy of at most ``budget`` bytes."""
        chosen = [row[i] for row, i in zip(self.table, allocate(self.table, budget), strict=True)]
        pairs = list(zip(chosen[::2], chosen[1::2], strict=True))
        layers = tuple(Scheme(key=SCHEMES[k.name].key, value=SCHEMES[v.name].value) for k, v in pairs)
        rounding = tuple(LayerRounding(k.rounding, v.rounding) for k, v in pairs)
        return Policy("calibrated", layers, self.sink, rounding)

    def predicted(self, budget: int) -> float:
        """KL per token that the table predicts for :meth:`policy`."""
        return total_cost(self.table, allocate(self.table, budget))

"""How many sessions fit: pure arithmetic over a model's geometry, cache policies and memory. Allocates nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvbits.codecs import OPEN, Policy, PoolLayout
from kvbits.codecs.states import StateLayout
from kvbits.config import ModelGeometry
from kvbits.errors import ConfigError
from kvbits.memory import show
from kvbits.planning.window import has_windows, windowed_session_bytes

_SEQUENCES = 64
"""Sequences that have slots for states where nobody says how many."""


@dataclass(frozen=True)
class ContextPlan:
    """Sessions of ``context`` tokens each, in one scheme.

    ``sessions`` is what the memory holds at once, open pages included; ``running`` is that number or ``max_num_seqs``,
    whichever ``fills_first``. ``admitted`` is how many such prompts a scheduler with a watermark starts together (with
    sliding windows, one after another: a prompt being read holds a step's pages beside its windows').
    ``open_bytes`` are those of ``session_bytes`` that are the open page's. ``gain_over_16bit`` compares the bytes that
    one such session holds, so that rounding to whole sessions does not blur it. ``windowed_sessions``: what the memory
    would hold without any padding (:mod:`kvbits.planning.window`); ``None`` for a model without sliding windows.
    """

    context: int
    sessions: int
    running: int
    admitted: int
    fills_first: Literal["memory", "max_num_seqs"]
    session_bytes: int
    open_bytes: int
    effective_bits_per_element: float
    gain_over_16bit: float
    windowed_sessions: int | None


@dataclass(frozen=True)
class _Memory:
    """``cache`` bytes, of which the states of ``sequences`` sequences leave ``pages``."""

    cache: int
    pages: int
    states: StateLayout | None
    limited: bool

    @classmethod
    def of(cls, geometry: ModelGeometry, cache: int, max_num_seqs: int | None) -> _Memory:
        states = StateLayout.of(geometry)
        taken = 0 if states is None else states.slots(cache, max_num_seqs or _SEQUENCES) * states.slot_bytes
        return cls(cache, cache - taken, states, max_num_seqs is not None)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's states."""
        return 0 if self.states is None else self.states.slot_bytes

    def sessions(self, layout: PoolLayout, context: int, spare: int = 0) -> int:
        """Sessions at once, ``spare`` bytes of the pages left free; where nobody limits them each has its slots."""
        states, pages = self.states, self.pages - spare
        if states is None:
            return layout.sessions(pages, context)
        if self.limited:
            return min(layout.sessions(pages, context), (self.cache - self.pages) // states.slot_bytes)
        low, high = 0, layout.sessions(self.cache - spare, context)
        while low < high:
            middle = (low + high + 1) // 2
            slots = states.slots(self.cache, middle)
            left = self.cache - spare - slots * states.slot_bytes
            fits = middle <= min(slots, layout.sessions(left, context))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


@dataclass(frozen=True)
class SchemePlan:
    """One cache policy: sizes in bytes, and what fits.

    ``kv_bytes_per_token`` and ``bits_per_element`` are those of sealed pages. ``longest_context`` is the longest that
    one session alone can have, ``limited_by`` the memory or the model.
    """

    dtype: str
    bits_per_element: float
    kv_bytes_per_token: float
    frame_bytes: int
    open_page_bytes: int
    num_frames: int
    contexts: tuple[ContextPlan, ...]
    longest_context: int
    limited_by: Literal["memory", "model"]

    def as_json(self) -> dict[str, Any]:
        """The plan in plain types. What depends on the context is that of the first one asked for; ``contexts`` has
        all of them."""
        first = asdict(self.contexts[0]) if self.contexts else {}
        return {**asdict(self), **first, "contexts": [asdict(c) for c in self.contexts]}


@dataclass(frozen=True)
class Plan:
    """What every policy makes of the same memory; ``cache_bytes`` is what weights and workspace leave.

    ``state_bytes`` are those of recurrent layers, of each session, whatever its length.
    """

    model: str
    memory_bytes: int
    weights_bytes: int
    workspace_bytes: int
    cache_bytes: int
    max_num_seqs: int | None
    schemes: tuple[SchemePlan, ...]
    state_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The plan in plain types."""
        return {
            "model": self.model,
            "memory_bytes": self.memory_bytes,
            "weights_bytes": self.weights_bytes,
            "workspace_bytes": self.workspace_bytes,
            "cache_bytes": self.cache_bytes,
            "max_num_seqs": self.max_num_seqs,
            "state_bytes": self.state_bytes,
            "schemes": [scheme.as_json() for scheme in self.schemes],
        }


def plan(
    geometry: ModelGeometry,
    policies: Sequence[Policy],
    memory_bytes: int,
    contexts: Iterable[int],
    weights_bytes: int = 0,
    workspace_bytes: int = 0,
    max_num_seqs: int | None = None,
    watermark: int | None = None,
) -> Plan:
    """Plan ``memory_bytes`` (weights, workspace and cache together) for sessions of each of ``contexts`` tokens.

    One frame in ``watermark`` stays free when a scheduler admits a session beside others (``None``: none does). A
    policy that not even one session fits is planned with zero sessions. Raises ``ConfigError`` when nothing is left
    for the cache or a context is not one that the model can have, ``UnsupportedError`` when a layer does not fit its
    codec.
    """
    cache_bytes = memory_bytes - weights_bytes - workspace_bytes
    if cache_bytes <= 0:
        raise ConfigError(
            f"{show(memory_bytes)} leave nothing for the KV cache: weights take {show(weights_bytes)}, workspace "
            f"{show(workspace_bytes)}"
        )
    if max_num_seqs is not None and max_num_seqs <= 0:
        raise ConfigError(f"max_num_seqs is {max_num_seqs}; it must be positive")
    asked = tuple(dict.fromkeys(contexts))
    for context in asked:
        if not 0 < context <= geometry.max_position:
            raise ConfigError(
                f"a context of {context} tokens cannot be planned: {geometry.name} has 1 to {geometry.max_position}"
            )
    plain = PoolLayout.of(geometry, Policy("bf16", (OPEN,) * geometry.num_layers))
    memory = _Memory.of(geometry, cache_bytes, max_num_seqs)
    schemes = tuple(_scheme(geometry, policy, plain, memory, asked, max_num_seqs, watermark) for policy in policies)
    return Plan(
        geometry.name, memory_bytes, weights_bytes, workspace_bytes, cache_bytes, max_num_seqs, schemes,
        memory.slot_bytes,
    )  # fmt: skip


def _scheme(
    geometry: ModelGeometry,
    policy: Policy,
    plain: PoolLayout,
    memory: _Memory,
    contexts: Sequence[int],
    max_num_seqs: int | None,
    watermark: int | None,
) -> SchemePlan:
    layout = PoolLayout.of(geometry, policy)
    longest = layout.longest_context(memory.pages)
    return SchemePlan(
        dtype=policy.name,
        bits_per_element=policy.bits_per_element(geometry),
        kv_bytes_per_token=layout.bytes_per_token,
        frame_bytes=layout.frame_bytes,
        open_page_bytes=layout.session_bytes(0),
        num_frames=layout.frames_in(memory.pages),
        contexts=tuple(_context(geometry, policy, layout, plain, memory, c, max_num_seqs, watermark) for c in contexts),
        longest_context=min(longest, geometry.max_position),
        limited_by="memory" if longest < geometry.max_position else "model",
    )


def _context(
    geometry: ModelGeometry,
    policy: Policy,
    layout: PoolLayout,
    plain: PoolLayout,
    memory: _Memory,
    context: int,
    max_num_seqs: int | None,
    watermark: int | None,
) -> ContextPlan:
    sessions = memory.sessions(layout, context)
    held = layout.session_bytes(context) + memory.slot_bytes
    spare = 0 if watermark is None else layout.bytes_of(layout.frames_in(memory.pages) // watermark)
    running = sessions if max_num_seqs is None else min(sessions, max_num_seqs)
    windowed = windowed_session_bytes(geometry, policy, context) if has_windows(geometry) else None
    return ContextPlan(
        context=context,
        sessions=sessions,
        running=running,
        admitted=min(running, max(min(sessions, 1), memory.sessions(layout, context, spare))),
        fills_first="memory" if running == sessions else "max_num_seqs",
        session_bytes=held,
        open_bytes=layout.session_bytes(0),
        effective_bits_per_element=layout.effective_bits(context),
        gain_over_16bit=(plain.session_bytes(context) + memory.slot_bytes) / held,
        windowed_sessions=None if windowed is None else memory.pages // windowed,
    )

"""Which cache dtype to use: a ladder of dtypes, measured, and the choice that follows from a stated rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvbits.codecs import SCHEMES, PoolLayout
from kvbits.codecs.artifact import resolve_policy
from kvbits.evaluation.verdict import Level
from kvbits.models import LoadedModel

_RUNGS = (
    "bf16",
    "int8",
    "int6",
    "int8,int4",
    "int5",
    "int4+sink:int8",
    "int4",
    "int3+sink:int8",
    "int3",
    "int2+sink:int8",
    "int2",
)
RULE = (
    "Of the dtypes that hold the sessions asked for: the best verdict; among several without a measurable loss the one "
    "with the fewest bits, which leaves the most room; among several with a small loss the one with the least KL."
)


def ladder(loaded: LoadedModel) -> list[str]:
    """The dtypes to try, from most to fewest bits: those that every layer of the model can be stored in."""
    found = []
    for rung in _RUNGS:
        policy = resolve_policy(rung, loaded.geometry, loaded.fingerprint)
        pairs = [*zip(policy.layers, loaded.geometry.layers, strict=True)]
        if all(scheme.supports(layer) is None for scheme, layer in pairs):
            found.append(rung)
    assert "bf16" in SCHEMES, "the 16-bit cache is always there"
    return found


def sessions_in(loaded: LoadedModel, dtype: str, memory: int, context: int) -> int:
    """Sequences of ``context`` tokens that ``memory`` bytes of cache hold at once, open pages included."""
    layout = PoolLayout.of(loaded.geometry, resolve_policy(dtype, loaded.geometry, loaded.fingerprint))
    return memory // layout.frame_bytes // layout.frames_of(context)


def bytes_for(loaded: LoadedModel, dtype: str, sessions: int, context: int) -> int:
    """Bytes of cache that ``sessions`` sequences of ``context`` tokens need."""
    layout = PoolLayout.of(loaded.geometry, resolve_policy(dtype, loaded.geometry, loaded.fingerprint))
    return sessions * layout.frames_of(context) * layout.frame_bytes


@dataclass(frozen=True)
class Candidate:
    """One dtype: what it takes, what it costs.

    ``task_loss`` is the log-probability of right answers lost in nats a token, ``right`` their share; ``decode`` is in
    tokens a second of all sequences.
    """

    dtype: str
    bits: float
    effective_bits: float
    kl: float
    task_loss: float
    right: float
    sessions: int
    decode: float
    level: Level

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "dtype": self.dtype,
            "bits_per_element": self.bits,
            "effective_bits_per_element": self.effective_bits,
            "kl_mean": self.kl,
            "task_logprob_lost_per_token": self.task_loss,
            "task_right": self.right,
            "sessions": self.sessions,
            "decode_tokens_per_s": self.decode,
            "verdict": self.level.words,
        }


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats or equals in all of: sessions, KL and decode speed, and beats in one."""
    return [c for c in candidates if not any(_beats(other, c) for other in candidates)]


def _beats(one: Candidate, two: Candidate) -> bool:
    better = (one.sessions - two.sessions, two.kl - one.kl, one.decode - two.decode)
    return min(better) >= 0 and max(better) > 0


def recommend(candidates: Sequence[Candidate], sessions: int) -> Candidate | None:
    """The choice by :data:`RULE`; ``None`` when no usable dtype holds ``sessions``."""
    able = [c for c in candidates if c.sessions >= sessions and c.level is not Level.BAD]
    if not able:
        return None
    best = min(c.level for c in able)
    equals = [c for c in able if c.level is best]
    return min(equals, key=lambda c: c.bits if best is Level.NONE else c.kl)

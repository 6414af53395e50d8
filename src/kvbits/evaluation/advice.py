"""Which cache dtype to use: a ladder of dtypes, measured, and the choice that follows from a stated rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbits.codecs import parse_policy
from kvbits.codecs.states import stored_as
from kvbits.config import AUTO, POLICY_PREFIX, ModelGeometry
from kvbits.evaluation.verdict import LIMITS, Level

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


def ladder(geometry: ModelGeometry) -> list[str]:
    """The dtypes to try, from most to fewest bits: those that every layer of the model can be stored in."""
    rungs = ((rung, parse_policy(rung, geometry.num_layers).layers) for rung in _RUNGS)
    return [
        rung
        for rung, schemes in rungs
        if all(s.supports(layer) is None for s, layer in zip(schemes, geometry.layers, strict=True))
    ]


@dataclass(frozen=True)
class Candidate:
    """One dtype: what it takes, what it costs.

    ``task_loss`` is the log-probability of right answers lost in nats a token, ``right`` their share, both means of the
    tasks that were run; ``decode`` is in tokens a second of all sequences; ``session_bytes`` are those of one session.
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
    session_bytes: int = 0
    state_dtype: str = AUTO

    @property
    def flags(self) -> str:
        """What to give to other commands."""
        dtype = self.dtype.removesuffix(stored_as(self.state_dtype))
        named = dtype.startswith(POLICY_PREFIX)
        flag = f"--kv-policy {dtype.removeprefix(POLICY_PREFIX)}" if named else f"--kv-cache-dtype {dtype}"
        return flag if self.state_dtype == AUTO else f"{flag} --state-dtype {self.state_dtype}"

    @classmethod
    def of(cls, row: Mapping[str, Any], sessions: int, decode: float, session_bytes: int = 0) -> Candidate:
        """From one dtype's record in the results of ``kvbits evaluate``."""
        tasks = list(row.get("tasks", {}).values())
        bits = float(row["bits_per_element"])
        return cls(
            dtype=row["dtype"],
            bits=bits,
            effective_bits=float(row.get("effective_bits_per_element", bits)),
            kl=float(row["kl_mean"]),
            task_loss=sum(t["logprob_lost_per_token"]["mean"] for t in tasks) / max(1, len(tasks)),
            right=sum(t["exact"] for t in tasks) / max(1, len(tasks)),
            sessions=sessions,
            decode=decode,
            level=level_of(row),
            session_bytes=session_bytes,
            state_dtype=str(row.get("state_dtype", AUTO)),
        )

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


def level_of(row: Mapping[str, Any]) -> Level:
    """The verdict in a record of results; by KL alone where it gave none."""
    for level in Level:
        if row.get("verdict") == level.words:
            return level
    limits = LIMITS["kl"]
    if row["kl_mean"] <= limits.none:
        return Level.NONE
    return Level.BAD if row["kl_mean"] > limits.bad else Level.SMALL


def advice(candidates: Sequence[Candidate], sessions: int, context: int, memory: int) -> str:
    """What to use for ``sessions`` of ``context`` tokens in ``memory`` bytes, or what comes nearest, in a sentence."""
    chosen = recommend(candidates, sessions)
    if chosen is not None:
        return (
            f"Use {chosen.flags}: {chosen.level.words} (KL {chosen.kl:.2g}), {chosen.sessions} sessions of {context} "
            f"tokens where {sessions} were asked for, {chosen.bits:.2f} bits an element. {RULE}"
        )
    usable = [c for c in candidates if c.level is not Level.BAD]
    if not usable:
        return f"Nothing to recommend: every dtype tried has the verdict '{Level.BAD.words}'."
    least = min(usable, key=lambda c: c.session_bytes)
    need = sessions * least.session_bytes
    return (
        f"Nothing that is fit to use holds {sessions} sessions of {context} tokens in {memory} bytes. The nearest is "
        f"{least.dtype}: {least.sessions} sessions, or {need} bytes ({need / 2**20:,.0f} MiB) for all {sessions}."
    )


def reasons(
    best: Candidate, candidates: Sequence[Candidate], sessions: int, context: int | None, row: Mapping[str, Any]
) -> list[str]:
    """Why ``best`` (whose record is ``row``) was recommended; ``context`` of the sessions, where they were planned."""
    change = 100 * (row["perplexity"] / row["perplexity_16bit"] - 1)
    kl = f"KL {best.kl:.2g} nats a token"
    found = [f"{best.level.words}: {kl}, perplexity {change:+.2f} %, {best.bits:.2f} bits per element"]
    if context is not None:
        verb = "was" if sessions == 1 else "were"
        found.append(f"{best.sessions:,} sessions of {context:,} tokens fit; {sessions:,} {verb} asked for")
        plain = next((c for c in candidates if c.dtype == "bf16"), None)
        if plain is not None and plain.sessions and plain is not best:
            found.append(f"that is {best.sessions / plain.sessions:.2g} times what 16 bit holds ({plain.sessions:,})")
    for other in sorted(candidates, key=lambda c: c.bits):
        if other.dtype != best.dtype and other.bits < best.bits and other.level is not best.level:
            found.append(
                f"{other.dtype} has fewer bits ({other.bits:.2f}), but: {other.level.words} (KL {other.kl:.2g})"
            )
    if best.decode:
        found.append(f"decodes {best.decode:,.0f} tokens a second")
    return [*found, f"Rule: {RULE}"]


def shortfall(candidates: Sequence[Candidate], sessions: int, context: int | None) -> list[str]:
    """Why none was recommended."""
    where = "" if context is None else f" of {context:,} tokens"
    return [
        f"No usable dtype holds {sessions:,} sessions{where}.",
        *(
            f"{c.dtype}: {c.level.words}; holds {c.sessions:,} sessions"
            for c in sorted(candidates, key=lambda c: -c.bits)
        ),
    ]

"""A plain recommendation from what was gathered, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass

from kvbits.evaluation.advice import RULE, Candidate, recommend
from kvbits.evaluation.verdict import LIMITS, Level
from kvbits.report.gather import Gathered, Record


@dataclass(frozen=True)
class Advice:
    """``dtype`` is ``None`` when nothing can be recommended; ``reasons`` then say why."""

    dtype: str | None
    reasons: tuple[str, ...]
    missing: tuple[str, ...]


def advise(found: Gathered, sessions: int, context: int | None) -> Advice:
    """Choose among the dtypes that were evaluated, for ``sessions`` of ``context`` tokens (``None``: the plan's own).

    Without a plan every dtype counts as holding them; without speeds they do not matter. What was missing is said.
    """
    missing = []
    if not found.evaluated:
        return Advice(None, ("No dtype was evaluated, and without quality no recommendation is made.",), ())
    held, at = _sessions(found, context)
    if not held:
        missing.append("no plan: whether the sessions fit was not considered")
    if not found.timed:
        missing.append("no speeds: decoding was not considered")
    speed = {row["dtype"]: float(row["decode_tokens_per_s"]) for row in found.timed}
    rows = {row["dtype"]: row for row in found.evaluated if "kl_mean" in row}
    candidates = [
        Candidate(
            dtype,
            float(row["bits_per_element"]),
            float(row.get("effective_bits_per_element", row["bits_per_element"])),
            float(row["kl_mean"]),
            0.0,
            0.0,
            held.get(dtype, 0 if held else sessions),
            speed.get(dtype, 0.0),
            _level(row),
        )
        for dtype, row in rows.items()
    ]
    unplanned = [c.dtype for c in candidates if held and c.dtype not in held]
    if unplanned:
        missing.append(f"not in the plan, so not considered: {', '.join(unplanned)}")
    best = recommend(candidates, sessions)
    if best is None:
        return Advice(None, _why_none(candidates, sessions, at), tuple(missing))
    return Advice(best.dtype, tuple(_why(best, candidates, sessions, at, rows[best.dtype])), tuple(missing))


def _sessions(found: Gathered, context: int | None) -> tuple[dict[str, int], int | None]:
    """Sessions of each planned dtype at ``context``, and the context."""
    held: dict[str, int] = {}
    at = context
    for plan in found.plans:
        for scheme in plan["schemes"]:
            chosen = [c for c in scheme["contexts"] if context is None or c["context"] == context]
            if chosen:
                held[scheme["dtype"]] = int(chosen[0]["running"])
                at = chosen[0]["context"]
    return held, at


def _level(row: Record) -> Level:
    """The verdict of ``kvbits evaluate``; by KL alone where it gave none."""
    for level in Level:
        if row.get("verdict") == level.words:
            return level
    limits = LIMITS["kl"]
    if row["kl_mean"] <= limits.none:
        return Level.NONE
    return Level.BAD if row["kl_mean"] > limits.bad else Level.SMALL


def _why(best: Candidate, all_of_them: list[Candidate], sessions: int, at: int | None, row: Record) -> list[str]:
    kl = f"KL {best.kl:.2g} nats a token"
    change = 100 * (row["perplexity"] / row["perplexity_16bit"] - 1)
    found = [f"{best.level.words}: {kl}, perplexity {change:+.2f} %, {best.bits:.2f} bits per element"]
    if at is not None:
        verb = "was" if sessions == 1 else "were"
        found.append(f"{best.sessions:,} sessions of {at:,} tokens fit; {sessions:,} {verb} asked for")
        plain = next((c for c in all_of_them if c.dtype == "bf16"), None)
        if plain is not None and plain.sessions and plain is not best:
            found.append(f"that is {best.sessions / plain.sessions:.2g} times what 16 bit holds ({plain.sessions:,})")
    for other in sorted(all_of_them, key=lambda c: c.bits):
        if other.dtype != best.dtype and other.bits < best.bits and other.level is not best.level:
            found.append(
                f"{other.dtype} has fewer bits ({other.bits:.2f}), but: {other.level.words} (KL {other.kl:.2g})"
            )
    if best.decode:
        found.append(f"decodes {best.decode:,.0f} tokens a second")
    found.append(f"Rule: {RULE}")
    return found


def _why_none(candidates: list[Candidate], sessions: int, at: int | None) -> tuple[str, ...]:
    lines = [
        f"{c.dtype}: {c.level.words}; holds {c.sessions:,} sessions" for c in sorted(candidates, key=lambda c: -c.bits)
    ]
    where = "" if at is None else f" of {at:,} tokens"
    return (f"No usable dtype holds {sessions:,} sessions{where}.", *lines)

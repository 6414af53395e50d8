"""A plain recommendation from what was gathered, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass

from kvbits.evaluation.advice import Candidate, reasons, recommend, shortfall
from kvbits.report.gather import Gathered


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
        Candidate.of(row, held.get(dtype, 0 if held else sessions), speed.get(dtype, 0.0))
        for dtype, row in rows.items()
    ]
    unplanned = [c.dtype for c in candidates if held and c.dtype not in held]
    if unplanned:
        missing.append(f"not in the plan, so not considered: {', '.join(unplanned)}")
    best = recommend(candidates, sessions)
    if best is None:
        return Advice(None, tuple(shortfall(candidates, sessions, at)), tuple(missing))
    return Advice(best.dtype, tuple(reasons(best, candidates, sessions, at, rows[best.dtype])), tuple(missing))


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

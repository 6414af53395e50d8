"""What a run showed: throughput, goodput, latencies, cached share, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from kvbits.errors import ConfigError
from kvbits.replay.run import Outcome
from kvbits.replay.send import Record

QUANTILES = (50, 90, 99)
GOALS = ("ttft", "tpot", "e2el")
"""What a goodput limit can be about: first token, time per output token, whole answer."""


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """``ttft:1000`` -> ``{"ttft": 1.0}``: limits in milliseconds to seconds. Raises ``ConfigError``."""
    found = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            found[name] = float(limit) / 1000
        except ValueError:
            found[name] = 0.0
        if name not in GOALS or not found[name] > 0:
            raise ConfigError(f"'{text}' is no goodput limit; write NAME:MILLISECONDS, NAME one of {', '.join(GOALS)}")
    return found


def summary(outcome: Outcome, goals: Mapping[str, float]) -> dict[str, Any]:
    """All figures; times in seconds, rates a second. Latencies are of answers that came whole."""
    good = [r for r in outcome.records if r.error is None]
    prompt = sum(r.prompt_tokens for r in good)
    output = sum(r.output_tokens for r in good)
    known = [r for r in good if r.cached_tokens is not None]
    cached = sum(r.cached_tokens or 0 for r in known)
    asked = sum(r.prompt_tokens for r in known)
    seconds = outcome.seconds
    met = sum(_meets(r, goals) for r in good)
    return {
        "requests": len(outcome.records),
        "completed": len(good),
        "failed": len(outcome.records) - len(good),
        "failures": dict(Counter(r.error for r in outcome.records if r.error is not None).most_common(20)),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (prompt + output) / seconds,
        "cached_tokens": cached if known else None,
        "cached_share": cached / asked if asked else None,
        "goals": dict(goals),
        "good_requests_per_s": met / seconds if goals else None,
        "good_share": met / len(outcome.records) if goals and outcome.records else None,
        "ttft": quantiles(r.first for r in good if r.first is not None),
        "itl": quantiles(gap for r in good for gap in r.between),
        "tpot": quantiles(r.per_token for r in good if r.per_token is not None),
        "e2el": quantiles(r.whole for r in good),
        "most_open": most_open(outcome.records),
    }


def quantiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and quantiles; ``None`` of nothing."""
    found = numpy.array([value for value in values if value is not None])
    if not found.size:
        return None
    cuts = numpy.percentile(found, QUANTILES)
    return {"mean": float(found.mean())} | {f"p{q}": float(cut) for q, cut in zip(QUANTILES, cuts, strict=True)}


def most_open(records: Sequence[Record]) -> int:
    """The most requests that were under way at once."""
    events = sorted(event for r in records for event in ((r.begin, 1), (r.begin + r.whole, -1)))
    level = most = 0
    for _, change in events:
        level += change
        most = max(most, level)
    return most


def _meets(record: Record, goals: Mapping[str, float]) -> bool:
    found = {"ttft": record.first, "tpot": record.per_token, "e2el": record.whole}
    # An answer of one token has no time between tokens, and none of no text has a first one to miss.
    return all((found[name] or 0.0) <= limit for name, limit in goals.items())

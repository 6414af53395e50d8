"""From measurements to a verdict in words.

Each measure is a mean loss against the 16-bit cache with a 95 % interval, and has two limits. *No measurable loss*: the
interval reaches down to the first limit. *Do not use*: the whole interval is over the second limit. *Small loss*:
anything between, and a loss of right answers, generated texts or tool calls that was found in fewer than
:data:`~kvbits.evaluation.bootstrap.LEAST_GROUPS` of them, whose interval cannot know how these differ. The verdict is
that of the worst measure. A dtype is also *do not use* where another one in the run takes no more bits and loses
certainly less KL: then something is wrong with it, or it is a waste of bits.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvbits.evaluation.bootstrap import LEAST_GROUPS, Interval


class Level(enum.IntEnum):
    """How bad it is."""

    NONE = 0
    SMALL = 1
    BAD = 2

    @property
    def words(self) -> str:
        """The verdict as the report words it."""
        return ("no measurable loss", "small loss", "do not use")[self]


@dataclass(frozen=True)
class Thresholds:
    """What a loss is called: ``none`` and below is nothing, above ``bad`` too much; ``unit`` is that of both.

    ``documents``: it is a loss of whole documents or generated texts, not of the text's tokens or the model's layers.
    """

    none: float
    bad: float
    unit: str
    about: str
    percent: bool = False
    documents: bool = False

    def show(self, value: float) -> str:
        """``value`` with its unit."""
        shown = 100 * value if self.percent else value
        return f"{shown:.0f} {self.unit}" if abs(shown) >= 10 else f"{shown:.2g} {self.unit}"


LIMITS = {
    "kl": Thresholds(0.001, 0.05, "nats", "KL divergence to 16 bit, per token"),
    "perplexity": Thresholds(0.002, 0.02, "%", "perplexity over 16 bit's", percent=True),
    "gain": Thresholds(0.01, 0.03, "%", "what sealed pages read back is too large or too small by", percent=True),
    "exact": Thresholds(0.0, 0.05, "points", "right answers lost", percent=True, documents=True),
    "logprob": Thresholds(0.01, 0.1, "nats", "log-probability of the right answer lost, per token", documents=True),
    "repetition": Thresholds(0.01, 0.1, "points", "repeated 4-grams more", percent=True, documents=True),
    "self-perplexity": Thresholds(
        0.02, 0.2, "nats", "how much less likely 16 bit finds the drawn text, per token", documents=True
    ),
    "calls-valid": Thresholds(
        0.0, 0.05, "points", "tool calls that are no valid JSON any more", percent=True, documents=True
    ),
    "calls-changed": Thresholds(
        0.05, 0.3, "points", "tool calls with another name or other arguments", percent=True, documents=True
    ),
}
"""The rule of every kind of measure."""


@dataclass(frozen=True)
class Measure:
    """One loss: ``kind`` of :data:`LIMITS`, ``where`` it was found, and how large it is."""

    kind: str
    where: str
    loss: Interval

    @property
    def level(self) -> Level:
        """The verdict of this measure alone."""
        limits = LIMITS[self.kind]
        if self.loss.low <= limits.none:
            return Level.NONE
        certain = self.loss.groups >= LEAST_GROUPS or not limits.documents
        return Level.BAD if certain and self.loss.low > limits.bad else Level.SMALL

    @property
    def words(self) -> str:
        """The measure in a sentence's part."""
        limits = LIMITS[self.kind]
        low, high = limits.show(self.loss.low), limits.show(self.loss.high)
        return f"{self.where}: {limits.about} {limits.show(self.loss.mean)} ({low} to {high})"

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"kind": self.kind, "where": self.where, **asdict(self.loss), "verdict": self.level.words}


@dataclass(frozen=True)
class Verdict:
    """The worst measure's level, and the measures that are at it."""

    level: Level
    reasons: tuple[str, ...]
    measures: tuple[Measure, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "verdict": self.level.words,
            "reasons": list(self.reasons),
            "measures": [m.as_json() for m in self.measures],
        }


def judge(measures: Sequence[Measure], better: Sequence[str] = ()) -> Verdict:
    """The verdict on a dtype; ``better`` names dtypes of no more bits that certainly lose less (:func:`dominated`)."""
    level = max((m.level for m in measures), default=Level.NONE)
    reasons = tuple(m.words for m in measures if m.level is level and level is not Level.NONE)
    if better:
        told = tuple(f"{name} takes no more bits and loses less" for name in better)
        reasons = told + (reasons if level is Level.BAD else ())
        level = Level.BAD
    return Verdict(level, reasons, tuple(measures))


def dominated(bits: float, kl: Interval, others: Sequence[tuple[str, float, Interval]]) -> list[str]:
    """Which of ``others`` (name, bits per element, KL) have no more bits and a KL that lies wholly below."""
    return [name for name, own_bits, own in others if own_bits <= bits and own.high < kl.low]

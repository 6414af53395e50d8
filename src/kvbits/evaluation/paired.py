"""The same questions answered twice: could the difference be chance?"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any


def mcnemar(own: Sequence[bool], reference: Sequence[bool]) -> dict[str, Any]:
    """McNemar's exact test (1947) on answers that are right or not, question by question.

    Returns ``right`` and ``right_16bit``, ``lost`` (only ``reference`` is right), ``won`` (only ``own`` is), and ``p``,
    the two-sided probability of a split at least as uneven if both were equally good.
    """
    lost = sum(r and not a for a, r in zip(own, reference, strict=True))
    won = sum(a and not r for a, r in zip(own, reference, strict=True))
    changed = lost + won
    tail = sum(comb(changed, k) for k in range(min(lost, won) + 1)) / 2**changed
    return {"right": sum(own), "right_16bit": sum(reference), "lost": lost, "won": won, "p": min(1.0, 2 * tail)}

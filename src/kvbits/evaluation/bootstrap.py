"""Paired bootstrap: how sure a mean difference between two caches is.

Both caches answer the same questions and read the same tokens, so what is resampled is the list of differences
(Efron & Tibshirani, 1993, An Introduction to the Bootstrap). Differences of one document or one stretch of text are
not independent: whole groups are drawn.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
RESAMPLES = 2000
LEAST_GROUPS = 8
"""With fewer groups than this single differences are drawn: a handful of groups says nothing of their spread. Such an
interval is too narrow, so the verdict never condemns by it alone."""


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile interval at :data:`LEVEL`; of ``items`` differences in ``groups`` groups."""

    mean: float
    low: float
    high: float
    items: int
    groups: int

    def as_json(self) -> dict[str, Any]:
        """The fields in plain types."""
        return asdict(self)


def interval(differences: ArrayLike, groups: Sequence[Hashable], seed: int = 0) -> Interval:
    """The mean of ``differences`` (at least one) and its interval; ``groups`` names the group of each."""
    values = np.asarray(differences, dtype=np.float64)
    assert values.ndim == 1, values.shape
    assert len(values) == len(groups) > 0, (len(values), len(groups))
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    own = np.array([names[name] for name in groups])
    if len(names) < LEAST_GROUPS:
        own = np.arange(len(values))
    count = int(own.max()) + 1
    sums = np.bincount(own, weights=values, minlength=count)
    sizes = np.bincount(own, minlength=count).astype(np.float64)
    random = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 100):  # bounds the drawn indices to 100 x groups
        drawn = random.integers(count, size=(100, count))
        means[start : start + 100] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), len(values), len(names))

"""Which codec goes where, under a budget of bytes: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvbits.config import ALIGNMENT
from kvbits.errors import ConfigError


class Option(Protocol):
    """``bytes`` (a multiple of 64) and ``cost`` of one choice."""

    @property
    def bytes(self) -> int: ...
    @property
    def cost(self) -> float: ...


def allocate(table: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """One option for each row of ``table``, least in total cost among those of at most ``budget`` bytes.

    Dynamic programming over bytes in units of a cache line: exact. Raises ``ConfigError`` naming the least possible
    number of bytes when the budget is below it.
    """
    least = sum(min(o.bytes for o in row) for row in table)
    if budget < least:
        raise ConfigError(f"a budget of {budget} bytes a page cannot be met; the least possible is {least}")
    # Bytes above the cheapest option of each row; all are whole cache lines.
    room = min(budget, sum(max(o.bytes for o in row) for row in table)) - least
    units = room // ALIGNMENT
    best = np.zeros(units + 1)
    picks = np.zeros((len(table), units + 1), dtype=np.int16)
    for index, row in enumerate(table):
        base = min(o.bytes for o in row)
        total = np.full((len(row), units + 1), np.inf)
        for i, option in enumerate(row):
            extra = (option.bytes - base) // ALIGNMENT
            assert (option.bytes - base) % ALIGNMENT == 0, option
            if extra <= units:
                total[i, extra:] = best[: units + 1 - extra] + option.cost
        picks[index] = total.argmin(axis=0)
        best = total.min(axis=0)
    chosen, left = [], units
    for index in range(len(table) - 1, -1, -1):
        pick = int(picks[index, left])
        chosen.append(pick)
        left -= (table[index][pick].bytes - min(o.bytes for o in table[index])) // ALIGNMENT
    return chosen[::-1]


def cheapest_within(table: Sequence[Sequence[Option]], most: float) -> int:
    """The least budget of bytes whose allocation costs at most ``most``.

    Raises ``ConfigError`` naming the least possible cost when that is above ``most``.
    """
    least_cost = sum(min(o.cost for o in row) for row in table)
    if most < least_cost:
        raise ConfigError(f"a predicted KL of {most:.2g} cannot be met; the least possible is {least_cost:.2g}")
    low = sum(min(o.bytes for o in row) for row in table)
    high = sum(min(row, key=lambda o: (o.cost, o.bytes)).bytes for row in table)
    while high - low > 0:
        middle = (low + high) // 2
        if total_cost(table, allocate(table, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return high


def total_cost(table: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    """Cost of an allocation."""
    return sum(row[i].cost for row, i in zip(table, chosen, strict=True))

"""Windows to calibrate on and others to check the result on."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.errors import ConfigError


def check_counts(context: int, fit: int, check: int) -> None:
    """Raise ``ConfigError`` for a number of windows or tokens that is not positive."""
    for name, value in (("windows", fit), ("check windows", check), ("tokens in a window", context)):
        if value < 1:
            raise ConfigError(f"{value} {name} asked for; it must be at least 1")


def split_windows(
    texts: Sequence[Sequence[int]], context: int, fit: int, check: int
) -> tuple[list[list[int]], list[list[int]]]:
    """``fit`` and ``check`` windows of ``context`` tokens, disjoint, spread evenly over all ``texts`` (token ids).

    Raises ``ConfigError`` when the texts hold too few windows or a number is not positive.
    """
    check_counts(context, fit, check)
    needed = f"{fit} to calibrate on and {check} to check on are needed"
    spread = _spread(texts, context, fit + check, needed)
    middle = (fit + check) // 2
    return spread[:middle] + spread[middle + check :], spread[middle : middle + check]


def spread_windows(texts: Sequence[Sequence[int]], context: int, count: int) -> list[list[int]]:
    """``count`` windows as :func:`split_windows` takes them, to calibrate on alone."""
    return _spread(texts, context, count, f"{count} are needed")


def _spread(texts: Sequence[Sequence[int]], context: int, count: int, needed: str) -> list[list[int]]:
    found = [list(t[i : i + context]) for t in texts for i in range(0, len(t) - context + 1, context)]
    if len(found) < count:
        sizes = ", ".join(str(len(t)) for t in texts)
        raise ConfigError(f"the text has {sizes} tokens: {len(found)} windows of {context}; {needed}")
    return [found[i * len(found) // count] for i in range(count)]

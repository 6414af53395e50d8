"""A whole calibration: from texts to a policy on disk that was checked through the real kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvbits.calibration.collect import collect
from kvbits.calibration.fit import fit
from kvbits.calibration.goal import Goal, Sizes
from kvbits.calibration.policy import Planner, candidates, check_bits, check_memory
from kvbits.calibration.selftext import write_windows
from kvbits.calibration.sensitivity import sensitivity
from kvbits.calibration.texts import check_counts, split_windows
from kvbits.codecs import Policy
from kvbits.codecs.policy_file import save_policy
from kvbits.errors import ConfigError
from kvbits.evaluation.compare import Comparison, compare, policies_of
from kvbits.evaluation.laboratory import Bar
from kvbits.models import LoadedModel

ROUNDS = 4
"""Budgets that are tried for ``max_kl``: the prediction ranks policies well and is off by a factor."""


def calibrate(
    loaded: LoadedModel,
    texts: Sequence[tuple[str, Sequence[int]]],
    output: Path,
    goal: Goal,
    sink: str | None,
    sizes: Sizes,
    bar: Bar,
    note: Callable[[str], None],
) -> tuple[Policy, Comparison]:
    """Fit a policy to ``texts`` (names and token ids; without any the model writes its own), measure it, and write it.

    ``sink`` is the dtype of every sequence's first page (``None``: as the rest). The model should compute in float32.
    ``note`` is told of every budget that is tried. Raises ``ConfigError`` for what cannot be met, before the work where
    that can be known, and for texts that are too short.
    """
    geometry = loaded.geometry
    policies_of(loaded, [sink or "int8"], sizes.context)
    if goal.bits is not None:
        check_bits(geometry, goal.bits)
    if goal.memory is not None:
        check_memory(geometry, sink, goal.memory, goal.sessions, goal.session_tokens)
    tokens = [text for _, text in texts] or _own_text(loaded, sizes, bar)
    fitted, checked = split_windows(tokens, sizes.context, sizes.windows, sizes.check_windows)
    planner = planner_of(loaded, fitted, sink, bar)

    def measure(budget: int) -> Comparison:
        total = 2 * sum(map(len, checked))
        with bar(total, f"checking {planner.bits(budget):.3g} bits") as advance:
            return compare(loaded, [planner.policy(budget)], checked, progress=advance)[0]

    if goal.max_kl is not None:
        budget, found = _search(planner, measure, goal.max_kl, note)
    else:
        budget = (
            planner.of_memory(goal.memory, goal.sessions, goal.session_tokens)
            if goal.memory is not None
            else planner.of_bits(goal.bits or 0)
        )
        found = measure(budget)
    measured = {
        "texts": [name for name, _ in texts],
        "windows": sizes.windows,
        "context": sizes.context,
        "sensitivity": sensitivity(planner.table),
        "predicted_kl": planner.predicted(budget),
        "check": {k: v for k, v in found.as_json().items() if k != "dtype"},
    }
    return save_policy(output, planner.policy(budget), geometry, loaded.fingerprint, measured), found


def planner_of(loaded: LoadedModel, windows: Sequence[Sequence[int]], sink: str | None, bar: Bar) -> Planner:
    """What every dtype costs in every place, measured on ``windows`` (token ids), ready for any budget."""
    with bar(sum(map(len, windows)), "gradients") as advance:
        statistics = collect(loaded, windows, progress=advance)
    with bar(len(statistics.samples), "fitting") as advance:
        table = fit(statistics, candidates(loaded.geometry), advance)
    return Planner(loaded.geometry, table, sink)


def _own_text(loaded: LoadedModel, sizes: Sizes, bar: Bar) -> list[list[int]]:
    """Texts of one window each that the model writes, as many as are needed."""
    check_counts(sizes.context, sizes.windows, sizes.check_windows)
    count = sizes.windows + sizes.check_windows
    with bar(sizes.context * count, "writing a text") as advance:
        return write_windows(loaded, sizes.context, count, progress=advance)


def _search(
    planner: Planner, measure: Callable[[int], Comparison], most: float, note: Callable[[str], None]
) -> tuple[int, Comparison]:
    """The fewest bits whose measured KL is at most ``most``, within a few rounds of correcting the prediction."""
    target, tried, good = most, dict[int, Comparison](), list[int]()
    for _ in range(ROUNDS):
        budget = planner.of_kl(target)
        if budget in tried:
            break
        found = tried[budget] = measure(budget)
        kl = found.summary.kl_mean
        note(f"{found.bits_per_element:.3f} bits: KL {kl:.2g}")
        good += [budget] if kl <= most else []
        if good and budget == min(good) and kl > 0.85 * most:
            break
        target = max(target * 0.95 * most / kl, planner.least_kl)
    if not good:
        nearest = min(found.summary.kl_mean for found in tried.values())
        raise ConfigError(f"a KL of {most:g} cannot be met; the nearest that was measured is {nearest:.2g}")
    return min(good), tried[min(good)]
